"""What a measurement reads: the clock, the most memory held, the machine's peak, and how much work is of use."""

from __future__ import annotations

import ctypes
import gc
import importlib.metadata
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import peft
import torch

from job.dataset.tokenization import IGNORE_INDEX
from job.system.device import ComputeSpec
from job.types import EncodedExample

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "trl")


class Clock:
    """Seconds from the start, or the tick before, to each tick; what a GPU still has to do is waited for."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.seconds: list[float] = []
        self._last = self._now()

    def tick(self) -> None:
        now = self._now()
        self.seconds.append(now - self._last)
        self._last = now

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def watch_memory(device: torch.device) -> Callable[[], float]:
    """A function that says how much more memory, in GiB, was held at most since this call than at this call."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        allocated = torch.cuda.memory_allocated(device)
        return lambda: float(torch.cuda.max_memory_allocated(device) - allocated) / 2**30
    ctypes.CDLL(None).malloc_trim(0)  # what loading has freed would hide as much of what training takes
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts anew from here on (Linux)
    resident = _status("VmRSS")
    return lambda: (_status("VmHWM") - resident) / 2**30


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def peak_gflops(machine: ComputeSpec) -> float:
    """GFLOP/s of large matrix products in the machine's dtype: what this machine has at its best, just now."""
    side, repeats = (4096, 20) if machine.device.type == "cuda" else (2048, 5)
    left = torch.randn(side, side, device=machine.device, dtype=machine.dtype)
    right = torch.randn(side, side, device=machine.device, dtype=machine.dtype)
    product = left @ right
    clock = Clock(machine.device)
    for _ in range(repeats):
        torch.matmul(left, right, out=product)
        clock.tick()
    return 2 * side**3 / statistics.median(clock.seconds) / 1e9


def useful_gflop(model: peft.PeftModel, examples: Sequence[EncodedExample]) -> float:
    """GFLOP that a step over these examples cannot do without; padding, recomputation and unread logits are none.

    A frozen weight costs 2 FLOP a token in the forward pass and 2 for the gradient of its input, an adapter's 2 more
    for its own gradient. The head is needed where there is a label, and attention sees half of its square.
    """
    head = model.get_output_embeddings()
    linear = [module for module in model.modules() if isinstance(module, torch.nn.Linear) and module is not head]
    sizes = [module.in_features * module.out_features for module in linear]  # a 4-bit weight's own size is half of it
    body = sum(size * (6 if module.weight.requires_grad else 4) for size, module in zip(sizes, linear, strict=True))
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    squares = sum(len(example.input_ids) ** 2 for example in examples)
    attention = 3 * 4 * width * config.num_hidden_layers * squares / 2
    labels = sum(label != IGNORE_INDEX for example in examples for label in example.labels[1:])
    tokens = sum(len(example.input_ids) for example in examples)
    return float(body * tokens + 4 * head.weight.numel() * labels + attention) / 1e9


def describe(machine: ComputeSpec) -> str:
    """The machine and the versions, in a line."""
    return f"{platform.platform()}; {_processor()}; {machine}; {', '.join(map(_version, PACKAGES))}"


def _processor() -> str:
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown CPU")


def _version(package: str) -> str:
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return f"no {package}"
