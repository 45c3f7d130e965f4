"""The gradients of a step: its micro-batches, their share of a process, and their exact sum."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import peft
import torch
from torch.nn.functional import pad

from job.system.device import ComputeSpec, is_out_of_memory, release_memory
from job.training import dropout, memory_efficient, variable_length
from job.training.batching import Collator, MicroBatch, examples_of_step, micro_batches, num_label_tokens
from job.training.dropout import DropoutKeys
from job.training.graphs import MAX_TOKENS, GraphedPasses, Inputs, pad_inputs, to_device
from job.training.kernels import Kernels
from job.training.loss import has_linear_head, mean_loss
from job.training.memory_efficient import DequantBuffer
from job.training.packing import PackedAttention
from job.types import EncodedExample

if TYPE_CHECKING:
    from job.settings import Train

MICRO_BATCH_OVERHEAD_TOKENS = {"cpu": 96, "cuda": 2048}
"""Cost of one more micro-batch, as a number of tokens: weights are dequantized again, kernels are launched."""

FRACTION_BITS = 50
"""Gradients are summed as multiples of 2^-50, about 1e-15, below 2^12 = 4096 in total."""

CACHED_NUMBERS = 2**15
"""How many numbers of each kind fit into a CPU's cache."""

_LOSS, _BAD_LOSS, _BAD_GRADIENTS, _TOO_LARGE, _OUT_OF_MEMORY = range(-5, 0)
"""Places at the end of the sums: the loss, and how many micro-batches had a loss or gradients that are not finite, had
too large gradients for the fixed point, or did not fit into memory."""
_PLACES = 5


@dataclass(frozen=True)
class StepRequest:
    """How to compute a step; equal in all processes that compute it."""

    step: int
    """Counted from 0."""
    micro_batch_tokens: int
    parts: int
    """Into how many micro-batches the step is divided at least, as far as it has examples."""
    recompute: bool
    loss_scale: float
    """The factor of fp16's gradient scaling, a power of two."""
    fraction_bits: int = FRACTION_BITS


@dataclass(frozen=True)
class StepOutcome:
    """What became of the micro-batches of a step."""

    loss: float
    """Mean over the label tokens; NaN if one is not finite."""
    finite: bool
    """Whether all gradients are finite."""
    grad_norm: float
    """L2 norm of all gradients; infinite if one is not finite."""
    too_large: bool
    """Whether a gradient does not fit into the fixed point."""
    out_of_memory: bool


class ExactSum:
    """A sum of fp32 gradients and losses that does not depend on its order: they are added as int64.

    Each number is multiplied by 2^fraction_bits and rounded to a whole number. Addition of whole numbers is
    associative, so every division among processes gives bitwise the same sum (Demmel and Nguyen, 2013, "Fast
    Reproducible Floating-Point Summation", with one bin whose place is fixed).
    """

    def __init__(self, parameters: Sequence[torch.nn.Parameter], device: torch.device) -> None:
        self._parameters = parameters
        size = sum(parameter.numel() for parameter in parameters)
        self.gradient = torch.zeros(size, device=device)
        """The gradients of all parameters, which are views of it."""
        self.sums = torch.zeros(size + _PLACES, dtype=torch.int64, device=device)
        """The sums of the gradients, then those of the _PLACES."""
        # on a CPU, in pieces that stay in its cache between the passes over them
        piece = CACHED_NUMBERS if device.type == "cpu" else max(1, size)
        self._pieces = list(
            zip(torch.split(self.gradient, piece), torch.split(self.sums[:-_PLACES], piece), strict=True)
        )
        self._whole = torch.empty(min(piece, size), dtype=torch.int64, device=device)

    def reset(self) -> None:
        """Set the sums to zero, and let the parameters accumulate their gradients in one buffer."""
        self.sums.zero_()
        self._set_views()

    def _set_views(self) -> None:
        self.gradient.zero_()
        parts = torch.split(self.gradient, [parameter.numel() for parameter in self._parameters])
        for parameter, part in zip(self._parameters, parts, strict=True):
            parameter.grad = part.view_as(parameter)

    def add(self, loss: torch.Tensor, *, count: int, loss_scale: float, fraction_bits: int) -> None:
        """Add the loss and the scaled gradients of one of `count` micro-batches, and clear the gradients."""
        scale = 2.0**fraction_bits / loss_scale
        lowest, highest = torch.aminmax(self.gradient)
        largest = torch.maximum(-lowest, highest) * scale
        finite = largest.isfinite()
        fits = largest < 2.0**62 / count
        for gradient, sums in self._pieces:
            sums += self._whole[: len(gradient)].copy_(gradient.mul_(scale).round_())
            gradient.zero_()
        loss_is_finite = loss.isfinite()
        safe_loss = torch.where(loss_is_finite, loss, 0.0).double() * 2.0**FRACTION_BITS
        places = (safe_loss.round(), ~loss_is_finite, ~finite, finite & ~fits)
        self.sums[_LOSS:_OUT_OF_MEMORY] += torch.stack([place.to(torch.int64) for place in places])

    def mark_out_of_memory(self) -> None:
        """Record that micro-batches are missing in the sums."""
        self.sums.zero_()
        self.sums[_OUT_OF_MEMORY] = 1

    def load(self, sums: torch.Tensor, *, fraction_bits: int = FRACTION_BITS) -> StepOutcome:
        """Set the parameters' gradients to the sums, without the loss scale; all to infinity if one was not finite.

        This is where the CPU waits for the GPU, once in a step: everything that it has to know comes in one transfer.
        """
        sums = sums.to(self.gradient.device)
        self._set_views()
        self.gradient.copy_(sums[:-_PLACES].double().mul_(2.0**-fraction_bits))
        norm = torch.nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None])
        fetched = torch.cat([sums[-_PLACES:].double(), norm.double()[None]])
        loss, bad_loss, bad, too_large, out_of_memory, grad_norm = fetched.tolist()
        if bad:
            self.gradient.fill_(math.inf)
        mean = math.nan if bad_loss else loss * 2.0**-FRACTION_BITS
        return StepOutcome(mean, not bad, math.inf if bad else grad_norm, too_large > 0, out_of_memory > 0)


class GradientComputer:
    """Compute the gradients of micro-batches with the forward passes of training."""

    def __init__(
        self,
        model: peft.PeftModel,
        pad_token_id: int,
        compute: ComputeSpec,
        *,
        seed: int,
        packed: bool = True,
        kernels: Kernels | None = None,
    ) -> None:
        self._model, self._compute = model, compute
        self._recompute: bool | None = None
        base: Any = model.get_base_model()
        self._base = base
        self.packing = PackedAttention(base) if packed and PackedAttention.supports(base) else None
        self._kernels = kernels or Kernels.for_device(compute.device)
        if compute.precision == "fp32" or (self.packing is not None and not variable_length.supports(base.config)):
            self._kernels = self._kernels.without_flash_attention()
        self._collator = Collator(pad_token_id, packed=self.packing is not None)
        can_record = self._kernels.graphs == "on" and self.packing is not None and has_linear_head(base)
        self._graphs = GraphedPasses(compute.device) if can_record else None
        self._buffer = DequantBuffer()  # kept as long as the recorded passes, which write to it
        self._keys = DropoutKeys(seed)
        self._seed = seed
        self.exact = ExactSum([p for p in model.parameters() if p.requires_grad], compute.device)

    @contextmanager
    def installed(self, *, efficient: bool = True) -> Iterator[list[str]]:
        """Put the model into training mode, with the dropout and the forward passes of training within the block.

        Yields the names of the base model's own dropout rates, which are switched off.
        """
        self._model.train()
        with (
            dropout.installed(self._model, self._keys) as switched_off,
            memory_efficient.patched(self._model, self._kernels, self._buffer) if efficient else nullcontext(),
            self.packing.installed() if self.packing else nullcontext(),
        ):
            yield switched_off

    def set_recompute(self, on: bool) -> None:
        """Choose whether the backward pass recomputes activations (gradient checkpointing)."""
        if on == self._recompute:
            return
        self._recompute = on
        if on:
            self._model.enable_input_require_grads()
            # reentrant: the other form does not free what bitsandbytes' layers store outside of autograd
            self._base.activation_checkpointing_enable({"use_reentrant": True})
        else:
            self._base.activation_checkpointing_disable()

    def split(self, examples: Sequence[EncodedExample], *, limit: int, parts: int = 1) -> list[MicroBatch]:
        """Split the examples of a step into micro-batches."""
        overhead = micro_batch_overhead(self._compute)
        return micro_batches(examples, limit=limit, overhead=overhead, padded=self.packing is None, parts=parts)

    def compute(
        self,
        batches: Sequence[MicroBatch],
        *,
        step: int,
        label_tokens: int,
        count: int,
        limit: int = MAX_TOKENS,
        loss_scale: float = 1.0,
        fraction_bits: int = FRACTION_BITS,
    ) -> torch.Tensor:
        """Return the sums of ExactSum over some of the `count` micro-batches of a step.

        The loss of a step is the mean over its `label_tokens`. Micro-batches are padded for CUDA graphs to at most
        `limit` tokens. If memory runs out, also without the recorded graphs, only that is recorded.
        """
        self.exact.reset()
        try:
            for batch in batches:
                loss = self._backward(batch, step, label_tokens, limit, loss_scale)
                self.exact.add(loss, count=count, loss_scale=loss_scale, fraction_bits=fraction_bits)
            return self.exact.sums
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        had_recordings = self._graphs is not None and self._graphs.clear()
        release_memory(self._compute.device)
        if had_recordings:
            return self.compute(
                batches,
                step=step,
                label_tokens=label_tokens,
                count=count,
                limit=limit,
                loss_scale=loss_scale,
                fraction_bits=fraction_bits,
            )
        self.exact.mark_out_of_memory()
        return self.exact.sums

    def _backward(
        self, micro_batch: MicroBatch, step: int, label_tokens: int, limit: int, loss_scale: float
    ) -> torch.Tensor:
        """Add the gradients of a micro-batch to those of the parameters; return its share of the loss."""
        lengths, packed = micro_batch.lengths, self.packing is not None
        inputs = self._collator(micro_batch.examples)
        inputs["dropout_tokens"] = self._keys.tokens(step, micro_batch.indices, lengths, packed=packed)
        inputs["label_tokens"], inputs["loss_scale"] = torch.tensor(float(label_tokens)), torch.tensor(loss_scale)
        # nothing else draws random numbers; what an architecture draws must not depend on other micro-batches
        torch.manual_seed(self._seed * 1_000_003 + step)
        padded = None if self._graphs is None or self._recompute else pad_inputs(inputs, lengths, limit)
        if padded is not None and self._graphs is not None:
            return self._graphs(self._passes, *padded)
        if self._kernels.attention == "varlen" and packed:
            inputs["boundaries"] = pad(torch.tensor(lengths).cumsum(0), (1, 0)).to(torch.int32)
        elif self.packing is not None:
            self.packing.set_sequence_lengths(lengths, self._compute.device)
        return self._passes(to_device(inputs, self._compute.device), max(lengths))

    def _passes(self, inputs: Inputs, longest: int) -> torch.Tensor:
        """Compute forward and backward pass of inputs on the device, where the CPU never waits; return the loss."""
        if self.packing is not None and "boundaries" in inputs:
            self.packing.set_texts(inputs["boundaries"], inputs["position_ids"][0], longest)
        self._keys.set_tokens(inputs["dropout_tokens"])
        padded = self._graphs is not None
        with self._compute.autocast():
            loss = mean_loss(self._model, inputs, label_tokens=inputs["label_tokens"], padded_labels=padded)
        (loss * inputs["loss_scale"]).backward()  # type: ignore[no-untyped-call]
        return loss.detach()


class StepComputer(GradientComputer):
    """Compute a process's share of a step, from the request alone."""

    def __init__(
        self,
        model: peft.PeftModel,
        examples: Sequence[EncodedExample],
        settings: Train,
        pad_token_id: int,
        compute: ComputeSpec,
    ) -> None:
        super().__init__(model, pad_token_id, compute, seed=settings.seed)
        self._examples, self._settings = examples, settings
        self._step: tuple[int, list[EncodedExample]] = (-1, [])

    def examples_of(self, step: int) -> list[EncodedExample]:
        """Return the examples of a step."""
        if step != self._step[0]:
            per_step = self._settings.batch_size * self._settings.gradient_accumulation_steps
            found = examples_of_step(self._examples, step, per_step=per_step, seed=self._settings.seed)
            self._step = (step, found)
        return self._step[1]

    def share(self, request: StepRequest, rank: int, size: int) -> torch.Tensor:
        """Return the sums over the micro-batches of process `rank` of `size`."""
        examples = self.examples_of(request.step)
        batches = self.split(examples, limit=request.micro_batch_tokens, parts=request.parts)
        costs = [self._cost(batch) for batch in batches]
        return self.compute(
            [batches[i] for i in deal(costs, size)[rank]],
            step=request.step,
            label_tokens=num_label_tokens(examples),
            count=len(batches),
            limit=request.micro_batch_tokens,
            loss_scale=request.loss_scale,
            fraction_bits=request.fraction_bits,
        )

    def _cost(self, batch: MicroBatch) -> int:
        tokens = sum(batch.lengths) if self.packing else len(batch.lengths) * max(batch.lengths)
        return tokens + micro_batch_overhead(self._compute)


def micro_batch_overhead(compute: ComputeSpec) -> int:
    """Return the cost of one more micro-batch on this device, as a number of tokens."""
    return MICRO_BATCH_OVERHEAD_TOKENS.get(compute.device.type, MICRO_BATCH_OVERHEAD_TOKENS["cuda"])


def deal(costs: Sequence[float], size: int) -> list[list[int]]:
    """Divide items among `size` processes: the most expensive first, each to the one with the least so far."""
    shares: list[list[int]] = [[] for _ in range(size)]
    totals = [0.0] * size
    for item in sorted(range(len(costs)), key=lambda i: -costs[i]):
        least = totals.index(min(totals))
        shares[least].append(item)
        totals[least] += costs[item]
    return shares
