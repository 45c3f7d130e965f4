"""Adapters are put on layers where they have an effect, and a refused target comes with a hint that is accepted."""

from __future__ import annotations

import re

import pytest
import torch
import zoo
from transformers import AutoModelForCausalLM, PreTrainedModel

from job.errors import InvalidInputError
from job.lora import add_adapters
from job.settings import Lora
from job.training.targets import choose_targets


def model_of(name: str, **changes: object) -> PreTrainedModel:
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(zoo.config(name, **changes))
    return model


@pytest.mark.parametrize(
    ("name", "modules"),
    [
        ("llama", ["q_proj", "v_proj"]),
        ("phi3", ["down_proj", "gate_up_proj", "o_proj", "qkv_proj"]),
        ("smollm3", ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]),
        ("qwen3_moe", ["k_proj", "o_proj", "q_proj", "v_proj"]),  # not what peft turns into experts
        ("mamba", ["in_proj"]),  # the kernels read the other weights without calling their layers
        ("jamba", ["down_proj", "gate_proj", "in_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]),
        ("bart", ["self_attn.q_proj", "self_attn.v_proj"]),
        ("ctrl", ["2", "Wk", "Wq", "Wv", "dense", "ffn.0"]),  # "0" is a block too
    ],
)
def test_without_a_setting_peft_s_defaults_or_all_linear_layers_are_adapted(name: str, modules: list[str]) -> None:
    assert choose_targets(model_of(name), Lora()).modules == modules


def test_targets_are_explained_where_peft_has_no_defaults() -> None:
    assert choose_targets(model_of("llama"), Lora()).note == ""
    note = choose_targets(model_of("qwen3_moe"), Lora()).note
    assert note == (
        "peft has no default targets for qwen3_moe; adapters are on all linear layers except the experts, which need "
        "TAGGER_LORA_TARGETS=all-linear and TAGGER_LORA_DROPOUT=0: k_proj, o_proj, q_proj, v_proj"
    )


def test_attention_to_an_encoder_that_is_never_computed_has_no_adapters() -> None:
    model = add_adapters(model_of("bart"), Lora(targets=("q_proj", "fc1")), seed=0)
    adapted = {name for name, _ in model.named_parameters() if "lora_A" in name}
    assert len(adapted) == 4
    assert not [name for name in adapted if "encoder_attn" in name]


@pytest.mark.parametrize(
    ("name", "targets", "why"),
    [
        ("llama", ("q_proj", "query_key_value"), "the model has no module named query_key_value"),
        ("llama", ("input_layernorm",), "input_layernorm is no linear layer that the forward pass calls"),
        ("jamba", ("dt_proj",), "dt_proj is no linear layer that the forward pass calls"),
        ("mixtral", ("w1",), "the model has no module named w1"),
        ("deepseek_v3", ("o_proj", "up_proj"), "peft takes up_proj for a former name of the experts"),
        ("mixtral", ("gate_up_proj",), "adapters on experts (gate_up_proj) need TAGGER_LORA_DROPOUT=0; set it"),
        ("mixtral", ("all-linear",), "need TAGGER_LORA_DROPOUT=0; set it"),
    ],
)
def test_a_target_that_cannot_be_adapted_is_refused_with_others(name: str, targets: tuple[str, ...], why: str) -> None:
    model = model_of(name, tie_word_embeddings=True)
    with pytest.raises(InvalidInputError) as refused:
        choose_targets(model, Lora(targets=targets))
    message = str(refused.value)
    assert message.startswith("TAGGER_LORA_TARGETS: ")
    assert why in message
    assert len(message) <= 300
    if "choose" in message:
        hinted = tuple(re.split(", ", message.rpartition(" from ")[2]))
        assert choose_targets(model, Lora(targets=hinted)).modules == list(hinted), "a hint must be accepted"


def test_an_untied_head_can_have_an_adapter() -> None:
    assert choose_targets(model_of("llama", tie_word_embeddings=False), Lora(targets=("lm_head",))).modules == [
        "lm_head"
    ]


@pytest.mark.parametrize("targets", [("gate_up_proj", "down_proj", "q_proj"), ("gate_up_proj",), ("all-linear",)])
def test_experts_have_adapters_without_dropout_but_no_dora(targets: tuple[str, ...]) -> None:
    model = add_adapters(model_of("mixtral"), Lora(targets=targets, dropout=0), seed=0)
    assert any("experts" in name for name, p in model.named_parameters() if p.requires_grad)
    with pytest.raises(InvalidInputError, match="need TAGGER_LORA_USE_DORA=false; set it, or choose from"):
        choose_targets(model_of("mixtral"), Lora(targets=targets, dropout=0, use_dora=True))
