"""Memory-efficient forward passes, for training and on a GPU also for tagging: LoRA, int8 layers, SwiGLU, GELU.

They save less for the backward pass, or need fewer passes, than the libraries' own.
"""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers.models.bloom.modeling_bloom import BloomGelu
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP

from job.training.dropout import KeyedDropout
from job.training.kernels import Kernels, compute_dtype

Forward = Callable[..., Any]
Registry = dict[type, tuple[Callable[[Any], bool], Forward]]
"""For each module type: a predicate that says whether a module can be replaced, and its forward pass."""


@contextmanager
def patched(
    model: torch.nn.Module, kernels: Kernels | None = None, buffer: DequantBuffer | None = None
) -> Iterator[None]:
    """Give the model's modules memory-efficient forward passes, and restore their own at the end of the block."""
    device = next(model.parameters()).device
    registry = _registry(buffer or DequantBuffer(), kernels or Kernels.for_device(device))
    replaced = []
    for module in model.modules():
        if (forward := replacement_forward(module, registry)) is not None:
            module.forward = types.MethodType(forward, module)
            replaced.append(module)
    try:
        yield
    finally:
        for module in replaced:
            del module.forward


def replacement_forward(module: torch.nn.Module, registry: Registry) -> Forward | None:
    """Return the forward pass of the first entry that matches the module's type, or None if it does not apply."""
    for module_type, (applies, forward) in registry.items():
        if isinstance(module, module_type):
            return forward if applies(module) else None
    return None


def _registry(buffer: DequantBuffer, kernels: Kernels) -> Registry:
    registry: Registry = {
        LoraLayer: (_is_plain_lora, _lora_forward),
        LlamaMLP: (_is_swiglu, _swiglu_forward),
        Qwen2MLP: (_is_swiglu, _swiglu_forward),
        BloomGelu: (lambda module: True, _gelu_forward),
    }
    # a model with int8 layers has imported bitsandbytes; others do not need it
    if kernels.int8 == "dequantized" and "bitsandbytes" in sys.modules:
        from bitsandbytes.nn.modules import Linear8bitLt

        registry[Linear8bitLt] = (lambda module: True, functools.partial(_int8_forward, buffer=buffer))
    return registry


def _is_plain_lora(layer: Any) -> bool:
    """Return whether the layer adds `B A dropout(x)`, scaled, and nothing else; DoRA, for example, rescales rows."""
    plain = layer.active_adapters == ["default"] and not layer.lora_variant
    plain = plain and not layer.merged and not layer.disable_adapters
    dropout = layer.lora_dropout["default"] if plain else None
    known = isinstance(dropout, (KeyedDropout, torch.nn.Identity)) or (plain and not layer.training)
    return known and not any(layer.lora_bias.values()) and isinstance(layer.get_base_layer(), torch.nn.Linear)


def _is_swiglu(mlp: Any) -> bool:
    return bool(mlp.config.hidden_act == "silu")


def _lora_forward(layer: Any, x: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = layer.base_layer(x)
    dropout = layer.lora_dropout["default"]
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    dropped, rate = None, 0.0
    if isinstance(dropout, KeyedDropout) and layer.training:
        dropped, rate = dropout.mask(x), dropout.rate
    delta: torch.Tensor = LoraFunction.apply(x, a, b, dropped, rate, layer.scaling["default"])  # type: ignore[no-untyped-call]
    return result + delta.to(result.dtype)


def _int8_forward(layer: Any, x: torch.Tensor, *, buffer: DequantBuffer) -> torch.Tensor:
    if layer.weight.CB is not None:
        layer.init_8bit_state()
    output: torch.Tensor = Int8LinearFunction.apply(x, layer.state.CB, layer.state.SCB, layer.bias, buffer)  # type: ignore[no-untyped-call]
    return output


def _swiglu_forward(mlp: Any, x: torch.Tensor) -> torch.Tensor:
    gated = SwiGLUFunction.apply(mlp.gate_proj(x), mlp.up_proj(x))  # type: ignore[no-untyped-call]
    output: torch.Tensor = mlp.down_proj(gated)
    return output


def _gelu_forward(module: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Compute BLOOM's GELU in one pass; its own computes the same formula in nine, and sixteen backward."""
    return functional.gelu(x, approximate="tanh")


class LoraFunction(torch.autograd.Function):
    """Compute LoRA's `dropout(x) @ a.T @ b.T * scale`, saving x and one byte for each value of the dropout mask.

    Autograd saves the noise and the output of dropout too, in full precision and for every adapter on the
    same x; x itself is shared with the other layers that save it. (Hu et al., 2021.)
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        dropped: torch.Tensor | None,
        rate: float,
        scale: float,
    ) -> torch.Tensor:
        ctx.dtype, ctx.rate, ctx.scale = compute_dtype(x, a.dtype), rate, scale
        with torch.autocast(x.device.type, enabled=False):
            low = apply_dropout_mask(x, dropped).to(ctx.dtype) @ a.to(ctx.dtype).T / (1 - rate)
            ctx.save_for_backward(x, a, b, low, dropped)
            return low @ b.to(ctx.dtype).T * scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, a, b, low, dropped = ctx.saved_tensors
        flat = grad.reshape(-1, grad.shape[-1]) * ctx.scale
        grad_b = flat.T @ low.reshape(-1, low.shape[-1])
        grad_low = flat @ b.to(ctx.dtype) / (1 - ctx.rate)
        grad_a = grad_low.T @ apply_dropout_mask(x, dropped).to(ctx.dtype).reshape(-1, x.shape[-1])
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = apply_dropout_mask((grad_low @ a.to(ctx.dtype)).view(x.shape).to(x.dtype), dropped)
        return grad_x, grad_a.to(a.dtype), grad_b.to(b.dtype), None, None, None


def apply_dropout_mask(x: torch.Tensor, dropped: torch.Tensor | None) -> torch.Tensor:
    """Set the values where `dropped` is true to zero; None drops nothing."""
    return x if dropped is None else x.masked_fill(dropped, 0.0)


class SwiGLUFunction(torch.autograd.Function):
    """Compute `silu(gate) * up` (Shazeer, 2020) without saving silu(gate)."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return functional.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), functional.silu(gate).mul_(grad)


class DequantBuffer:
    """A buffer that all dequantized weights share: allocating one per product costs up to a tenth of the product."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0)
        self._factors: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        """By the id of a scale: the scale, so that the id remains its, and the factors [out, 1] of its weight."""

    def dequantized(self, weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Dequantize an int8 weight [out, in] with the absolute maxima of its rows [out], as bitsandbytes does.

        The result is valid until the next call.
        """
        buffer = self._buffer
        if buffer.numel() < weight.numel() or buffer.dtype != dtype or buffer.device != weight.device:
            self._buffer = buffer = torch.empty(weight.numel(), dtype=dtype, device=weight.device)
        view = buffer[: weight.numel()].view(weight.shape)
        if id(scale) not in self._factors:
            self._factors[id(scale)] = (scale, scale.unsqueeze(1).mul(1.0 / 127.0))
        factors = self._factors[id(scale)][1]
        if weight.device.type == "cpu":
            return view.copy_(weight).mul_(factors)
        return torch.mul(weight, factors, out=view)  # one kernel


class Int8LinearFunction(torch.autograd.Function):
    """Compute a frozen 8-bit linear layer without saving its input.

    bitsandbytes saves the input, which only the gradient of a trainable weight needs.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        scale: torch.Tensor,
        bias: torch.Tensor | None,
        buffer: DequantBuffer,
    ) -> torch.Tensor:
        ctx.dtype, ctx.dtype_x = compute_dtype(x, x.dtype), x.dtype
        ctx.weight, ctx.scale, ctx.buffer = weight, scale, buffer
        bias = None if bias is None else bias.to(ctx.dtype)
        with torch.autocast(x.device.type, enabled=False):
            return functional.linear(x.to(ctx.dtype), buffer.dequantized(weight, scale, ctx.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if not ctx.needs_input_grad[0]:
            return (None,) * 5
        weight = ctx.buffer.dequantized(ctx.weight, ctx.scale, ctx.dtype)
        return (grad.to(ctx.dtype) @ weight).to(ctx.dtype_x), None, None, None, None
