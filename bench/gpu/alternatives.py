"""Kernels of libraries that the job does not use, against its own: losses, and attention within packed texts."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn import functional

from bench import measure
from bench.gpu.harness import Row, Rows, installed
from bench.gpu.models import BLOOM, Work, config
from job.training.loss import LinearCrossEntropyFunction
from job.training.variable_length import VariableLengths

Call = Callable[[], torch.Tensor]
LABEL_TOKENS = (160, 2048)
"""Of a step of the recipe, and of a micro-batch with labels in every place."""
TEXT_LENGTH, TEXTS = 64, 16
HEADS, HEAD_SIZE = 9, 64
REPEATS = 10


def check_alternatives(work: Work) -> Rows:
    """Measure forward and backward pass of each, first the job's own; other packages where they are installed."""
    for rows in (8,) if work.toy else LABEL_TOKENS:
        yield from _compare(f"loss of {rows} label tokens", work, _losses(work, rows))
    yield from _compare(f"attention in {TEXTS} texts of {TEXT_LENGTH} tokens", work, _attentions(work))


def _compare(what: str, work: Work, ways: Iterator[tuple[str, Call]]) -> Rows:
    own: tuple[float, torch.Tensor] | None = None
    for name, call in ways:
        try:
            started = time.perf_counter()
            result = call()
            result_again = call()
            measure.synchronize(work.device)
            first = time.perf_counter() - started
            memory = measure.watch_memory(work.device)
            seconds = _median(call, work.device)
        except (RuntimeError, TypeError, NotImplementedError, ImportError) as error:  # what some versions lack
            yield Row(f"{what}: {name}", None, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
            continue
        assert torch.equal(result, result_again) or torch.allclose(result, result_again, rtol=1e-2)
        own = own or (seconds, result)
        apart = float((result.float() - own[1].float()).norm() / own[1].float().norm())
        figure = f"{1000 * seconds:.2f} ms, {seconds / own[0]:.2f} x the job's, {memory():.2f} GiB, the first two "
        figure += f"calls {first:.2f} s, relative difference of the gradient {apart:.1e}"
        yield Row(f"{what}: {name}", None, figure, {"seconds": seconds, "first": first, "difference": apart})


def _median(call: Call, device: torch.device) -> float:
    seconds = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        call()
        measure.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def _losses(work: Work, rows: int) -> Iterator[tuple[str, Call]]:
    """Yield functions that return the gradient of the hidden states, [rows, hidden size]."""
    shape: Any = config(BLOOM, toy=work.toy)
    draw = torch.Generator(work.device).manual_seed(0)
    options: Any = {"device": work.device, "generator": draw}
    dtype = work.compute().dtype
    head = torch.randn(shape.vocab_size, shape.hidden_size, **options).mul_(0.02).to(dtype)
    hidden = torch.randn(rows, shape.hidden_size, **options).to(dtype).requires_grad_()
    labels = torch.randint(shape.vocab_size, (rows,), **options)

    def of(loss: Callable[[], torch.Tensor]) -> Call:
        def call() -> torch.Tensor:
            return torch.autograd.grad(loss(), hidden)[0]

        return call

    yield "the job's", of(lambda: LinearCrossEntropyFunction.apply(hidden, head, labels, False))  # type: ignore[no-untyped-call]
    yield "plain", of(lambda: functional.cross_entropy((hidden @ head.T).float(), labels, reduction="sum"))
    if installed("liger_kernel"):
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss  # type: ignore[import-not-found]

        liger = LigerFusedLinearCrossEntropyLoss(reduction="sum")
        yield "Liger's", of(lambda: liger(head, hidden, labels))
    if hasattr(functional, "linear_cross_entropy"):
        fused: Any = functional.linear_cross_entropy
        yield "torch's", of(lambda: fused(hidden, head, labels, reduction="sum"))


def _attentions(work: Work) -> Iterator[tuple[str, Call]]:
    """Yield functions that return the gradient of the queries, [tokens, heads, head size]."""
    tokens = TEXTS * TEXT_LENGTH
    dtype = torch.bfloat16 if work.compute().precision == "fp32" else work.compute().dtype
    draw = torch.Generator(work.device).manual_seed(0)
    query, key, value = (
        torch.randn(tokens, HEADS, HEAD_SIZE, device=work.device, generator=draw).to(dtype).requires_grad_()
        for _ in range(3)
    )
    bounds = torch.arange(0, tokens + 1, TEXT_LENGTH, dtype=torch.int32, device=work.device)
    positions = torch.arange(TEXT_LENGTH, device=work.device).repeat(TEXTS)
    own = VariableLengths(bounds, positions, TEXT_LENGTH, None)
    scale = HEAD_SIZE**-0.5
    yield "the job's", lambda: _gradient(own.attention(query, key, value, scale=scale), query)
    text = torch.arange(tokens, device=work.device) // TEXT_LENGTH

    def within(batch: Any, head: Any, q: Any, k: Any) -> Any:
        return (q >= k) & (text[q] == text[k])

    if work.device.type == "cuda":
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        compiled: Any = torch.compile(flex_attention, dynamic=True)

        def flexible() -> torch.Tensor:
            mask = create_block_mask(within, None, None, tokens, tokens, device="cuda")
            batched = [x.transpose(0, 1)[None] for x in (query, key, value)]
            return _gradient(compiled(*batched, block_mask=mask, scale=scale)[0].transpose(0, 1), query)

        yield "flex_attention, compiled", flexible


def _gradient(output: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    weight = torch.arange(output.shape[-1], device=output.device).to(output.dtype)
    return torch.autograd.grad((output * weight).sum(), query)[0]
