"""The base model is read from safetensors or GGUF alone, quantized as set, and still trainable."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from conftest import CPU
from transformers import PreTrainedModel

from job import quantize
from job.errors import InvalidInputError
from job.settings import Base


def load(folder: Path, how: str) -> PreTrainedModel:
    return quantize.load_model(Base.model_validate({"model": str(folder), "quantize": how}), CPU)


@pytest.mark.parametrize(("how", "kind"), [("int8", Linear8bitLt), ("nf4", Linear4bit), ("none", torch.nn.Linear)])
def test_linear_layers_are_quantized_and_the_head_is_not(bloom: Path, how: str, kind: type) -> None:
    model = load(bloom, how)
    block = model.transformer.h[0]
    assert type(block.self_attention.query_key_value) is kind
    assert type(block.mlp.dense_h_to_4h) is kind
    assert type(model.get_output_embeddings()) is torch.nn.Linear
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_nf4_keeps_its_gradients_after_an_evaluation(llama: Path) -> None:
    model = load(llama, "nf4")
    embedded = torch.randn(1, 6, 64, requires_grad=True)

    def gradient() -> torch.Tensor:
        model.train()
        model(inputs_embeds=embedded).logits.sum().backward()
        assert embedded.grad is not None
        found, embedded.grad = embedded.grad.clone(), None
        return found

    before = gradient()
    model.eval()
    with torch.inference_mode():
        model(input_ids=torch.tensor([[5, 6, 7]]))
    assert torch.equal(gradient(), before)


def test_a_tokenizer_without_a_pad_token_gets_one(llama: Path, bloom: Path) -> None:
    assert "pad_token" not in json.loads((llama / "tokenizer_config.json").read_text())
    tokenizer = quantize.load_tokenizer(Base(model=str(llama)))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    assert quantize.load_tokenizer(Base(model=str(bloom))).pad_token == "<pad>"


def test_pickled_weights_are_refused_unread(llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    shutil.copytree(llama, folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(InvalidInputError, match=r"no weights in safetensors \(none\)"):
        quantize.check_local(str(folder))
    (folder / "pytorch_model.bin").write_bytes(b"not even a pickle")
    with pytest.raises(InvalidInputError, match=r"only pytorch_model.bin, and pickles are not read"):
        load(folder, "none")


def test_a_model_s_own_code_is_never_run(llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "with-code"
    shutil.copytree(llama, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'was_run')!r}, 'w')")
    with pytest.raises(InvalidInputError, match="cannot be read"):
        load(folder, "none")
    assert not (tmp_path / "was_run").exists()


def test_damaged_files_are_refused_and_weights_never_made_up(llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(llama, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4}))
    with pytest.raises(
        InvalidInputError, match="lack .* tensors that the model.s config asks for, such as model.layers.2"
    ):
        load(folder, "none")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes((llama / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(InvalidInputError, match="cannot be read"):
        load(folder, "none")
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(InvalidInputError, match="tokenizer of .* cannot be read"):
        quantize.load_tokenizer(Base(model=str(folder)))
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + b"garbage" * 100)
    with pytest.raises(InvalidInputError, match=r"bad.gguf cannot be read"):
        quantize.resolve_weights(Base(model=str(tmp_path / "bad.gguf")))


def test_generation_settings_of_the_base_model_are_not_inherited(llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "penalised"
    shutil.copytree(llama, folder)
    (folder / "generation_config.json").write_text(json.dumps({"repetition_penalty": 5.0, "do_sample": True}))
    assert load(folder, "none").generation_config.repetition_penalty in (None, 1.0)


@pytest.mark.parametrize("content", [None, b"GG"])
def test_what_is_no_model_is_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "model.gguf"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InvalidInputError, match="model.gguf"):
        quantize.check_local(str(path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InvalidInputError, match="has no config.json"):
        quantize.check_local(str(tmp_path / "empty"))
