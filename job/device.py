"""What the machine computes on, and in which precision."""

from __future__ import annotations

import contextlib
import math
import platform
import resource
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil
import torch

from job.results import Refused

Precision = Literal["fp16", "bf16", "fp32"]
DTYPES: dict[Precision, torch.dtype] = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Machine:
    """The device of this process and the arithmetic of its forward and backward passes."""

    device: torch.device
    precision: Precision

    @classmethod
    def resolve(
        cls, device: Literal["auto", "cuda", "cpu"], precision: Literal["auto", "fp16", "bf16", "fp32"]
    ) -> Machine:
        """What the settings mean here; raises Refused for what the device does not have.

        `auto` is a GPU if PyTorch sees one, with bf16 where it has that and else fp16. A CPU computes in bf16 if it
        has matrix units for it (AMX), and else in fp32, which is faster there.
        """
        if device == "cuda" and not torch.cuda.is_available():
            raise Refused(
                "TAGGER_RUN_DEVICE=cuda, but PyTorch sees no GPU; expected one. "
                "Check nvidia-smi, `docker run --gpus all` and CUDA_VISIBLE_DEVICES, or set TAGGER_RUN_DEVICE=cpu"
            )
        if device == "cpu" or not torch.cuda.is_available():
            if precision == "fp16":
                raise Refused(
                    "TAGGER_TRAIN_PRECISION=fp16 needs a GPU and this run is on the CPU; use auto, fp32 or bf16"
                )
            if precision == "auto":
                precision = "bf16" if torch.cpu._is_amx_tile_supported() else "fp32"
            return cls(torch.device("cpu"), precision)
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        if precision == "bf16" and not bf16:
            raise Refused(
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
        return min(float(psutil.virtual_memory().available), _left_of_limit(Path("/sys/fs/cgroup")))

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


def _left_of_limit(group: Path) -> float:
    """Bytes left of a control group's memory limit (cgroup v2); what caches files can be taken back."""
    try:
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no such group, or no limit: "max"
        return math.inf
    return float(limit - used + int(stat.get("file", 0)))
