"""Gradients of the adapters: the job's packed and memory-efficient computation against the libraries' own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import peft
import torch
from torch.nn.utils.rnn import pad_sequence

from bench.gpu.harness import Row, Rows
from bench.gpu.models import SHAPES, Work, dequantize, examples
from bench.gpu.speed import kernel_variants
from job.dataset.tokenization import IGNORE_INDEX
from job.system.device import ComputeSpec
from job.training.batching import num_label_tokens
from job.training.gradients import GradientComputer
from job.training.kernels import Kernels
from job.types import EncodedExample

Gradients = dict[str, torch.Tensor]

MIN_COSINE = 0.999
"""The least cosine between gradients in half precision and those of the full computation in fp32."""
MAX_DIFFERENCE = 1e-3
"""The largest relative difference between gradients in fp32, in the L2 norm."""
NO_WORSE = 1.3
"""By how much the error may exceed that of the libraries' own computation in the same precision."""


def taken(model: peft.PeftModel) -> Gradients:
    """Return the gradients of the adapters in fp32 on the CPU, and clear them."""
    found = {name: p.grad.detach().float().cpu().clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def plain(model: peft.PeftModel, rows: Sequence[EncodedExample], compute: ComputeSpec) -> tuple[float, Gradients]:
    """Compute loss and gradients as the notebook does: padded rows, the libraries' forward passes, every logit."""
    ids = pad_sequence([torch.tensor(row.input_ids) for row in rows], batch_first=True)
    mask = pad_sequence([torch.ones(len(row.input_ids), dtype=torch.int64) for row in rows], batch_first=True)
    labels = pad_sequence([torch.tensor(row.labels) for row in rows], batch_first=True, padding_value=IGNORE_INDEX)
    with compute.autocast():
        loss = model(
            input_ids=ids.to(compute.device),
            attention_mask=mask.to(compute.device),
            labels=labels.to(compute.device),
            num_items_in_batch=num_label_tokens(rows),
            use_cache=False,
        ).loss
    loss.backward()
    return float(loss.detach()), taken(model)


def own(
    model: peft.PeftModel,
    rows: Sequence[EncodedExample],
    compute: ComputeSpec,
    *,
    limit: int = 10**6,
    recompute: bool = False,
    packed: bool = True,
    kernels: Kernels | None = None,
) -> tuple[float, Gradients]:
    """Compute loss and gradients as the job does: packed, memory-efficient, only the labelled positions."""
    computer = GradientComputer(model, 0, compute, seed=42, packed=packed, kernels=kernels)
    assert (computer.packing is not None) == packed
    computer.set_recompute(recompute)
    parts = computer.split(rows, limit=limit)
    with computer.installed():
        # a graph is recorded at the second time and replayed from then on
        for _ in range(3 if (kernels or Kernels.for_device(compute.device)).graphs == "on" else 1):
            sums = computer.compute(parts, step=0, label_tokens=num_label_tokens(rows), count=len(parts))
        outcome = computer.exact.load(sums)
    computer.set_recompute(False)
    assert outcome.finite, "the gradients are not finite"
    assert not outcome.out_of_memory
    assert not outcome.too_large
    return outcome.loss, taken(model)


def difference(found: Gradients, expected: Gradients) -> float:
    """Return the norm of the difference of two gradients, relative to that of the second."""
    assert found.keys() == expected.keys()
    apart = sum(float((found[name] - gradient).square().sum()) for name, gradient in expected.items())
    return float((apart / sum(float(gradient.square().sum()) for gradient in expected.values())) ** 0.5)


def cosine(found: Gradients, expected: Gradients) -> float:
    """Return the cosine of the angle between two gradients."""
    product = sum(float((found[name].double() * gradient.double()).sum()) for name, gradient in expected.items())
    norms = [sum(float(g.double().square().sum()) for g in side.values()) ** 0.5 for side in (found, expected)]
    return product / (norms[0] * norms[1])


def check_gradients(work: Work) -> Rows:
    """Compare packed, padded, divided and recomputed gradients in every quantization and precision.

    The reference is the full computation of transformers and peft in fp32, with the weights that the model has after
    its quantization and in its precision.
    """
    rows = examples(6 if work.toy else 16)
    for shape in SHAPES:
        for quantize in work.quantizations:
            for precision in work.precisions:
                yield _compare(work, shape, quantize, precision, rows)


def check_kernels(work: Work) -> Rows:
    """Compare the gradients of each choice of kernels, in the precision of `auto`: quick, and without the library."""
    compute, rows = work.compute("bf16" if work.toy else None), examples(6 if work.toy else 16)
    for shape, quantize in ((SHAPES[0], work.quantizations[0]), (SHAPES[1], "none")):
        expected_loss, expected = _reference(work, shape, quantize, compute.precision, rows)
        model = work.model(shape, quantize, compute)
        default = Kernels.for_device(work.device)
        for name, kernels in {"this job": default, **kernel_variants(work.device)}.items():
            what = f"{shape}, {quantize}, {compute.precision}: {name}"
            try:
                loss, found = own(model, rows, compute, kernels=kernels)
            except (RuntimeError, TypeError, ValueError, ImportError) as error:  # the others are compared all the same
                yield Row(what, False, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
                continue
            data = {"loss": loss, "cosine": cosine(found, expected), "difference": difference(found, expected)}
            figure = f"cosine {data['cosine']:.6f}, relative difference {data['difference']:.1e}, loss {loss:.5f}"
            close = data["cosine"] >= MIN_COSINE and abs(loss / expected_loss - 1) < 1e-2
            yield Row(what, close, f"{figure} (full computation {expected_loss:.5f})", data)


def _reference(
    work: Work, shape: str, quantize: str, precision: str, rows: Sequence[EncodedExample]
) -> tuple[float, Gradients]:
    """Return loss and gradients of the full computation in fp32, with the weights of the model in `precision`."""
    model = work.model(shape, quantize, work.compute(precision))
    dequantize(model)
    return plain(model.float(), rows, work.compute("fp32"))


def _compare(work: Work, shape: str, quantize: str, precision: str, rows: Sequence[EncodedExample]) -> Row:
    compute = work.compute(precision)
    expected_loss, expected = _reference(work, shape, quantize, precision, rows)
    model = work.model(shape, quantize, compute)
    loss, packed = own(model, rows, compute)
    found: dict[str, Any] = {
        "loss": loss,
        "expected_loss": expected_loss,
        "cosine": cosine(packed, expected),
        "difference": difference(packed, expected),
        "plain": difference(plain(model, rows, compute)[1], expected),
        "padded": difference(own(model, rows, compute, packed=False)[1], expected),
        "divided": difference(own(model, rows, compute, limit=200)[1], packed),
        "recomputed": difference(own(model, rows, compute, recompute=True)[1], packed),
    }
    for name, kernels in kernel_variants(work.device).items():
        if not name.startswith("optimizer"):
            found[name] = difference(own(model, rows, compute, kernels=kernels)[1], expected)
    return Row(f"{shape}, {quantize}, {precision}", _is_right(found, precision), _figure(found), found)


def _is_right(found: dict[str, Any], precision: str) -> bool:
    """Return whether loss and gradients are right; LLM.int8's own forward pass, which rounds more, is only shown."""
    if precision == "fp32":
        right = found["difference"] <= MAX_DIFFERENCE
    else:
        worst = max((found[n] for n in found if "=" in n and n != "int8=bitsandbytes"), default=0.0)
        right = found["cosine"] >= MIN_COSINE and worst <= max(NO_WORSE * found["plain"], 0.05)
    return right and abs(found["loss"] / found["expected_loss"] - 1) < 1e-2


def _figure(found: dict[str, Any]) -> str:
    names = [name for name in found if name not in ("loss", "expected_loss", "cosine", "difference")]
    others = ", ".join(f"{name} {found[name]:.1e}" for name in names)
    return f"cosine {found['cosine']:.6f}, relative difference {found['difference']:.1e} ({others})"
