"""A packed row gives each text the logits that it has alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from job.training.packing import PackedAttention

LENGTHS = [3, 4, 4, 9, 30, 61]


@pytest.fixture(params=["bloom", "llama", "qwen2"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    if request.param == "qwen2":
        torch.manual_seed(0)
        shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
        return Qwen2ForCausalLM(Qwen2Config(vocab_size=600, num_key_value_heads=2, **shape)).eval()
    return AutoModelForCausalLM.from_pretrained(request.getfixturevalue(request.param)).eval()


def inputs(model: PreTrainedModel) -> tuple[list[torch.Tensor], torch.Tensor, dict[str, torch.Tensor]]:
    texts = [torch.randint(5, 500, (n,), generator=torch.Generator().manual_seed(n)) for n in LENGTHS]
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    return texts, torch.cat(texts)[None], {"position_ids": positions}


def test_packed_texts_have_the_logits_that_each_has_alone(model: PreTrainedModel) -> None:
    texts, row, positions = inputs(model)
    alone = torch.cat([model(input_ids=text[None], use_cache=False).logits[0] for text in texts])
    packing = PackedAttention(model)
    with packing.installed():
        packing.set_sequence_lengths(LENGTHS, torch.device("cpu"))
        packed = model(input_ids=row, use_cache=False, **positions).logits[0]
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-5)


def test_the_model_s_own_attention_is_restored(model: PreTrainedModel) -> None:
    _, row, _ = inputs(model)
    before = model(input_ids=row, use_cache=False).logits
    packing = PackedAttention(model)
    with packing.installed():
        packing.set_sequence_lengths(LENGTHS, torch.device("cpu"))
    assert torch.equal(model(input_ids=row, use_cache=False).logits, before)


def test_packed_alibi_is_precise_in_bf16(bloom: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(bloom, dtype=torch.bfloat16).eval()
    texts, row, positions = inputs(model)
    packing = PackedAttention(model)
    with packing.installed():
        packing.set_sequence_lengths(LENGTHS, torch.device("cpu"))
        packed = model(input_ids=row, use_cache=False, **positions).logits[0]
    alone = torch.cat([model(input_ids=text[None], use_cache=False).logits[0] for text in texts])
    torch.testing.assert_close(packed, alone, rtol=0.1, atol=0.1)


def test_unsupported_architectures_are_not_packed() -> None:
    assert not PackedAttention.supports(GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=20)))
