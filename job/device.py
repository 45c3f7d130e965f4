"""What the machine computes on, and in which precision."""

from __future__ import annotations

import contextlib
import platform
import resource
from dataclasses import dataclass
from typing import Literal

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

        `auto` is a GPU if PyTorch sees one, with bf16 where it has that and else fp16; a CPU computes in fp32.
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
            return cls(torch.device("cpu"), "fp32" if precision == "auto" else precision)
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
