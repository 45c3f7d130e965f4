"""The base model is read from safetensors or GGUF alone, quantized as set, and still trainable."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from conftest import CPU, HF_HOME, write_gguf
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


def test_nf4_has_the_same_gradients_after_an_evaluation(llama: Path) -> None:
    model = load(llama, "nf4")
    embedded = torch.randn(1, 6, 64, requires_grad=True)

    def gradient() -> torch.Tensor:
        model.train()
        model(inputs_embeds=embedded).logits.sum().backward()
        assert embedded.grad is not None
        value, embedded.grad = embedded.grad.clone(), None
        return value

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


def test_pickled_weights_are_refused_and_not_read(llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    shutil.copytree(llama, folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(InvalidInputError, match=r"no weights in safetensors \(none\)"):
        quantize.check_local(str(folder))
    (folder / "pytorch_model.bin").write_bytes(b"not even a pickle")
    with pytest.raises(InvalidInputError, match=r"only pytorch_model.bin, and pickles are not read"):
        load(folder, "none")


def test_code_in_a_model_folder_is_never_run(llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "with-code"
    shutil.copytree(llama, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'was_run')!r}, 'w')")
    with pytest.raises(InvalidInputError, match="cannot be read"):
        load(folder, "none")
    assert not (tmp_path / "was_run").exists()


@pytest.fixture
def copied_llama(llama: Path, tmp_path: Path) -> Path:
    return shutil.copytree(llama, tmp_path / "copied-llama")


def change_config(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def truncate(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def test_missing_weights_are_refused_and_never_made_up(copied_llama: Path) -> None:
    change_config(copied_llama, num_hidden_layers=4)
    with pytest.raises(InvalidInputError, match="lack 18 tensors that config.json requires, such as model.lay"):
        load(copied_llama, "none")


def test_weights_of_another_shape_are_refused(copied_llama: Path) -> None:
    change_config(copied_llama, intermediate_size=96)
    with pytest.raises(
        InvalidInputError, match=r"6 tensors do not have the shape .* \[64, 128\] instead of \[64, 96\]"
    ):
        load(copied_llama, "none")


@pytest.mark.parametrize("size", [0, 4, 1000, -1])
def test_truncated_weights_are_refused(copied_llama: Path, size: int) -> None:
    truncate(copied_llama / "model.safetensors", size)
    with pytest.raises(InvalidInputError, match="the model of .* cannot be read"):
        load(copied_llama, "none")


def test_a_truncated_config_is_refused_by_every_loader(copied_llama: Path) -> None:
    truncate(copied_llama / "config.json", 100)
    base = Base(model=str(copied_llama))
    for loader in (quantize.load_tokenizer, quantize.meta_model, lambda base: quantize.load_model(base, CPU)):
        with pytest.raises(InvalidInputError, match="cannot be read: config.json is not JSON .* Set TAGGER_BASE_MODEL"):
            loader(base)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "own"}, "does not recognize this architecture"),
        ({"hidden_size": "64"}, "Field 'hidden_size' expected int, got str"),
        ({"hidden_act": "own"}, "hidden_act is 'own', which transformers"),
        ({"rope_parameters": {"rope_type": "own", "rope_theta": 1.0}}, "rope_type is 'own', which transformers"),
    ],
)
def test_a_config_that_transformers_does_not_know_is_refused(
    copied_llama: Path, values: dict[str, object], message: str
) -> None:
    change_config(copied_llama, **values)
    with pytest.raises(InvalidInputError, match=message):
        quantize.meta_model(Base(model=str(copied_llama)))
    with pytest.raises(InvalidInputError, match=message):
        load(copied_llama, "none")


def test_a_damaged_tokenizer_is_refused(copied_llama: Path) -> None:
    (copied_llama / "tokenizer.json").write_text("{}")
    with pytest.raises(InvalidInputError, match="tokenizer of .* cannot be read: tokenizer.json: added_tokens: Field"):
        quantize.load_tokenizer(Base(model=str(copied_llama)))


def test_a_missing_tokenizer_is_refused(copied_llama: Path) -> None:
    (copied_llama / "tokenizer.json").unlink()
    with pytest.raises(InvalidInputError, match="tokenizer of .* cannot be read"):
        quantize.load_tokenizer(Base(model=str(copied_llama)))


def test_a_defect_is_not_reported_as_a_damaged_file(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        @staticmethod
        def from_pretrained(*_: object, **__: object) -> None:
            raise TypeError("from_pretrained() got an unexpected keyword argument")

        from_config = from_pretrained

    monkeypatch.setattr("transformers.AutoModelForCausalLM", Broken)
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        load(llama, "none")
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        quantize.meta_model(Base(model=str(llama)))
    no_compute: Any = None
    with pytest.raises(AttributeError, match="'NoneType' object has no attribute 'dtype'"):
        quantize.load_model(Base(model=str(llama)), no_compute)


def test_generation_settings_of_the_base_model_are_ignored(llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "penalised"
    shutil.copytree(llama, folder)
    (folder / "generation_config.json").write_text(json.dumps({"repetition_penalty": 5.0, "do_sample": True}))
    assert load(folder, "none").generation_config.repetition_penalty in (None, 1.0)


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="absent.gguf does not exist"):
        quantize.check_local(str(tmp_path / "absent.gguf"))
    (tmp_path / "model.gguf").write_bytes(b"GG")
    with pytest.raises(InvalidInputError, match="model.gguf is not a GGUF file"):
        quantize.check_local(str(tmp_path / "model.gguf"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InvalidInputError, match="has no config.json"):
        quantize.check_local(str(tmp_path / "empty"))


def test_a_gguf_file_is_converted_once(gguf_model: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = Base(model=str(gguf_model), quantize="none")
    folder = quantize.resolve_weights(settings)
    assert quantize.resolve_weights(settings) == folder
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
    with pytest.raises(InvalidInputError, match=r"damaged.gguf cannot be read: .* Set TAGGER_BASE_MODEL"):
        quantize.resolve_weights(Base(model=str(damaged)))
    assert not list(Path(HF_HOME, "tagger-job").glob("damaged-*"))


def test_missing_weights_in_a_gguf_file_are_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "incomplete.gguf", drop="blk.0.attn_q.weight")
    with pytest.raises(InvalidInputError, match="lack 1 tensors .* such as model.layers.0.self_attn.q_proj.weight"):
        quantize.resolve_weights(Base(model=str(tmp_path / "incomplete.gguf")))
