"""Memory and disk are estimated from the shapes of the model and of the largest micro-batch."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import psutil
import pytest
import torch
import zoo
from conftest import CPU, make_settings

from job.errors import InvalidInputError
from job.estimate import MemoryEstimate, disk_problems, estimate, memory_problems
from job.lora import add_adapters
from job.quantize import load_model
from job.settings import Base, Lora, Train
from job.system.device import ComputeSpec, _cgroup_memory_left
from job.training.memory_budget import plan_batches
from job.types import EncodedExample

LONGEST = [EncodedExample([7] * 40, [-100] * 30 + [7] * 10), EncodedExample([7] * 25, [-100] * 20 + [7] * 5)]


@pytest.mark.parametrize("quantize", ["int8", "none"])
@pytest.mark.parametrize("architecture", ["bloom", "llama"])
def test_weights_and_adapters_match_a_loaded_model(
    request: pytest.FixtureRequest, tmp_path: Path, architecture: str, quantize: str
) -> None:
    settings = make_settings(request.getfixturevalue(architecture), tmp_path, base={"quantize": quantize})
    model = load_model(settings.base, CPU)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    weight_bytes = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    adapted = add_adapters(model, Lora(), seed=1)
    trainable = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    need = estimate(settings, CPU, LONGEST)
    assert need.weights == weight_bytes
    assert need.parameters == parameters
    assert need.adapters == 24 * trainable
    averaged = estimate(make_settings(settings.base.model, tmp_path, train={"weight_averaging": 0.5}), CPU, LONGEST)
    assert averaged.adapters - need.adapters == 4 * trainable
    assert averaged.disk - need.disk == 8 * trainable, "averaged weights in each of two checkpoints"


def test_logits_are_estimated_for_labelled_positions_only(llama: Path, tmp_path: Path) -> None:
    assert estimate(make_settings(llama, tmp_path), CPU, LONGEST).logits == 8 * 15 * 600


def test_gradient_checkpointing_reduces_activations_alone(llama: Path, tmp_path: Path) -> None:
    off = estimate(make_settings(llama, tmp_path, train={"gradient_checkpointing": "off"}), CPU, LONGEST)
    on = estimate(make_settings(llama, tmp_path, train={"gradient_checkpointing": "on"}), CPU, LONGEST)
    assert on.activations < off.activations
    assert dataclasses.replace(on, activations=0) == dataclasses.replace(off, activations=0)


class Small(ComputeSpec):
    """A CPU with `free` bytes of free memory."""

    free = 0.0

    def free_memory(self) -> float:
        return self.free


@pytest.mark.parametrize(
    ("free", "checkpointing", "micro_batch_tokens", "expected"),
    [
        (2**30, "auto", None, (256, False)),
        (2**30, "on", None, (256, True)),
        (2**30, "auto", 100, (100, False)),
        (2e6, "auto", None, (122, False)),
        (5e5, "auto", None, (52, True)),
        (5e5, "off", None, (30, False)),
        (0, "auto", None, (1, True)),
    ],
)
def test_micro_batches_fit_into_free_memory(
    llama: Path, free: float, checkpointing: str, micro_batch_tokens: int | None, expected: tuple[int, bool]
) -> None:
    machine = Small(torch.device("cpu"), "fp32")
    object.__setattr__(machine, "free", free)
    settings = Train.model_validate({"gradient_checkpointing": checkpointing, "micro_batch_tokens": micro_batch_tokens})
    config = load_model(Base(model=str(llama), quantize="none"), CPU).config
    assert dataclasses.astuple(plan_batches(config, LONGEST, settings, machine, max_tokens=256)) == expected


def test_free_memory_respects_the_control_group(tmp_path: Path) -> None:
    assert 0 < CPU.free_memory() <= psutil.virtual_memory().total
    assert _cgroup_memory_left(tmp_path) == math.inf
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 400\nfile 300\n")
    assert _cgroup_memory_left(tmp_path) == math.inf
    (tmp_path / "memory.max").write_text("1000\n")
    assert _cgroup_memory_left(tmp_path) == 600


def test_a_disk_that_is_too_small_is_reported(tmp_path: Path) -> None:
    need = MemoryEstimate(parameters=0, weights=0, adapters=0, activations=0, logits=0, disk=2.0**60)
    [problem] = disk_problems(need, tmp_path / "runs" / "one")
    assert "GiB free; free some space, or set TAGGER_RUN_DIR" in problem
    assert disk_problems(dataclasses.replace(need, disk=1.0), tmp_path) == []
    assert memory_problems(need, CPU) == []


def test_dora_is_counted_and_refused_where_peft_cannot_compute_it(llama: Path, tmp_path: Path) -> None:
    settings = make_settings(llama, tmp_path, lora={"use_dora": True})
    magnitudes = (64 + 32) * 2  # of the outputs of q_proj and v_proj, in two layers
    plain = estimate(make_settings(llama, tmp_path), CPU, LONGEST)
    assert estimate(settings, CPU, LONGEST).adapters - plain.adapters == 24 * magnitudes
    settings = make_settings(llama, tmp_path, lora={"use_dora": True}, base={"model": str(llama), "quantize": "int8"})
    with pytest.raises(InvalidInputError, match="USE_DORA cannot be used with TAGGER_BASE_QUANTIZE=int8 on a CPU"):
        estimate(settings, CPU, LONGEST)


def test_recomputation_is_refused_where_transformers_cannot(tmp_path: Path) -> None:
    zoo.save_model("ctrl", tmp_path / "ctrl")

    def activations(setting: str) -> float:
        settings = make_settings(tmp_path / "ctrl", tmp_path, train={"gradient_checkpointing": setting})
        return estimate(settings, CPU, LONGEST).activations

    assert activations("auto") == activations("off")
    with pytest.raises(InvalidInputError, match="cannot recompute the activations of the architecture ctrl; use auto"):
        activations("on")


def test_processes_that_do_not_fit_together_into_memory_are_refused() -> None:
    machine = Small(torch.device("cpu"), "fp32")
    object.__setattr__(machine, "free", 4.0 * 2**30)
    need = MemoryEstimate(parameters=0, weights=1.5 * 2**30, adapters=0, activations=0, logits=0, disk=0)
    assert memory_problems(need, machine, 2) == []
    [problem] = memory_problems(need, machine, 3)
    assert problem.startswith("TAGGER_RUN_PROCESSES=3: each holds the base model and needs 1.5 GiB")
    assert problem.endswith("use at most 2")
    assert memory_problems(dataclasses.replace(need, weights=2.0**40), machine) == [], "one process may swap"
