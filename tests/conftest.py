"""Tiny models of the real architectures, and an environment without settings, logins or the real Hub."""

from __future__ import annotations

import atexit
import json
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hub

# huggingface_hub reads these variables when it is imported: a loopback server, an empty cache, and no login
SERVER = hub.Server()
HF_HOME = tempfile.mkdtemp(prefix="tagger-tests-")
atexit.register(shutil.rmtree, HF_HOME, ignore_errors=True)
os.environ.update(HF_ENDPOINT=SERVER.url, HF_HOME=HF_HOME, HF_TOKEN_PATH="/nowhere/token")
os.environ.update(HF_HUB_DISABLE_XET="1", HF_HUB_DISABLE_TELEMETRY="1", TQDM_DISABLE="1")
for name in ("HF_TOKEN", "HF_HUB_OFFLINE", *(name for name in os.environ if name.startswith("TAGGER_"))):
    os.environ.pop(name, None)
# a shell starts what runs in the background with SIGINT ignored, and the processes of the tests would inherit that
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import gguf
import numpy as np
import pytest
import s3
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import BloomConfig, BloomForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from job.runs.objects import open_objects
from job.runs.stored_run import StoredRun
from job.settings import Settings
from job.system import logging_setup
from job.system.device import ComputeSpec

SAYINGS = Path(__file__).parents[1] / "job" / "dataset" / "sayings.jsonl"
CPU = ComputeSpec(torch.device("cpu"), "fp32")
torch.set_num_threads(1)  # with tiny models, a second thread costs more time than it saves


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.chdir(tmp_path)
    SERVER.fresh()
    logging_setup.configure()
    yield
    # a call that replaced the environment must not reach the module's fixtures of a later file
    for name in [name for name in os.environ if name.startswith("TAGGER_")]:
        del os.environ[name]


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[s3.Store]:
    """An S3 server, whose failures are waited for briefly."""
    monkeypatch.setattr("job.runs.objects.RETRY_SECONDS", 1)
    monkeypatch.setattr("job.runs.store.FINAL_PAUSE_SECONDS", 0.0)
    with s3.serve() as (objects, variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        yield objects


@pytest.fixture(params=["s3", "file"])
def url(request: pytest.FixtureRequest, bucket: s3.Store, tmp_path: Path) -> str:
    return "s3://bucket/some/prefix" if request.param == "s3" else f"file://{tmp_path}/store"


@pytest.fixture
def stored_run(url: str) -> StoredRun:
    return StoredRun(open_objects(url), "run")


@pytest.fixture(scope="session")
def rows() -> list[dict[str, object]]:
    return [json.loads(line) for line in SAYINGS.read_text(encoding="utf-8").splitlines()]


def _tokenizer(splits: list[pre_tokenizers.PreTokenizer], texts: list[str], **special: str) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=list(special.values()), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


@pytest.fixture(scope="session")
def bloom_tokenizer(rows: list[dict[str, object]]) -> PreTrainedTokenizerFast:
    """Return a small tokenizer with the splitting rule of BLOOM, whose own vocabulary would have to be downloaded."""
    rule = pre_tokenizers.Split(Regex(r" ?[^(\s|[.,!?…。，、।۔،])]+"), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    texts = [f"{row['quote']} ->: {row['tags']}" for row in rows]
    return _tokenizer(
        [rule, byte_level], texts, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


@pytest.fixture(scope="session")
def llama_tokenizer(rows: list[dict[str, object]]) -> PreTrainedTokenizerFast:
    """Return a small tokenizer with the splitting rule of SmolLM2 (single digits, then GPT-2's) and no pad token."""
    return make_llama_tokenizer(rows)


def make_llama_tokenizer(rows: list[dict[str, object]]) -> PreTrainedTokenizerFast:
    splits = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    texts = [f"{row['quote']} ->: {row['tags']}" for row in rows]
    return _tokenizer(splits, texts, bos_token="<|im_start|>", eos_token="<|im_end|>")


@pytest.fixture(scope="session")
def bloom(tmp_path_factory: pytest.TempPathFactory, bloom_tokenizer: PreTrainedTokenizerFast) -> Path:
    torch.manual_seed(0)
    config = BloomConfig(
        vocab_size=len(bloom_tokenizer), hidden_size=64, n_layer=2, n_head=4, eos_token_id=2, pad_token_id=3
    )
    folder = tmp_path_factory.mktemp("models") / "tiny-bloom"
    BloomForCausalLM(config).save_pretrained(folder)
    bloom_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory, llama_tokenizer: PreTrainedTokenizerFast) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    make_llama(llama_tokenizer, folder)
    return folder


def make_llama(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="session")
def gguf_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path)
    return path


def write_gguf(path: Path, *, metadata: dict[str, Any] | None = None, drop: str | None = None) -> None:
    """Write a Llama of one layer with byte-level BPE; row i of its embedding holds the number i.

    `metadata` overrides fields, and `drop` names a field or tensor to leave out.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, "ab", "<|end|>"]
    fields: dict[str, Any] = {
        "llama.block_count": 1,
        "llama.context_length": 128,
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 96,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.vocab_size": len(tokens),
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * (len(tokens) - 1) + [3],
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.eos_token_id": len(tokens) - 1,
        **(metadata or {}),
    }
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in fields.items():
        if name == drop:
            continue
        if isinstance(value, list):
            writer.add_array(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        else:
            (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(name, value)
    shapes = {
        **{f"blk.0.{name}.weight": (64,) for name in ("attn_norm", "ffn_norm")},
        **{f"blk.0.{name}.weight": (64, 64) for name in ("attn_q", "attn_output")},
        **{f"blk.0.{name}.weight": (32, 64) for name in ("attn_k", "attn_v")},
        **{f"blk.0.{name}.weight": (96, 64) for name in ("ffn_gate", "ffn_up")},
        "blk.0.ffn_down.weight": (64, 96),
        "output_norm.weight": (64,),
    }
    tensors = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
    tensors["token_embd.weight"] = np.repeat(np.arange(len(tokens), dtype=np.float32)[:, None], 64, axis=1)
    for name, tensor in tensors.items():
        if name != drop:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def settings(llama: Path, tmp_path: Path) -> Settings:
    """Return the settings of a run that takes a second: the tiny Llama on 60 sayings."""
    return make_settings(llama, tmp_path)


def make_settings(model: Path, tmp_path: Path, **groups: dict[str, object]) -> Settings:
    values: dict[str, dict[str, object]] = {
        "base": {"model": str(model), "quantize": "none"},
        "data": {"dataset": str(SAYINGS), "limit": 60, "eval_size": 10, "max_length": 128},
        "train": {"max_steps": 4, "warmup_steps": 1, "logging_steps": 1, "save_steps": 2},
        "sample": {"prompts": ("a song about rain",), "max_new_tokens": 12},
        "run": {"dir": tmp_path / "runs", "device": "cpu"},
    }
    for group, overrides in groups.items():
        values[group] = {**values.get(group, {}), **overrides}
    return Settings.model_validate(values)


@pytest.fixture
def loopback_hub() -> hub.Hub:
    return SERVER.fresh()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest, so that no worker has one of them left when the others are done."""
    first = ["test_pipeline", "test_launcher", "test_retrain", "test_modal_app", "test_trainer", "test_streams"]
    items.sort(key=lambda item: first.index(item.path.stem) if item.path.stem in first else len(first))


def open_to_other_users(folder: Path) -> None:
    """Let other users into a temporary folder of a test, which only its owner may enter."""
    for parent in (folder, *folder.parents):
        if parent == Path(tempfile.gettempdir()):
            break
        parent.chmod(0o755)
