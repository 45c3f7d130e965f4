"""Base models are found, downloaded or converted, and refused in one sentence if their files are wrong."""

from __future__ import annotations

import shutil
from pathlib import Path

import peft
import pytest
from conftest import CPU, HF_HOME, write_gguf
from transformers import LlamaForCausalLM

from job import quantize
from job.errors import InvalidInputError
from job.hub import weights
from job.settings import Base


def test_pickled_weights_are_refused_and_not_read(llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    shutil.copytree(llama, folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(InvalidInputError, match=r"no weights in safetensors \(none\)"):
        weights.check_local(str(folder))
    (folder / "pytorch_model.bin").write_bytes(b"not even a pickle")
    with pytest.raises(InvalidInputError, match=r"only pytorch_model.bin, and pickles are not read"):
        quantize.load_model(Base(model=str(folder), quantize="none"), CPU)


def test_a_folder_with_an_adapter_is_refused(llama: Path, tmp_path: Path) -> None:
    copied_llama = shutil.copytree(llama, tmp_path / "copied-llama")
    model = peft.get_peft_model(LlamaForCausalLM.from_pretrained(llama), peft.LoraConfig(task_type="CAUSAL_LM"))
    model.save_pretrained(str(copied_llama))
    model.save_pretrained(str(tmp_path / "adapter"))
    for folder in (copied_llama, tmp_path / "adapter"):
        with pytest.raises(InvalidInputError, match=f"adapter in it .* to its base model, {llama}"):
            weights.check_local(str(folder))


def test_what_a_library_says_is_shortened_and_never_advises_to_run_code() -> None:
    long = f"The checkpoint {'x' * 50} is unknown. Please pass `trust_remote_code=True` to run it. {'It failed. ' * 99}"
    short = weights.shorten(long)
    assert short.startswith("The checkpoint x")
    assert len(short) <= weights.MAX_REASON
    assert "remote_code" not in short
    assert len(weights.shorten("y" * 5000)) == weights.MAX_REASON
    assert weights.shorten("Set trust_remote_code=True.") == "it needs code from its repository, which is not run"


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="absent.gguf does not exist"):
        weights.check_local(str(tmp_path / "absent.gguf"))
    (tmp_path / "model.gguf").write_bytes(b"GG")
    with pytest.raises(InvalidInputError, match="model.gguf is not a GGUF file"):
        weights.check_local(str(tmp_path / "model.gguf"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InvalidInputError, match="has no config.json"):
        weights.check_local(str(tmp_path / "empty"))


def test_a_gguf_file_is_converted_once(gguf_model: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = Base(model=str(gguf_model), quantize="none")
    folder = weights.resolve_weights(settings)
    assert weights.resolve_weights(settings) == folder
    assert [record.message for record in caplog.records if "converting" in record.message] == [
        f"converting {gguf_model.name} to {folder}; later runs reuse the folder"
    ]
    model, tokenizer = quantize.load_model(settings, CPU), quantize.load_tokenizer(settings)
    assert model.config.num_hidden_layers == 1
    assert model.get_input_embeddings().weight[3].tolist() == [3.0] * 64
    assert tokenizer.decode(tokenizer("abc").input_ids) == "abc"


def test_a_damaged_gguf_file_is_refused_and_no_folder_is_left(gguf_model: Path) -> None:
    damaged = gguf_model.with_name("damaged.gguf")
    damaged.write_bytes(gguf_model.read_bytes()[:2000])
    with pytest.raises(InvalidInputError, match=r"damaged.gguf cannot be read: .* set TAGGER_BASE_MODEL"):
        weights.resolve_weights(Base(model=str(damaged)))
    assert not list(Path(HF_HOME, "tagger-job").glob("damaged-*"))


def test_missing_weights_in_a_gguf_file_are_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "incomplete.gguf", drop="blk.0.attn_q.weight")
    with pytest.raises(InvalidInputError, match="lack 1 tensors .* such as model.layers.0.self_attn.q_proj.weight"):
        weights.resolve_weights(Base(model=str(tmp_path / "incomplete.gguf")))
