"""Files that transformers cannot read are refused with the name of the file, and all others are left to it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import write_gguf

from job.system import model_files


@pytest.fixture(params=["llama", "bloom"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return shutil.copytree(request.getfixturevalue(request.param), tmp_path / "model")


def check_all(folder: Path) -> None:
    model_files.check_config(folder)
    model_files.check_tokenizer(folder)
    model_files.check_weights_index(folder)


def test_intact_files_are_accepted(model: Path, gguf_model: Path) -> None:
    check_all(model)
    model_files.check_gguf(gguf_model)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"[]", b"3", b"null", b'"text"'])
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"])
def test_a_file_that_is_no_json_object_is_refused(model: Path, name: str, content: bytes) -> None:
    (model / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"^{name} is (not JSON|a JSON .*, not an object)"):
        check_all(model)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("config.json", {"model_type": ["llama"]}),
        ("config.json", {"auto_map": {"AutoConfig": 3}}),
        ("config.json", {"dtype": "own"}),
        ("config.json", {"quantization_config": []}),
        ("config.json", {"num_attention_heads": 0}),
        ("config.json", {"vocab_size": -1}),
        ("config.json", {"head_dim": 0}),
        ("config.json", {"dtype": "float8_e4m3fn"}),
        ("config.json", {"torch_dtype": "int8"}),
        ("config.json", {"rope_scaling": {"rope_type": "linear"}}),
        ("config.json", {"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}),
        ("tokenizer_config.json", {"tokenizer_class": 3}),
        ("tokenizer_config.json", {"eos_token": 3}),
        ("tokenizer_config.json", {"pad_token": {"lstrip": True}}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"1": "<s>"}}),
        ("tokenizer_config.json", {"extra_special_tokens": "<s>"}),
        ("tokenizer_config.json", {"chat_template": [3]}),
        ("tokenizer_config.json", {"chat_template": [{"name": "default"}]}),
        ("special_tokens_map.json", {"bos_token": 3}),
        ("added_tokens.json", {"<s>": "1"}),
        ("tokenizer.json", {"added_tokens": 3}),
        ("tokenizer.json", {"added_tokens": [{"content": "<s>"}]}),
        ("tokenizer.json", {"model": {"type": "BPE", "vocab": {}, "merges": [["a", "b"]]}}),
        ("tokenizer.json", {"version": 3}),
        ("model.safetensors.index.json", {"weight_map": {"weight": "model.safetensors"}}),
        ("model.safetensors.index.json", {"metadata": {}, "weight_map": {"weight": 3}}),
    ],
    ids=lambda value: json.dumps(value)[:50] if isinstance(value, dict) else value,
)
def test_a_value_that_transformers_cannot_use_is_refused(model: Path, name: str, values: dict[str, object]) -> None:
    content = json.loads((model / name).read_text()) if (model / name).is_file() else {}
    (model / name).write_text(json.dumps(content | values))
    with pytest.raises(ValueError, match=f"^{name}: "):
        check_all(model)


@pytest.mark.parametrize("size", [4, 8, 24, 100, 1000, 3000, 50_000, -1])
def test_a_truncated_gguf_file_is_refused(gguf_model: Path, tmp_path: Path, size: int) -> None:
    (tmp_path / "tiny.gguf").write_bytes(gguf_model.read_bytes()[:size])
    with pytest.raises(ValueError, match="."):
        model_files.check_gguf(tmp_path / "tiny.gguf")


def test_a_folder_without_a_vocabulary_is_refused(model: Path) -> None:
    (model / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="no vocabulary of a tokenizer, such as tokenizer.json"):
        model_files.check_tokenizer(model)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"llama.attention.head_count": 0}, "llama.attention.head_count is 0; expected at least 1"),
        ({"tokenizer.ggml.eos_token_id": 1000}, "eos_token_id is 1000, but the file has 258 tokens"),
        ({"tokenizer.ggml.merges": ["a"]}, "merge 'a' is not a pair of its tokens"),
        ({"tokenizer.ggml.merges": ["b a"]}, "merge 'b a' is not a pair of its tokens"),
        ({"tokenizer.ggml.tokens": "text"}, "tiny.gguf: tokens: Input should be a valid list"),
    ],
)
def test_an_inconsistent_gguf_tokenizer_is_refused(tmp_path: Path, metadata: dict[str, object], message: str) -> None:
    write_gguf(tmp_path / "tiny.gguf", metadata=metadata)
    with pytest.raises(ValueError, match=message):
        model_files.check_gguf(tmp_path / "tiny.gguf")


@pytest.mark.parametrize(
    ("field", "message"),
    [("tokenizer.ggml.tokens", "tokens: Field required"), ("tokenizer.ggml.merges", "neither merges nor scores")],
)
def test_a_gguf_file_without_a_tokenizer_is_refused(tmp_path: Path, field: str, message: str) -> None:
    write_gguf(tmp_path / "tiny.gguf", drop=field)
    with pytest.raises(ValueError, match=message):
        model_files.check_gguf(tmp_path / "tiny.gguf")
