"""Forward passes for training that keep less for the backward pass, or take fewer passes, than the libraries' own."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from bitsandbytes.nn.modules import Linear8bitLt
from peft.tuners.lora import LoraLayer
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput
from transformers.models.bloom.modeling_bloom import BloomGelu
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP

if TYPE_CHECKING:
    import peft

LINEAR_HEAD_ARCHITECTURES = ("bloom", "llama", "qwen2")
"""Architectures whose logits are the head's product with the last hidden state, and nothing else."""


@contextmanager
def patched(model: peft.PeftModel) -> Iterator[None]:
    """Put these forward passes into the model's modules, and take them out again: they compute the same."""
    scratch = _DequantBuffer()
    replaced = []
    for module in model.modules():
        if (forward := replacement_forward(module, scratch)) is not None:
            module.forward = types.MethodType(forward, module)
            replaced.append(module)
    try:
        yield
    finally:
        for module in replaced:
            del module.forward


def replacement_forward(module: torch.nn.Module, scratch: _DequantBuffer) -> Callable[..., Any] | None:
    """What to put in the place of a module's forward pass, if anything."""
    if isinstance(module, PreTrainedModel) and module.config.model_type in LINEAR_HEAD_ARCHITECTURES:
        head = module.get_output_embeddings()
        return _loss if type(head) is torch.nn.Linear and getattr(head, "bias", None) is None else None
    if isinstance(module, LoraLayer):
        plain = module.active_adapters == ["default"] and not module.lora_variant and not module.merged
        return _adapted if plain and isinstance(module.get_base_layer(), torch.nn.Linear) else None
    if isinstance(module, Linear8bitLt) and module.weight.device.type == "cpu":

        def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
            if self.weight.CB is not None:
                self.init_8bit_state()
            output: torch.Tensor = _Int8.apply(x, self.state.CB, self.state.SCB, self.bias, scratch)  # type: ignore[no-untyped-call]
            return output

        return forward
    if isinstance(module, (LlamaMLP, Qwen2MLP)) and module.config.hidden_act == "silu":
        return _swiglu
    return _gelu if isinstance(module, BloomGelu) else None


def _loss(
    module: Any,
    *,
    shift_labels: torch.Tensor,
    logits_to_keep: torch.Tensor,
    num_items_in_batch: int,
    labels: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    **inputs: Any,
) -> CausalLMOutput:
    """A causal model's loss: the summed cross-entropy at the kept positions, divided by `num_items_in_batch`."""
    if module.config.model_type != "bloom":  # which has no positions but ALiBi's
        inputs["position_ids"] = position_ids
    hidden = module.base_model(**inputs).last_hidden_state[logits_to_keep]
    summed = _HeadLoss.apply(hidden, module.get_output_embeddings().weight, shift_labels)  # type: ignore[no-untyped-call]
    return CausalLMOutput(loss=summed / num_items_in_batch)


def _adapted(module: Any, x: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = module.base_layer(x)
    dropout = module.lora_dropout["default"]
    a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
    rate = dropout.p if isinstance(dropout, torch.nn.Dropout) and module.training else 0.0
    added: torch.Tensor = _Adapter.apply(x, a, b, rate, module.scaling["default"])  # type: ignore[no-untyped-call]
    return result + added.to(result.dtype)


def _swiglu(module: Any, x: torch.Tensor) -> torch.Tensor:
    gated = _SwiGLU.apply(module.gate_proj(x), module.up_proj(x))  # type: ignore[no-untyped-call]
    output: torch.Tensor = module.down_proj(gated)
    return output


def _gelu(module: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """BLOOM's GELU in one pass; its own is the same formula in nine, and sixteen backward."""
    return functional.gelu(x, approximate="tanh")


def _compute_dtype(x: torch.Tensor, otherwise: torch.dtype) -> torch.dtype:
    """What autocast would compute in; backward passes run outside of it."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else otherwise


class _Adapter(torch.autograd.Function):
    """LoRA's `dropout(x) @ a.T @ b.T * scale`: keeps x, which others keep too, and a byte for each dropped value.

    Autograd's own keeps dropout's noise and its output, in full precision and for each adapter on the same x.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, rate: float, scale: float) -> torch.Tensor:
        ctx.dtype, ctx.rate, ctx.scale = _compute_dtype(x, a.dtype), rate, scale
        dropped = torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(rate) if rate else None
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
        return grad_x, grad_a.to(a.dtype), grad_b.to(b.dtype), None, None


def apply_dropout_mask(x: torch.Tensor, dropped: torch.Tensor | None) -> torch.Tensor:
    return x if dropped is None else x.masked_fill(dropped, 0.0)


class _SwiGLU(torch.autograd.Function):
    """`silu(gate) * up` (Shazeer, 2020), without keeping silu(gate)."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return functional.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), functional.silu(gate).mul_(grad)


class _DequantBuffer:
    """One buffer for all dequantized weights: a new one each time would cost as much as a tenth of the product."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0)

    def dequantized(self, weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """From int8 [out, in] and the rows' absolute maxima, as bitsandbytes does; good until the next call."""
        if self._buffer.numel() < weight.numel() or self._buffer.dtype != dtype:
            self._buffer = torch.empty(weight.numel(), dtype=dtype)
        found = self._buffer[: weight.numel()].view(weight.shape)
        return found.copy_(weight).mul_(scale.unsqueeze(1).mul(1.0 / 127.0))


class _Int8(torch.autograd.Function):
    """A frozen 8-bit linear layer on a CPU; bitsandbytes' own keeps the input, which no frozen weight needs."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        scale: torch.Tensor,
        bias: torch.Tensor | None,
        scratch: _DequantBuffer,
    ) -> torch.Tensor:
        ctx.dtype, ctx.dtype_x = _compute_dtype(x, x.dtype), x.dtype
        ctx.weight, ctx.scale, ctx.scratch = weight, scale, scratch
        bias = None if bias is None else bias.to(ctx.dtype)
        with torch.autocast(x.device.type, enabled=False):
            return functional.linear(x.to(ctx.dtype), scratch.dequantized(weight, scale, ctx.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if not ctx.needs_input_grad[0]:
            return (None,) * 5
        weight = ctx.scratch.dequantized(ctx.weight, ctx.scale, ctx.dtype)
        return (grad.to(ctx.dtype) @ weight).to(ctx.dtype_x), None, None, None, None


class _HeadLoss(torch.autograd.Function):
    """Summed cross-entropy of `hidden @ head.T`: hidden [rows, size], head [vocabulary, size], labels int64 [rows].

    Of the fp32 logits there is one buffer, [rows, vocabulary]: they become their own gradient, softmax
    minus one-hot, and that the gradient of `hidden`, already in the forward pass. The usual way keeps
    logits, log-softmax and gradient.
    """

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, head: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            logits = (hidden.to(head.dtype) @ head.T).float()
            total = logits.logsumexp(1)
            loss = (total - logits.gather(1, labels[:, None])[:, 0]).sum()
            if ctx.needs_input_grad[0]:
                grad = logits.sub_(total[:, None]).exp_()
                grad[torch.arange(len(labels), device=grad.device), labels] -= 1.0
                # fp16 has nothing below 6e-8, and most of 250,880 probabilities are
                lift = 1024.0 if head.dtype == torch.float16 else 1.0
                ctx.save_for_backward((grad.mul_(lift).to(head.dtype) @ head).float().div_(lift).to(hidden.dtype))
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (of_hidden,) = ctx.saved_tensors
        return of_hidden * grad.to(of_hidden.dtype), None, None
