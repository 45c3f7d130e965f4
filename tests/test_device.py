"""A machine without a usable GPU says why, and is used only for what it can do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import CPU, make_settings

from job.errors import InvalidInputError
from job.estimate import CPU_PARAMETERS, MemoryEstimate, cpu_problems
from job.system import device
from job.system.device import ComputeSpec, gpu_unavailable_reason

PROPRIETARY = (
    "NVRM version: NVIDIA UNIX x86_64 Kernel Module  {}  Tue Mar  5 22:23:56 UTC 2024\nGCC version:  gcc 11.4.0"
)
OPEN = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {}  Release Build  (builder@host)\nGCC version: 13.2"


@pytest.fixture
def gpu_box(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """A machine with a GPU, a driver that is new enough and a CUDA build, on which PyTorch still sees no GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for name in ("CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    driver, control = tmp_path / "version", tmp_path / "nvidiactl"
    driver.write_text(OPEN.format("580.65.06"))
    control.touch()
    monkeypatch.setattr(device, "DRIVER_VERSION", driver)
    monkeypatch.setattr(device, "NVIDIA_CTL", control)
    return monkeypatch


@pytest.mark.parametrize("text", [PROPRIETARY, OPEN])
def test_a_driver_that_is_too_old_is_named_with_the_one_that_is_needed(gpu_box: pytest.MonkeyPatch, text: str) -> None:
    device.DRIVER_VERSION.write_text(text.format("550.54.15"))
    assert gpu_unavailable_reason() == (
        "the NVIDIA driver is 550.54.15 and CUDA 13.0 needs 580 or newer; update the driver of the machine"
    )
    gpu_box.setattr(torch.version, "cuda", "12.6")
    assert "needs" not in str(gpu_unavailable_reason())


@pytest.mark.parametrize(("name", "value"), [("CUDA_VISIBLE_DEVICES", ""), ("NVIDIA_VISIBLE_DEVICES", "void")])
def test_hidden_gpus_are_said_to_be_hidden(gpu_box: pytest.MonkeyPatch, name: str, value: str) -> None:
    gpu_box.setenv(name, value)
    assert gpu_unavailable_reason() == f"{name}={value} hides every GPU of this machine (driver 580.65.06); unset it"


def test_a_container_without_its_gpu_a_build_without_cuda_and_a_machine_without_a_driver_are_told_apart(
    gpu_box: pytest.MonkeyPatch,
) -> None:
    assert "although there is a driver (580.65.06); see what nvidia-smi says" in str(gpu_unavailable_reason())
    device.NVIDIA_CTL.unlink()
    assert "no GPU is given to this container; start it with `docker run --gpus all`" in str(gpu_unavailable_reason())
    gpu_box.setattr(torch.version, "cuda", None)
    assert "is a build without CUDA; install the CUDA build" in str(gpu_unavailable_reason())
    device.DRIVER_VERSION.unlink()
    assert "this machine has no NVIDIA driver" in str(gpu_unavailable_reason())


def test_a_gpu_that_can_be_used_lacks_nothing(gpu_box: pytest.MonkeyPatch) -> None:
    gpu_box.setattr(torch.cuda, "is_available", lambda: True)
    assert gpu_unavailable_reason() is None


def test_a_gpu_that_was_asked_for_and_is_not_there_is_refused_and_auto_takes_the_cpu(
    gpu_box: pytest.MonkeyPatch,
) -> None:
    device.DRIVER_VERSION.write_text(PROPRIETARY.format("550.54.15"))
    with pytest.raises(
        InvalidInputError, match=r"=cuda, but the NVIDIA driver is 550.54.15 .* or set TAGGER_RUN_DEVICE=cpu"
    ):
        ComputeSpec.resolve("cuda", "auto")
    assert ComputeSpec.resolve("auto", "auto") == CPU


@pytest.mark.parametrize(
    ("parameters", "asked", "refused"),
    [(559_214_592, "auto", True), (134_515_008, "auto", False), (559_214_592, "cpu", False)],
    ids=["bloomz-560m", "SmolLM2-135M", "asked for"],
)
def test_auto_trains_on_a_cpu_only_what_is_small(
    gpu_box: pytest.MonkeyPatch, tmp_path: Path, parameters: int, asked: str, refused: bool
) -> None:
    need = MemoryEstimate(parameters, weights=0, adapters=0, activations=0, logits=0, disk=0)
    settings = make_settings(Path("a/base"), tmp_path, run={"device": asked})
    device.DRIVER_VERSION.unlink()
    problems = cpu_problems(need, settings, CPU)
    assert bool(problems) == refused
    if refused:
        assert problems[0].startswith("a/base has 559 million parameters, TAGGER_RUN_DEVICE=auto trains at most 250 ")
        assert problems[0].endswith("set TAGGER_RUN_DEVICE=cpu to train on the CPU all the same")
    assert cpu_problems(need, settings, ComputeSpec(torch.device("cuda"), "bf16")) == []


def test_the_setting_says_the_limit() -> None:
    from job.settings import Run

    said = str(Run.model_fields["device"].description)
    assert f"at most {CPU_PARAMETERS // 10**6} million parameters" in said
