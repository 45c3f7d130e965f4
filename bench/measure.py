"""Measurements: times of steps, peak memory, the peak speed of the device, and the useful part of the computation."""

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


def synchronize(device: torch.device) -> None:
    """Wait until the device has computed everything."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Clock:
    """The seconds between ticks, the first one since the start; each tick waits for the GPU to finish."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.seconds: list[float] = []
        self._last = self._now()

    def tick(self) -> None:
        now = self._now()
        self.seconds.append(now - self._last)
        self._last = now

    def _now(self) -> float:
        synchronize(self._device)
        return time.perf_counter()


def watch_memory(device: torch.device) -> Callable[[], float]:
    """Return a function that returns the peak memory since this call, minus the memory held at this call, in GiB."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        allocated = torch.cuda.memory_allocated(device)
        return lambda: float(torch.cuda.max_memory_allocated(device) - allocated) / 2**30
    ctypes.CDLL(None).malloc_trim(0)  # memory that loading has freed would hide what training takes
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak (Linux)
    resident = _status("VmRSS")
    return lambda: (_status("VmHWM") - resident) / 2**30


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def peak_gflops(compute: ComputeSpec) -> float:
    """Measure the GFLOP/s of large matrix products, the best that the device reaches at this moment."""
    side, repeats = (4096, 20) if compute.device.type == "cuda" else (2048, 5)
    left = torch.randn(side, side, device=compute.device, dtype=compute.dtype)
    right = torch.randn(side, side, device=compute.device, dtype=compute.dtype)
    product = left @ right
    clock = Clock(compute.device)
    for _ in range(repeats):
        torch.matmul(left, right, out=product)
        clock.tick()
    return 2 * side**3 / statistics.median(clock.seconds) / 1e9


def useful_gflop(model: peft.PeftModel, examples: Sequence[EncodedExample]) -> float:
    """Count the GFLOP that a step over these examples needs, without padding, recomputation and unused logits.

    For each token, a frozen weight takes 2 FLOP in the forward pass and 2 for the gradient of its input, an adapter's
    weight 2 more for its own gradient. The head counts only for label tokens, attention for half of its square.
    """
    head = model.get_output_embeddings()
    linear = [module for module in model.modules() if isinstance(module, torch.nn.Linear) and module is not head]
    sizes = [
        module.in_features * module.out_features for module in linear
    ]  # not weight.numel(), which is half of that for 4-bit weights
    body = sum(size * (6 if module.weight.requires_grad else 4) for size, module in zip(sizes, linear, strict=True))
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    squares = sum(len(example.input_ids) ** 2 for example in examples)
    attention = 3 * 4 * width * config.num_hidden_layers * squares / 2
    labels = sum(label != IGNORE_INDEX for example in examples for label in example.labels[1:])
    tokens = sum(len(example.input_ids) for example in examples)
    return float(body * tokens + 4 * head.weight.numel() * labels + attention) / 1e9


def describe(compute: ComputeSpec) -> str:
    """Describe machine, device and package versions in one line."""
    return f"{platform.platform()}; {_processor()}; {compute}; {', '.join(map(_version, PACKAGES))}"


def _processor() -> str:
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown CPU")


def _version(package: str) -> str:
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return f"no {package}"
