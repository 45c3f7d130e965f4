"""The choice between implementations of the parts of a step, which give the same result up to rounding."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, replace
from typing import Literal, get_args, get_type_hints

import torch


@dataclass(frozen=True)
class Kernels:
    """Which implementation computes each part of a step. Those of the CPU are the reference."""

    int8: Literal["bitsandbytes", "dequantized"] = "dequantized"
    """The forward pass of an int8 layer. `bitsandbytes`: LLM.int8, which rounds the inputs to int8 too, looks for
    outliers in them (the CPU waits for the GPU in each layer), and keeps them for the backward pass. `dequantized`: the
    weight is dequantized and multiplied in the precision of the computation, as in the backward pass of both."""
    attention: Literal["groups", "varlen"] = "varlen"
    """Attention within the texts of a packed row. `groups`: texts of similar length are padded, with a call of
    scaled_dot_product_attention for each group. `varlen`: one call of torch's FlashAttention for texts of any lengths,
    in half precision."""
    optimizer: Literal["foreach", "fused"] = "fused"
    """AdamW with a few kernels for each operation on all adapters, or with one kernel for all operations."""

    graphs: Literal["off", "on"] = "on"
    """`on`: forward and backward pass of a micro-batch are recorded as a CUDA graph, once for each padded size, and
    replayed. It needs `varlen`. The CPU then starts one graph instead of thousands of kernels."""

    @staticmethod
    def choices(name: str, device: torch.device) -> tuple[str, ...]:
        """Return the values of a field that can be computed on a device."""
        values: tuple[str, ...] = get_args(get_type_hints(Kernels)[name])
        if device.type == "cpu":
            return tuple(value for value in values if value in CPU_CHOICES[name])
        return values

    @classmethod
    def for_device(cls, device: torch.device) -> Kernels:
        """Return the implementations that a run uses on a device."""
        if device.type == "cpu":
            return cls(int8="dequantized", attention="groups", optimizer="foreach", graphs="off")
        return cls() if has_flash_attention(device) else cls().without_flash_attention()

    def without_flash_attention(self) -> Kernels:
        """Return the implementations where FlashAttention cannot be computed: in fp32, or for some sizes of heads."""
        return replace(self, attention="groups", graphs="off")


CPU_CHOICES = {
    "int8": ("dequantized",),
    "attention": ("groups", "varlen"),
    "optimizer": ("foreach", "fused"),
    "graphs": ("off",),
}
"""For each field of Kernels the values that a CPU can compute."""


def has_flash_attention(device: torch.device) -> bool:
    """Return whether torch has FlashAttention for texts of any lengths here: from compute capability 8.0 on."""
    found = importlib.util.find_spec("torch.nn.attention.varlen") is not None
    return found and torch.cuda.get_device_capability(device) >= (8, 0)


def compute_dtype(x: torch.Tensor, default: torch.dtype) -> torch.dtype:
    """Return the dtype of the active autocast, for the backward pass, which runs outside of it; else the default."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else default
