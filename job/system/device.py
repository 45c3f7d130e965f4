"""What the machine computes on, and in which precision."""

from __future__ import annotations

import contextlib
import math
import os
import platform
import resource
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil
import torch

from job.errors import InvalidInputError

Precision = Literal["fp16", "bf16", "fp32"]
DTYPES: dict[Precision, torch.dtype] = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
DRIVER_VERSION = Path("/proc/driver/nvidia/version")
"""The kernel's NVIDIA driver: to be seen in every container, whether a GPU was given to it or not."""
NVIDIA_CTL = Path("/dev/nvidiactl")
"""There only where a GPU is."""
MIN_DRIVER = {"12": 525, "13": 580}
"""The first driver for a major version of CUDA, by NVIDIA's table of minor version compatibility."""


@dataclass(frozen=True)
class ComputeSpec:
    """The device of this process and the arithmetic of its forward and backward passes."""

    device: torch.device
    precision: Precision

    @classmethod
    def resolve(
        cls, device: Literal["auto", "cuda", "cpu"], precision: Literal["auto", "fp16", "bf16", "fp32"]
    ) -> ComputeSpec:
        """What the settings mean here; raises InvalidInputError for what the device does not have.

        `auto` is a GPU if PyTorch sees one, with bf16 where it has that and else fp16. A CPU computes in bf16 if it
        has matrix units for it (AMX), and else in fp32, which is faster there.
        """
        lacking = None if device == "cpu" else gpu_unavailable_reason()
        if device == "cuda" and lacking:
            raise InvalidInputError(f"TAGGER_RUN_DEVICE=cuda, but {lacking}, or set TAGGER_RUN_DEVICE=cpu")
        if device == "cpu" or lacking:
            if precision == "fp16":
                raise InvalidInputError(
                    "TAGGER_TRAIN_PRECISION=fp16 needs a GPU and this run is on the CPU; use auto, fp32 or bf16"
                )
            if precision == "auto":
                precision = "bf16" if torch.cpu._is_amx_tile_supported() else "fp32"
            return cls(torch.device("cpu"), precision)
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        if precision == "bf16" and not bf16:
            raise InvalidInputError(
                f"TAGGER_TRAIN_PRECISION=bf16, but {torch.cuda.get_device_name()} has no bf16; use auto, fp16 or fp32"
            )
        if precision == "auto":
            precision = "bf16" if bf16 else "fp16"
        return cls(torch.device("cuda", torch.cuda.current_device()), precision)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of weights that are not quantized."""
        return DTYPES[self.precision]

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        """Mixed precision for a forward pass; nothing to do in fp32."""
        if self.precision == "fp32":
            return contextlib.nullcontext()
        context: contextlib.AbstractContextManager[None] = torch.autocast(self.device.type, self.dtype)
        return context

    def free_memory(self) -> float:
        """Bytes that could be taken on the device now; on a CPU within the container's limit, if it has one."""
        if self.device.type == "cuda":
            unused = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
            return float(torch.cuda.mem_get_info(self.device)[0] + unused)
        return min(float(psutil.virtual_memory().available), _cgroup_memory_left(Path("/sys/fs/cgroup")))

    def peak_memory(self) -> dict[str, float]:
        """The most memory held so far, in GiB: of this process and of its GPU."""
        peak = {"process_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)}
        if self.device.type == "cuda":
            peak["gpu_gib"] = round(torch.cuda.max_memory_allocated(self.device) / 2**30, 2)
        return peak

    def __str__(self) -> str:
        if self.device.type == "cuda":
            return f"{torch.cuda.get_device_name(self.device)} in {self.precision}"
        return f"CPU ({platform.machine()}, {torch.get_num_threads()} threads) in {self.precision}"


def _cgroup_memory_left(group: Path) -> float:
    """Bytes left of a control group's memory limit (cgroup v2); what caches files can be taken back."""
    try:
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no such group, or no limit: "max"
        return math.inf
    return float(limit - used + int(stat.get("file", 0)))


def gpu_unavailable_reason() -> str | None:
    """Why PyTorch can use no GPU and what to do about it, as a clause; None if it can."""
    with warnings.catch_warnings(action="ignore"):  # PyTorch's own words for a driver that is too old
        if torch.cuda.is_available():
            return None
    cuda = torch.version.cuda
    words = DRIVER_VERSION.read_text(encoding="utf-8").split() if DRIVER_VERSION.is_file() else []
    driver = next((word for word in words if word.count(".") and word.replace(".", "").isdigit()), None)
    needed = None if cuda is None else MIN_DRIVER.get(cuda.partition(".")[0])
    if driver is None:
        return "this machine has no NVIDIA driver; take a machine with a GPU, or install the driver"
    if cuda is None:
        return f"PyTorch {torch.__version__} is a build without CUDA; install the CUDA build, or take the image with it"
    if needed is not None and int(driver.partition(".")[0]) < needed:
        return (
            f"the NVIDIA driver is {driver} and CUDA {cuda} needs {needed} or newer; update the driver of the machine"
        )
    for name in ("CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES"):
        if os.environ.get(name) in ("", "-1", "none", "void", "NoDevFiles"):
            return f"{name}={os.environ[name]} hides every GPU of this machine (driver {driver}); unset it"
    if not NVIDIA_CTL.exists():
        return (
            f"the machine has an NVIDIA driver ({driver}) but no GPU is given to this container; start it with "
            "`docker run --gpus all`, or ask Kubernetes for nvidia.com/gpu"
        )
    return f"PyTorch sees no GPU although there is a driver ({driver}); see what nvidia-smi says of the GPU"
