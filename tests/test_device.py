"""The device and precision that a machine has, and why it has no usable GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import CPU, make_settings

from job.errors import InvalidInputError
from job.estimate import CPU_PARAMETERS, MemoryEstimate, cpu_problems
from job.settings import Run
from job.system import device
from job.system.device import (
    ComputeSpec,
    choose_device,
    choose_precision,
    count_processes,
    gpu_unavailable_reason,
    has_kernels,
)

KERNELS = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]
"""Those of PyTorch's build for CUDA 13."""
PROPRIETARY = (
    "NVRM version: NVIDIA UNIX x86_64 Kernel Module  {}  Tue Mar  5 22:23:56 UTC 2024\nGCC version:  gcc 11.4.0"
)
OPEN = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {}  Release Build  (builder@host)\nGCC version: 13.2"


@pytest.fixture
def unusable_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
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
def test_an_old_driver_is_named_with_the_version_needed(unusable_gpu: pytest.MonkeyPatch, text: str) -> None:
    device.DRIVER_VERSION.write_text(text.format("550.54.15"))
    assert gpu_unavailable_reason(advice=True) == (
        "the NVIDIA driver is 550.54.15 and CUDA 13.0 needs 580 or newer; update the machine's driver"
    )
    unusable_gpu.setattr(torch.version, "cuda", "12.6")
    assert "needs" not in str(gpu_unavailable_reason())


@pytest.mark.parametrize(("name", "value"), [("CUDA_VISIBLE_DEVICES", ""), ("NVIDIA_VISIBLE_DEVICES", "void")])
def test_a_variable_that_hides_the_gpus_is_named(unusable_gpu: pytest.MonkeyPatch, name: str, value: str) -> None:
    unusable_gpu.setenv(name, value)
    hidden = f"{name}={value} hides every GPU of this machine (driver 580.65.06)"
    assert gpu_unavailable_reason() == hidden
    assert gpu_unavailable_reason(advice=True) == f"{hidden}; unset it"


def test_every_reason_for_no_gpu_has_its_own_remedy(
    unusable_gpu: pytest.MonkeyPatch,
) -> None:
    assert "although there is a driver (580.65.06); run nvidia-smi" in str(gpu_unavailable_reason(advice=True))
    device.NVIDIA_CTL.unlink()
    assert "this container has no access to a GPU; start it with `docker run --gpus all`" in str(
        gpu_unavailable_reason(advice=True)
    )
    unusable_gpu.setattr(torch.version, "cuda", None)
    assert "is a build without CUDA; install the CUDA build" in str(gpu_unavailable_reason(advice=True))
    device.DRIVER_VERSION.unlink()
    assert gpu_unavailable_reason() == "this machine has no NVIDIA driver"
    assert "no NVIDIA driver; use a machine with a GPU" in str(gpu_unavailable_reason(advice=True))


@pytest.fixture
def visible_gpu(unusable_gpu: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A GPU that PyTorch sees; what the driver would report is forged."""
    unusable_gpu.setattr(torch.cuda, "is_available", lambda: True)
    unusable_gpu.setattr(torch.cuda, "synchronize", lambda: None)
    unusable_gpu.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    unusable_gpu.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    unusable_gpu.setattr(torch.cuda, "get_arch_list", lambda: KERNELS)
    return unusable_gpu


def test_a_usable_gpu_has_no_reason(visible_gpu: pytest.MonkeyPatch) -> None:
    assert gpu_unavailable_reason() is None


def test_a_gpu_that_another_process_has_for_itself_is_refused(visible_gpu: pytest.MonkeyPatch) -> None:
    def busy() -> None:
        raise torch.AcceleratorError("CUDA error: CUDA-capable device(s) is/are busy or unavailable\nSearch for `x`")

    visible_gpu.setattr(torch.cuda, "synchronize", busy)
    assert gpu_unavailable_reason(advice=True) == (
        "the GPU cannot be used (CUDA error: CUDA-capable device(s) is/are busy or unavailable); nvidia-smi shows its "
        "state and its processes; choose another one with CUDA_VISIBLE_DEVICES"
    )
    with pytest.raises(InvalidInputError, match="busy or unavailable.*or set TAGGER_RUN_DEVICE=cpu"):
        choose_device("cuda")
    assert choose_device("auto") == torch.device("cpu")


def test_a_gpu_without_kernels_is_refused_with_its_capability(visible_gpu: pytest.MonkeyPatch) -> None:
    visible_gpu.setattr(torch.cuda, "get_device_capability", lambda: (7, 0))
    visible_gpu.setattr(torch.cuda, "get_device_name", lambda: "Tesla V100-SXM2-16GB")
    assert str(gpu_unavailable_reason()).startswith("Tesla V100-SXM2-16GB has compute capability 7.0 and PyTorch ")
    assert "has kernels for sm_75, sm_80" in str(gpu_unavailable_reason())
    with pytest.raises(InvalidInputError, match="use another GPU, or a build of PyTorch for this one"):
        choose_device("cuda")


def test_a_build_whose_kernels_have_other_names_is_not_judged(visible_gpu: pytest.MonkeyPatch) -> None:
    visible_gpu.setattr(torch.cuda, "get_arch_list", lambda: ["gfx90a", "gfx942"])
    assert gpu_unavailable_reason() is None


def test_kernels_of_the_major_version_or_ptx_are_needed() -> None:
    capabilities = [(7, 0), (7, 5), (8, 0), (8, 9), (9, 0), (10, 0), (11, 0), (12, 0), (12, 1)]
    expected = [False, True, True, True, True, True, False, True, True]
    assert [has_kernels(capability, KERNELS) for capability in capabilities] == expected
    assert has_kernels((12, 1), ["sm_75", "compute_90"]), "PTX is compiled for newer GPUs"


def test_without_a_gpu_cuda_is_refused_and_auto_is_the_cpu(
    unusable_gpu: pytest.MonkeyPatch,
) -> None:
    device.DRIVER_VERSION.write_text(PROPRIETARY.format("550.54.15"))
    with pytest.raises(
        InvalidInputError, match=r"=cuda, but the NVIDIA driver is 550.54.15 .* or set TAGGER_RUN_DEVICE=cpu"
    ):
        ComputeSpec.resolve("cuda", "auto")
    assert choose_device("auto") == torch.device("cpu")
    assert ComputeSpec.resolve("auto", "fp32") == CPU


def test_fp16_is_refused_on_a_cpu() -> None:
    with pytest.raises(InvalidInputError, match="fp16 needs a GPU and this run is on the CPU; use auto, fp32 or bf16"):
        choose_precision("fp16", torch.device("cpu"))
    assert choose_precision("bf16", torch.device("cpu")) == "bf16"
    assert choose_precision("auto", torch.device("cpu")) in ("bf16", "fp32")


@pytest.mark.parametrize(("has_bf16", "auto"), [(True, "bf16"), (False, "fp16")])
def test_auto_is_bf16_on_a_gpu_that_has_it(monkeypatch: pytest.MonkeyPatch, has_bf16: bool, auto: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16)
    gpu = torch.device("cuda", 0)
    assert choose_precision("auto", gpu) == auto
    assert choose_precision("fp32", gpu) == "fp32"


def test_bf16_is_refused_on_a_gpu_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    with pytest.raises(InvalidInputError, match="Tesla T4 has no bf16; use auto, fp16 or fp32"):
        choose_precision("bf16", torch.device("cuda", 0))


@pytest.mark.parametrize(
    ("parameters", "setting", "refused"),
    [(559_214_592, "auto", True), (134_515_008, "auto", False), (559_214_592, "cpu", False)],
    ids=["bloomz-560m", "SmolLM2-135M", "configured"],
)
def test_auto_trains_only_small_models_on_a_cpu(
    unusable_gpu: pytest.MonkeyPatch, tmp_path: Path, parameters: int, setting: str, refused: bool
) -> None:
    need = MemoryEstimate(parameters, weights=0, adapters=0, activations=0, logits=0, disk=0)
    settings = make_settings(Path("a/base"), tmp_path, run={"device": setting})
    device.DRIVER_VERSION.unlink()
    problems = cpu_problems(need, settings, CPU)
    assert bool(problems) == refused
    if refused:
        assert problems[0].startswith("a/base has 559 million parameters, TAGGER_RUN_DEVICE=auto trains at most 250 ")
        assert problems[0].endswith("set TAGGER_RUN_DEVICE=cpu to train on the CPU all the same")
    assert cpu_problems(need, settings, ComputeSpec(torch.device("cuda"), "bf16")) == []


def test_the_setting_documents_the_limit() -> None:
    description = str(Run.model_fields["device"].description)
    assert f"at most {CPU_PARAMETERS // 10**6} million parameters" in description


@pytest.mark.parametrize(
    ("setting", "gpus", "examples", "expected"),
    [(None, 0, 16, 1), (None, 1, 16, 1), (None, 4, 16, 4), (None, 8, 6, 6), (2, 4, 16, 2), (3, 0, 16, 3)],
)
def test_there_is_one_process_for_each_gpu_unless_set(
    monkeypatch: pytest.MonkeyPatch, setting: int | None, gpus: int, examples: int, expected: int
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    device = torch.device("cuda" if gpus else "cpu")
    assert count_processes(setting, device, examples_per_step=examples) == expected


@pytest.mark.parametrize(
    ("setting", "device", "examples", "problem"),
    [
        (3, "cuda", 16, "TAGGER_RUN_PROCESSES=3, but this machine has 2 GPUs"),
        (17, "cpu", 16, "TAGGER_RUN_PROCESSES=17, but a step has only 16 examples to share"),
    ],
)
def test_more_processes_than_gpus_or_examples_are_refused(
    monkeypatch: pytest.MonkeyPatch, setting: int, device: str, examples: int, problem: str
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(InvalidInputError, match=problem):
        count_processes(setting, torch.device(device), examples_per_step=examples)


def test_other_errors_are_not_out_of_memory() -> None:
    assert not device.is_out_of_memory(RuntimeError("shape mismatch"))
    assert device.is_out_of_memory(MemoryError())


def test_a_gpu_tags_more_texts_at_a_time_than_a_cpu() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert device.texts_per_batch(None, cpu) < device.texts_per_batch(None, gpu)
    assert device.texts_per_batch(7, cpu) == device.texts_per_batch(7, gpu) == 7
