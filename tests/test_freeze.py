"""Freezing leaves nothing trainable, converts 1-D parameters to fp32, and changes no names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import CPU
from transformers import AutoModelForCausalLM

from job.freeze import freeze
from job.quantize import load_model
from job.settings import Base


@pytest.mark.parametrize("architecture", ["bloom", "llama"])
def test_all_parameters_are_frozen_and_the_1d_ones_fp32(request: pytest.FixtureRequest, architecture: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(request.getfixturevalue(architecture), dtype=torch.bfloat16)
    names = [name for name, _ in model.named_parameters()]
    modules = [name for name, _ in model.named_modules()]
    freeze(model)
    for name, parameter in model.named_parameters():
        assert not parameter.requires_grad, name
        assert parameter.dtype == (torch.float32 if parameter.ndim == 1 else torch.bfloat16), name
    assert [name for name, _ in model.named_parameters()] == names
    assert [name for name, _ in model.named_modules()] == modules


def test_int8_weights_stay_int8(bloom: Path) -> None:
    model = load_model(Base(model=str(bloom)), CPU)
    freeze(model)
    assert model.transformer.h[0].mlp.dense_h_to_4h.weight.dtype == torch.int8
    assert model.transformer.h[0].mlp.dense_h_to_4h.bias.dtype == torch.float32


def test_logits_are_fp32(llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.bfloat16)
    freeze(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(input_ids=torch.tensor([[5, 6, 7]])).logits.dtype == torch.float32
