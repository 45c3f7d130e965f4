"""The device and the precision to compute with, and the memory they have."""

from __future__ import annotations

import contextlib
import gc
import math
import os
import platform
import re
import resource
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
import torch

from job.errors import InvalidInputError

Precision = Literal["fp16", "bf16", "fp32"]
DTYPES: dict[Precision, torch.dtype] = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
DRIVER_VERSION = Path("/proc/driver/nvidia/version")
"""The version of the kernel's NVIDIA driver; visible in every container, with or without access to a GPU."""
NVIDIA_CTL = Path("/dev/nvidiactl")
"""Exists only where a GPU is accessible."""
TEXTS_PER_BATCH = {"cpu": 16, "cuda": 256}
"""A GPU waits for the CPU at each token, whatever the number of texts."""
MIN_DRIVER = {"12": 525, "13": 580}
"""The oldest driver for each major version of CUDA (NVIDIA, table of CUDA minor version compatibility)."""


@dataclass(frozen=True)
class ComputeSpec:
    """The device of this process and the precision of its forward and backward passes."""

    device: torch.device
    precision: Precision

    @classmethod
    def resolve(
        cls, device: Literal["auto", "cuda", "cpu"], precision: Literal["auto", "fp16", "bf16", "fp32"]
    ) -> ComputeSpec:
        """Resolve the settings on this machine; raises InvalidInputError for what the machine does not have."""
        resolved = choose_device(device)
        return cls(resolved, choose_precision(precision, resolved))

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of weights that are not quantized."""
        return DTYPES[self.precision]

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        """Return the context for a forward pass in mixed precision; in fp32 it does nothing."""
        if self.precision == "fp32":
            return contextlib.nullcontext()
        context: contextlib.AbstractContextManager[None] = torch.autocast(self.device.type, self.dtype)
        return context

    def free_memory(self) -> float:
        """Return the bytes that can be allocated on the device now; on a CPU, within the container's limit."""
        if self.device.type == "cuda":
            unused = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
            return float(torch.cuda.mem_get_info(self.device)[0] + unused)
        return min(float(psutil.virtual_memory().available), _cgroup_memory_left(Path("/sys/fs/cgroup")))

    @property
    def gpus(self) -> int:
        """The number of GPUs that this process sees; 0 on a CPU."""
        return torch.cuda.device_count() if self.device.type == "cuda" else 0

    def reset_peak_memory(self) -> None:
        """Let `peak_memory` count from now on; where the kernel does not allow it, still from the process's start."""
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak_memory(self) -> dict[str, float]:
        """Return the peak memory in GiB: of this process and, on a GPU, of PyTorch's allocations there."""
        peak = {"process_gib": round(_peak_resident_kib() / 2**20, 2)}
        if self.device.type == "cuda":
            peak["gpu_gib"] = round(torch.cuda.max_memory_allocated(self.device) / 2**30, 2)
        return peak

    def __str__(self) -> str:
        if self.device.type == "cuda":
            return f"{torch.cuda.get_device_name(self.device)} in {self.precision}"
        return f"CPU ({platform.machine()}, {torch.get_num_threads()} threads) in {self.precision}"


def describe_machine() -> dict[str, Any]:
    """Return what a manifest says of this machine: platform, processor, threads, NVIDIA driver, CUDA, GPUs."""
    cpu, driver = platform.processor(), None
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        cpu = next(line for line in lines if line.startswith("model name")).partition(":")[2].strip()
    with contextlib.suppress(OSError, IndexError):
        driver = re.findall(r"\d+\.\d+(?:\.\d+)?", Path("/proc/driver/nvidia/version").read_text(encoding="utf-8"))[0]
    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return {
        "platform": platform.platform(),
        "cpu": cpu,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "driver": driver,
        "cuda": torch.version.cuda,
        "gpus": gpus,
    }


def _peak_resident_kib() -> int:
    """Return the peak of this process's resident memory since its start, or since the kernel's record was reset."""
    with contextlib.suppress(OSError, LookupError, ValueError):
        status = Path("/proc/self/status").read_text(encoding="utf-8", errors="replace")
        return int(next(line for line in status.splitlines() if line.startswith("VmHWM:")).split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def choose_device(setting: Literal["auto", "cuda", "cpu"]) -> torch.device:
    """Return the device for TAGGER_RUN_DEVICE; `auto` is a GPU if PyTorch can use one, else the CPU.

    Raises InvalidInputError for `cuda` without a usable GPU.
    """
    unavailable = None if setting == "cpu" else gpu_unavailable_reason(advice=setting == "cuda")
    if setting == "cuda" and unavailable:
        raise InvalidInputError(f"TAGGER_RUN_DEVICE=cuda, but {unavailable}, or set TAGGER_RUN_DEVICE=cpu")
    if setting == "cpu" or unavailable:
        return torch.device("cpu")
    # cuDNN's attention makes a plan for each new shape, 20 ms each on an H100, and here every step has new shapes
    torch.backends.cuda.enable_cudnn_sdp(False)
    return torch.device("cuda", torch.cuda.current_device())


def choose_precision(setting: Literal["auto", "fp16", "bf16", "fp32"], device: torch.device) -> Precision:
    """Return the precision for TAGGER_TRAIN_PRECISION on a device.

    `auto` is bf16 where the hardware has it: on a GPU else fp16, on a CPU (where AMX, its matrix units, must
    be there) else fp32, which is faster than emulated bf16. Raises InvalidInputError for a precision that the
    device does not have.
    """
    if device.type == "cpu":
        if setting == "fp16":
            raise InvalidInputError(
                "TAGGER_TRAIN_PRECISION=fp16 needs a GPU and this run is on the CPU; use auto, fp32 or bf16"
            )
        if setting == "auto":
            return "bf16" if torch.cpu._is_amx_tile_supported() else "fp32"
        return setting
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    if setting == "bf16" and not has_bf16:
        raise InvalidInputError(
            f"TAGGER_TRAIN_PRECISION=bf16, but {torch.cuda.get_device_name()} has no bf16; use auto, fp16 or fp32"
        )
    if setting == "auto":
        return "bf16" if has_bf16 else "fp16"
    return setting


def count_processes(setting: int | None, device: torch.device, *, examples_per_step: int | None = None) -> int:
    """Return the number of processes for TAGGER_RUN_PROCESSES on this machine; None is `auto`.

    `auto` is one for each GPU, in training at most one for each example of a step, and 1 on a CPU. Raises
    InvalidInputError for more processes than GPUs, or than a step has examples.
    """
    gpus = torch.cuda.device_count() if device.type == "cuda" else None
    if setting is None:
        return 1 if gpus is None else max(1, min(gpus, examples_per_step or gpus))
    if gpus is not None and setting > gpus:
        raise InvalidInputError(
            f"TAGGER_RUN_PROCESSES={setting}, but this machine has {gpus} GPU{'s' if gpus > 1 else ''}, and each "
            f"process needs one of its own; set it to auto or to at most {gpus}"
        )
    if examples_per_step is not None and setting > examples_per_step:
        raise InvalidInputError(
            f"TAGGER_RUN_PROCESSES={setting}, but a step has only {examples_per_step} examples to share; set it to at "
            "most that, or raise TAGGER_TRAIN_BATCH_SIZE"
        )
    return setting


def texts_per_batch(setting: int | None, device: torch.device) -> int:
    """Return how many texts share a forward pass on a device: the setting, or what suits the device."""
    return setting or TEXTS_PER_BATCH.get(device.type, TEXTS_PER_BATCH["cuda"])


def is_out_of_memory(error: Exception) -> bool:
    """Return whether the device or this process is out of memory; on a CPU only PyTorch's message says so."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def release_memory(device: torch.device) -> None:
    """Give memory that no tensor uses back; after an error, outside of its except block, which keeps tensors alive."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _cgroup_memory_left(group: Path) -> float:
    """Return the bytes left of a control group's memory limit (cgroup v2), reclaimable file cache included.

    Infinite where there is no such group, or no limit.
    """
    try:
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # without a limit, memory.max is "max"
        return math.inf
    return float(limit - used + int(stat.get("file", 0)))


def gpu_unavailable_reason(*, advice: bool = False) -> str | None:
    """Return why PyTorch cannot use a GPU as a clause, with `advice` also what to do about it; None if it can."""
    with warnings.catch_warnings(action="ignore"):  # PyTorch warns of a driver that is too old, and of an old GPU
        problem = _find_unusable_gpu() if torch.cuda.is_available() else _find_gpu_problem()
    if problem is None:
        return None
    reason, remedy = problem
    return f"{reason}; {remedy}" if advice else reason


def _find_unusable_gpu() -> tuple[str, str] | None:
    """Return why a GPU that PyTorch sees cannot compute, and what to do about it; None if it can."""
    try:
        torch.cuda.synchronize()  # creates the context, which fails where another process has the GPU for itself
        capability = torch.cuda.get_device_capability()
        kernels = [name for name in torch.cuda.get_arch_list() if name.startswith(("sm_", "compute_"))]
    except RuntimeError as error:
        return (
            f"the GPU cannot be used ({str(error).partition(chr(10))[0]})",
            "nvidia-smi shows its state and its processes; choose another one with CUDA_VISIBLE_DEVICES",
        )
    if not kernels or has_kernels(capability, kernels):
        return None
    return (
        f"{torch.cuda.get_device_name()} has compute capability {capability[0]}.{capability[1]} and PyTorch "
        f"{torch.__version__} has kernels for {', '.join(kernels)}",
        "use another GPU, or a build of PyTorch for this one",
    )


def has_kernels(capability: tuple[int, int], kernels: Sequence[str]) -> bool:
    """Return whether a build's kernels, such as sm_90 or compute_120 (PTX), run on a GPU of this compute capability.

    Kernels run on GPUs of their own major version that are not older; PTX is compiled for any that is not older.
    """
    number = 10 * capability[0] + capability[1]
    for name in kernels:
        kind, _, digits = name.partition("_")
        built_for = int("".join(character for character in digits if character.isdigit()))
        if built_for <= number and (kind == "compute" or built_for // 10 == capability[0]):
            return True
    return False


def _find_gpu_problem() -> tuple[str, str]:
    cuda = torch.version.cuda
    words = DRIVER_VERSION.read_text(encoding="utf-8").split() if DRIVER_VERSION.is_file() else []
    driver = next((word for word in words if word.count(".") and word.replace(".", "").isdigit()), None)
    min_driver = None if cuda is None else MIN_DRIVER.get(cuda.partition(".")[0])
    if driver is None:
        return "this machine has no NVIDIA driver", "use a machine with a GPU, or install the driver"
    if cuda is None:
        return (
            f"PyTorch {torch.__version__} is a build without CUDA",
            "install the CUDA build, or use the image with it",
        )
    if min_driver is not None and int(driver.partition(".")[0]) < min_driver:
        return (
            f"the NVIDIA driver is {driver} and CUDA {cuda} needs {min_driver} or newer",
            "update the machine's driver",
        )
    for name in ("CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES"):
        if os.environ.get(name) in ("", "-1", "none", "void", "NoDevFiles"):
            return f"{name}={os.environ[name]} hides every GPU of this machine (driver {driver})", "unset it"
    if not NVIDIA_CTL.exists():
        return (
            f"the machine has an NVIDIA driver ({driver}) but this container has no access to a GPU",
            "start it with `docker run --gpus all`, or request nvidia.com/gpu in Kubernetes",
        )
    return (
        f"PyTorch sees no GPU although there is a driver ({driver})",
        "run nvidia-smi to see the state of the GPU",
    )
