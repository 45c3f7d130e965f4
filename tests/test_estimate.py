"""The estimate of memory and disk follows from the shapes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from conftest import CPU, make_settings

from job.estimate import Need, disk_problems, estimate, memory_problems
from job.lora import add_adapters
from job.quantize import load_model
from job.results import Encoded
from job.settings import Lora

LONGEST = [Encoded([7] * 40, [-100] * 30 + [7] * 10), Encoded([7] * 25, [-100] * 20 + [7] * 5)]


@pytest.mark.parametrize("quantize", ["int8", "none"])
@pytest.mark.parametrize("architecture", ["bloom", "llama"])
def test_weights_and_adapters_are_what_a_loaded_model_holds(
    request: pytest.FixtureRequest, tmp_path: Path, architecture: str, quantize: str
) -> None:
    settings = make_settings(request.getfixturevalue(architecture), tmp_path, base={"quantize": quantize})
    model = load_model(settings.base, CPU)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    held = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    adapted = add_adapters(model, Lora(), seed=1)
    trainable = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    need = estimate(settings, CPU, LONGEST)
    assert need.weights == held
    assert need.parameters == parameters
    assert need.adapters == 16 * trainable


def test_logits_count_only_the_labelled_positions_and_recomputation_saves_activations(
    llama: Path, tmp_path: Path
) -> None:
    off = estimate(make_settings(llama, tmp_path, train={"checkpointing": "off"}), CPU, LONGEST)
    on = estimate(make_settings(llama, tmp_path, train={"checkpointing": "on"}), CPU, LONGEST)
    assert off.logits == 12 * 15 * 600
    assert on.activations < off.activations
    assert dataclasses.replace(on, activations=0) == dataclasses.replace(off, activations=0)


def test_a_disk_that_is_too_small_is_said_to_be(tmp_path: Path) -> None:
    need = Need(parameters=0, weights=0, adapters=0, activations=0, logits=0, disk=2.0**60)
    [problem] = disk_problems(need, tmp_path / "runs" / "one")
    assert "GiB free; make room, or set TAGGER_RUN_DIR" in problem
    assert disk_problems(dataclasses.replace(need, disk=1.0), tmp_path) == []
    assert memory_problems(need, CPU) == []
