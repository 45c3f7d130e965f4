"""The estimates of memory against what PyTorch allocates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bench import measure
from bench.gpu.harness import Row, Rows
from bench.gpu.models import BLOOM, SHAPES, Work, examples, texts_of_length
from bench.gpu.speed import OwnTraining
from job.training.batching import num_label_tokens
from job.training.graphs import MAX_TOKENS, padded_size
from job.training.kernels import Kernels
from job.training.memory_budget import LOGIT_BYTES, activation_bytes, packed_layer_bytes
from job.types import EncodedExample

GIB = 2**30
TOO_MUCH = 1.2
"""The goal: an estimate is at most this many times what is allocated, and never less than that."""


@dataclass(frozen=True)
class _Shape:
    """A micro-batch to measure."""

    base: str
    quantize: str
    texts: Sequence[EncodedExample]
    recompute: bool


def check_memory(work: Work) -> Rows:
    """Compare the estimated activations and logits of a micro-batch with the peak of what is allocated."""
    compute = work.compute()
    quantized = work.quantizations[0]
    long = 64 if work.toy else 512
    for shape in (
        _Shape(BLOOM, quantized, examples(16), recompute=False),
        _Shape(BLOOM, quantized, texts_of_length(8, long), recompute=False),
        _Shape(BLOOM, "none", texts_of_length(8, long), recompute=False),
        _Shape(SHAPES[1], "none", texts_of_length(8, long), recompute=False),
        _Shape(SHAPES[1], "none", texts_of_length(8, 2 * long), recompute=True),
    ):
        model = work.model(shape.base, shape.quantize, compute, dropout=0.05)
        base: Any = model.get_base_model()
        tokens, labels = sum(len(text.input_ids) for text in shape.texts), num_label_tokens(shape.texts)
        graphs = Kernels.for_device(work.device).graphs == "on" and compute.precision != "fp32"
        padded = graphs and not shape.recompute and tokens <= MAX_TOKENS
        computed, with_logits = padded_size(tokens, labels) if padded else (tokens, labels)
        width, itemsize = max(len(text.input_ids) for text in shape.texts), compute.dtype.itemsize
        layer = packed_layer_bytes(base, itemsize)
        activations = computed * activation_bytes(
            base.config, width, itemsize, recompute=shape.recompute, layer_bytes=layer
        )
        logits = LOGIT_BYTES * with_logits * base.config.vocab_size
        estimate = (activations + logits) / GIB
        training = OwnTraining(model, compute, recompute=shape.recompute)
        training([examples(2)])  # what is allocated once, such as the moments of Adam, is not part of the figure
        peak = measure.watch_memory(work.device)
        training([shape.texts])
        used = peak()
        what = f"{shape.base}, {shape.quantize}, {tokens} tokens in texts of up to {width}"
        what += ", recomputed" if shape.recompute else ""
        on_gpu = work.device.type == "cuda"
        passed = used <= estimate <= TOO_MUCH * used if on_gpu else None
        figure = f"estimate {estimate:.2f} GiB (activations {activations / GIB:.2f}, logits {logits / GIB:.2f}), "
        figure += f"used {used:.2f} GiB: {estimate / max(used, 1e-9):.2f} x"
        data = {"estimate": estimate, "used": used, "activations": activations, "logits": logits, "tokens": tokens}
        yield Row(what, passed, figure, data)
        del model
        work.release()
