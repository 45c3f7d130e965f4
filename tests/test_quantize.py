"""The base model is read from safetensors or GGUF alone, quantized as set, and still trainable."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from conftest import CPU
from hub import Hub, Repo
from safetensors.torch import load_file, save_file
from transformers import (
    BitsAndBytesConfig,
    DbrxConfig,
    FalconConfig,
    FalconForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    PreTrainedModel,
)

from job import quantize
from job.errors import InvalidInputError
from job.settings import Base
from job.system.device import ComputeSpec


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


def test_layers_that_transformers_does_not_quantize_are_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1, "vocab_size": 100}
    FalconForCausalLM(FalconConfig(**sizes)).save_pretrained(tmp_path)
    load(tmp_path, "int8")
    assert "no layer is in int8, because transformers does not quantize those of falcon" in caplog.text
    caplog.clear()
    load(tmp_path, "none")
    assert "no layer" not in caplog.text


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


def test_code_in_a_model_folder_is_never_run(llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "with-code"
    shutil.copytree(llama, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'was_run')!r}, 'w')")
    with pytest.raises(InvalidInputError, match="not have the architecture 'own', and code .* is never run") as error:
        load(folder, "none")
    assert "trust_remote_code" not in str(error.value)
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
        with pytest.raises(InvalidInputError, match="cannot be read: config.json is not JSON .* set TAGGER_BASE_MODEL"):
            loader(base)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "own"}, "does not have the architecture 'own'"),
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


def test_an_architecture_that_reads_settings_its_config_lacks_is_refused(copied_llama: Path) -> None:
    DbrxConfig(d_model=32, n_heads=4, n_layers=2, vocab_size=100).save_pretrained(copied_llama)
    with pytest.raises(InvalidInputError, match=r"cannot be trained: transformers .* cannot build .* dbrx.*rope_theta"):
        quantize.meta_model(Base(model=str(copied_llama)))


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


def make_bitsandbytes(llama: Path, folder: Path, kind: str) -> Path:
    """Save the tiny Llama as bitsandbytes does, with tokenizer."""
    shutil.copytree(llama, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = (
        BitsAndBytesConfig(load_in_8bit=True)
        if kind == "int8"
        else BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_compute_dtype=torch.float16)
    )
    LlamaForCausalLM.from_pretrained(llama, quantization_config=config, device_map={"": "cpu"}).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_bitsandbytes_checkpoint_of_the_configured_kind_is_used_as_it_is(
    llama: Path, tmp_path: Path, kind: str
) -> None:
    folder = make_bitsandbytes(llama, tmp_path / kind, kind)
    quantize.check_weights(Base.model_validate({"model": str(folder), "quantize": kind}))
    model, expected = load(folder, kind), load(llama, kind)
    ids = torch.tensor([[5, 6, 7, 8]])
    assert torch.equal(model(input_ids=ids).logits, expected(input_ids=ids).logits)
    if kind == "nf4":
        layer: Any = model.get_submodule("model.layers.0.mlp.up_proj")
        assert layer.compute_dtype == torch.float32, "the precision of the run, not that of the checkpoint"
    assert quantize.describe_weights(model) == {
        "architecture": "llama",
        "linear_layers": {kind: 14, "float32": 1},
        "quantized_in_checkpoint": True,
    }
    assert quantize.describe_weights(expected)["quantized_in_checkpoint"] is False


@pytest.mark.parametrize(
    ("kind", "configured", "advice"),
    [
        ("int8", "none", "TAGGER_BASE_QUANTIZE=int8, or"),
        ("int8", "nf4", "TAGGER_BASE_QUANTIZE=int8, or"),
        ("nf4", "int8", "TAGGER_BASE_QUANTIZE=nf4, or"),
        ("fp4", "nf4", "set TAGGER_BASE_MODEL to the unquantized original"),
    ],
)
def test_a_bitsandbytes_checkpoint_of_another_kind_is_refused(
    llama: Path, tmp_path: Path, kind: str, configured: str, advice: str
) -> None:
    folder = make_bitsandbytes(llama, tmp_path / kind, kind)
    for loader in (load, lambda folder, how: quantize.check_weights(Base(model=str(folder), quantize=how))):
        with pytest.raises(InvalidInputError, match=rf"quantized already \(bitsandbytes, {kind}\).*{advice}"):
            loader(folder, configured)


def test_a_quantization_that_only_config_json_has_is_ignored(
    copied_llama: Path, caplog: pytest.LogCaptureFixture
) -> None:
    change_config(copied_llama, quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    assert quantize.describe_weights(load(copied_llama, "nf4"))["linear_layers"] == {"nf4": 14, "float32": 1}
    assert quantize.describe_weights(load(copied_llama, "none"))["linear_layers"] == {"float32": 15}


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


UP = "model.layers.1.mlp.up_proj.weight"


def as_fp8(tensors: dict[str, torch.Tensor]) -> None:
    tensors[UP] = tensors[UP].to(torch.float8_e4m3fn)


def as_int8_codes(tensors: dict[str, torch.Tensor]) -> None:
    tensors[UP] = (tensors[UP] * 1000).to(torch.int8)


def as_codes_with_scale(tensors: dict[str, torch.Tensor]) -> None:
    tensors[UP] = (tensors[UP] * 1000).round()
    tensors[f"{UP}_scale"] = torch.ones(128, 1)


def as_gptq(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[UP]
    name = UP.removesuffix("weight")
    tensors |= {f"{name}qweight": torch.zeros(8, 128, dtype=torch.int32), f"{name}scales": torch.ones(1, 128).half()}


@pytest.mark.parametrize("how", ["none", "int8", "nf4"])
@pytest.mark.parametrize("change", [as_fp8, as_int8_codes, as_codes_with_scale, as_gptq])
def test_quantized_tensors_are_refused_also_if_no_config_describes_them(
    copied_llama: Path, change: Callable[[dict[str, torch.Tensor]], object], how: str
) -> None:
    change_tensors(copied_llama, change)
    for loader in (load, lambda folder, how: quantize.check_weights(Base(model=str(folder), quantize=how))):
        with pytest.raises(
            InvalidInputError, match=r"quantized \(tensors such as model.layers.1.mlp.up_proj.*original"
        ):
            loader(copied_llama, how)


def test_a_causal_mask_in_the_weights_is_no_quantized_tensor(tmp_path: Path) -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=60, n_embd=16, n_layer=1, n_head=2, n_positions=32))
    model.save_pretrained(tmp_path)
    change_tensors(
        tmp_path, lambda tensors: tensors.update({"transformer.h.0.attn.bias": torch.ones(32, 32, dtype=torch.uint8)})
    )
    quantize.check_weights(Base(model=str(tmp_path), quantize="none"))


@pytest.mark.parametrize("how", ["none", "int8", "nf4"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_refused_by_name(copied_llama: Path, how: str, value: float) -> None:
    change_tensors(copied_llama, lambda tensors: tensors[UP].view(-1)[5:7].fill_(value))
    with pytest.raises(InvalidInputError, match=f"2 of 8192 values of the tensor {UP} in model.safetensors are NaN or"):
        load(copied_llama, how)


def test_weights_too_large_for_the_precision_are_refused_by_name(copied_llama: Path) -> None:
    change_tensors(copied_llama, lambda tensors: tensors[UP].view(-1)[5].fill_(1e6))
    base = Base(model=str(copied_llama), quantize="none")
    load(copied_llama, "none")
    with pytest.raises(InvalidInputError, match=f"{UP} .* has values up to 1e\\+06, more than .*PRECISION=bf16"):
        quantize.load_model(base, ComputeSpec(torch.device("cpu"), "fp16"))
    with pytest.raises(InvalidInputError, match=f"{UP} .* has values up to 1e\\+06, .*TAGGER_BASE_QUANTIZE=nf4"):
        load(copied_llama, "int8")


def test_quantized_weights_of_another_shape_are_refused(llama: Path, tmp_path: Path) -> None:
    for kind in ("int8", "nf4"):
        folder = make_bitsandbytes(llama, tmp_path / kind, kind)
        change_config(folder, intermediate_size=96)
        with pytest.raises(InvalidInputError, match=r"_proj has the shape \[\d+, \d+\] instead of \[\d+, \d+\]"):
            load(folder, kind)


def test_a_missing_or_damaged_shard_is_refused_by_name(llama: Path, copied_llama: Path) -> None:
    (copied_llama / "model.safetensors").unlink()
    LlamaForCausalLM.from_pretrained(llama).save_pretrained(copied_llama, max_shard_size="150KB")
    shard = sorted(copied_llama.glob("model-*.safetensors"))[1]
    base = Base(model=str(copied_llama), quantize="none")
    quantize.check_weights(base)
    truncate(shard, -10)
    with pytest.raises(InvalidInputError, match=rf"{shard.name} is damaged or incomplete: it has \d+ bytes instead of"):
        quantize.check_weights(base)
    shard.unlink()
    with pytest.raises(InvalidInputError, match=f"{shard.name}, which model.safetensors.index.json lists, is missing"):
        load(copied_llama, "none")


def test_the_checks_of_a_model_on_the_hub_download_headers_only(llama: Path, loopback_hub: Hub) -> None:
    repo = loopback_hub.models["tiny/llama"] = Repo("tiny/llama")
    files = {path.name: path.read_bytes() for path in llama.iterdir()}
    repo.commit("main", "a model", files)
    quantize.check_weights(Base(model="tiny/llama", quantize="none"))
    assert loopback_hub.bytes_served["model.safetensors"] < len(files["model.safetensors"]) / 3
    config = json.dumps(json.loads(files["config.json"]) | {"intermediate_size": 96}).encode()
    repo.commit("main", "another config", {"config.json": config})
    with pytest.raises(InvalidInputError, match=r"6 tensors do not have the shape .*TAGGER_BASE_REVISION"):
        quantize.check_weights(Base(model="tiny/llama", quantize="none"))


def test_the_network_is_only_blamed_if_it_failed(llama: Path, loopback_hub: Hub) -> None:
    repo = loopback_hub.models["tiny/llama"] = Repo("tiny/llama")
    repo.commit("main", "no weights", {"config.json": b"{"})
    with pytest.raises(InvalidInputError) as damaged:
        quantize.load_tokenizer(Base(model="tiny/llama"))
    assert "network" not in str(damaged.value)
    with pytest.raises(InvalidInputError, match="check the network"):
        quantize.load_tokenizer(Base(model="tiny/absent"))


@pytest.mark.parametrize(
    ("name", "size"), [("model.safetensors", 4), ("model.safetensors", -1), ("tokenizer.json", 100)]
)
def test_a_truncated_file_in_the_cache_is_named_with_what_to_remove(
    llama: Path, tmp_path: Path, name: str, size: int
) -> None:
    cached = tmp_path / "hub" / "models--tiny--llama"
    snapshot = cached / "snapshots" / ("0" * 40)
    shutil.copytree(llama, snapshot)
    truncate(snapshot / name, size)

    def load_all(folder: Path) -> None:
        quantize.load_tokenizer(Base(model=str(folder)))
        load(folder, "none")

    with pytest.raises(InvalidInputError, match=rf"{name}.* remove {cached}: it is downloaded again"):
        load_all(snapshot)
    shutil.copytree(snapshot, tmp_path / "copied")
    with pytest.raises(InvalidInputError, match=rf"{name}.* set TAGGER_BASE_MODEL to a model whose files are complete"):
        load_all(tmp_path / "copied")
