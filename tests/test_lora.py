"""Only adapters are trainable, in fp32 and on the right modules, and a saved adapter can be loaded."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import peft
import pytest
import torch
from conftest import CPU
from peft.tuners.lora import LoraLayer
from transformers import BloomConfig, BloomForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from job.freeze import freeze
from job.lora import add_adapters, count_parameters, digest, save_adapter
from job.quantize import load_model, load_tokenizer
from job.settings import Base, Lora


def base(folder: Path, quantize: str = "none") -> PreTrainedModel:
    model = load_model(Base.model_validate({"model": str(folder), "quantize": quantize}), CPU)
    freeze(model)
    return model


def test_bloomz_560m_has_the_number_of_parameters_of_the_recipe() -> None:
    # bigscience/bloomz-560m's config.json; on the meta device the real shape takes no memory
    config = BloomConfig(vocab_size=250_880, hidden_size=1024, n_layer=24, n_head=16)
    with torch.device("meta"):
        model = BloomForCausalLM(config)
        freeze(model)
        adapted = add_adapters(model, Lora(), seed=42)
    expected = "trainable params: 1,572,864 || all params: 560,787,456 || trainable%: 0.2805"
    assert str(count_parameters(adapted)) == expected


@pytest.mark.parametrize("quantize", ["int8", "nf4", "none"])
def test_only_adapters_are_trainable_and_they_are_fp32(bloom: Path, quantize: str) -> None:
    model = add_adapters(base(bloom, quantize), Lora(), seed=42)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trainable
    assert all("lora_" in name for name in trainable)
    assert all(parameter.dtype == torch.float32 for parameter in trainable.values())
    assert count_parameters(model).total == count_parameters(add_adapters(base(bloom), Lora(), seed=42)).total


@pytest.mark.parametrize(
    ("architecture", "targets", "adapted"),
    [
        ("bloom", None, {"query_key_value"}),
        ("llama", None, {"q_proj", "v_proj"}),
        ("llama", ("q_proj", "up_proj"), {"q_proj", "up_proj"}),
        ("bloom", ("all-linear",), {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}),
    ],
)
def test_adapters_are_on_the_target_modules_only(
    request: pytest.FixtureRequest, architecture: str, targets: tuple[str, ...] | None, adapted: set[str]
) -> None:
    model = add_adapters(base(request.getfixturevalue(architecture)), Lora(targets=targets), seed=42)
    names = {name.split(".lora_A")[0].rpartition(".")[2] for name, _ in model.named_parameters() if "lora_A" in name}
    assert names == adapted


def test_the_seed_determines_the_initial_adapters(llama: Path) -> None:
    def initial_weight(seed: int) -> torch.Tensor:
        model = add_adapters(base(llama), Lora(), seed=seed)
        return next(p for name, p in model.named_parameters() if "lora_A" in name)

    assert torch.equal(initial_weight(1), initial_weight(1))
    assert not torch.equal(initial_weight(1), initial_weight(2))


def test_a_base_model_from_the_hub_cache_is_saved_with_its_hub_name(llama: Path, tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = tmp_path / "hub" / "models--tiny--llama" / "snapshots" / commit
    shutil.copytree(llama, snapshot)
    settings = Base(model=str(snapshot))
    save_adapter(add_adapters(base(snapshot), Lora(), seed=1), load_tokenizer(settings), tmp_path / "a", settings)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("tiny/llama", commit)


def test_an_adapter_is_saved_with_its_tokenizer_and_base_model(llama: Path, tmp_path: Path) -> None:
    model, tokenizer = add_adapters(base(llama), Lora(), seed=42), load_tokenizer(Base(model=str(llama)))
    save_adapter(model, tokenizer, tmp_path / "adapter", Base(model="owner/name", revision="abc"))
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("owner/name", "abc")
    assert (tmp_path / "adapter" / "tokenizer.json").is_file()


def test_the_digest_depends_on_the_adapters_alone(llama: Path) -> None:
    model = add_adapters(base(llama), Lora(), seed=42)
    before = digest(model)
    assert digest(add_adapters(base(llama), Lora(), seed=42)) == before
    frozen, trainable = (
        next(parameter for parameter in model.parameters() if parameter.requires_grad == trained)
        for trained in (False, True)
    )
    frozen.data += 1
    assert digest(model) == before
    trainable.data += 1
    assert digest(model) != before


def test_settings_of_peft_are_handed_on(llama: Path) -> None:
    plain = add_adapters(base(llama), Lora(), seed=42)
    settings = Lora(r=4, use_rslora=True, use_dora=True, init="gaussian")
    model = add_adapters(base(llama), settings, seed=42)
    config = model.peft_config["default"]
    assert (config.use_rslora, config.use_dora, config.init_lora_weights) == (True, True, "gaussian")  # type: ignore[attr-defined]
    layer = next(module for module in model.modules() if isinstance(module, LoraLayer))
    assert layer.scaling["default"] == 32 / 4**0.5
    assert count_parameters(model).trainable > count_parameters(plain).trainable / 4, "magnitudes of DoRA"
    spread = torch.cat([p.flatten() for name, p in model.named_parameters() if "lora_A" in name]).std()
    assert 0.2 < spread < 0.3, "normal, with a standard deviation of 1 / r"


def test_gpt2_s_transposed_layers_are_adapted_without_a_warning() -> None:
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = add_adapters(GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=1, n_head=4)), Lora(), seed=42)
    assert count_parameters(model).trainable == 16 * 64 + 16 * 192


def test_a_reloaded_adapter_gives_the_same_logits(llama: Path, tmp_path: Path) -> None:
    model = add_adapters(base(llama), Lora(), seed=42)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter.data)
    settings = Base(model=str(llama))
    save_adapter(model, load_tokenizer(settings), tmp_path / "adapter", settings)
    reloaded = peft.PeftModel.from_pretrained(base(llama), str(tmp_path / "adapter"))
    ids = torch.tensor([[5, 6, 7, 8]])
    assert torch.equal(reloaded.eval()(input_ids=ids).logits, model.eval()(input_ids=ids).logits)
