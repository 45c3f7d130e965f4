"""How a step is split into micro-batches that fit into memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from job.settings import Train
from job.system.device import ComputeSpec
from job.training.batching import num_label_tokens
from job.types import EncodedExample

GIB = 2**30

CUDA_OVERHEAD = 0.5 * GIB
"""What a CUDA context and the allocator's fragments take, roughly."""


LOGIT_BYTES = 8.0
"""For each logit of a labelled position: in fp32, and once more in half precision or in passing."""

MEMORY_FRACTION = 0.8
"""The share of free memory that is planned with: estimates are rough, and others allocate too."""


@dataclass(frozen=True)
class BatchPlan:
    """How a step is cut to fit into memory."""

    micro_batch_tokens: int
    recompute: bool


def plan_batches(
    config: Any, examples: Sequence[EncodedExample], settings: Train, machine: ComputeSpec, *, most: int
) -> BatchPlan:
    """Micro-batches of as many tokens as are set, or else up to `most`, that fit into the memory now free.

    With checkpointing `auto`, activations are recomputed only if the longest example would not fit otherwise.
    """
    config = config.get_text_config()
    longest = max(len(example.input_ids) for example in examples)
    labels = num_label_tokens(examples) / sum(len(example.input_ids) for example in examples)
    free = MEMORY_FRACTION * machine.free_memory() - (CUDA_OVERHEAD if machine.device.type == "cuda" else 0.0)

    def fitting(*, recompute: bool) -> int:
        token = _token_bytes(config, longest, machine.dtype.itemsize, recompute=recompute)
        return int(max(1.0, free / (token + labels * LOGIT_BYTES * config.vocab_size)))

    recompute = settings.gradient_checkpointing == "on"
    if settings.gradient_checkpointing == "auto":
        recompute = fitting(recompute=False) < longest
    return BatchPlan(settings.micro_batch_tokens or min(most, fitting(recompute=recompute)), recompute)


def _token_bytes(config: Any, width: int, itemsize: int, *, recompute: bool) -> float:
    """Bytes of activations that a token keeps for the backward pass, in a text of so many tokens.

    Korthikanti et al. (2022, "Reducing Activation Recomputation"): 34 h + 5 a s a layer at two bytes a
    number, h the hidden size, a the heads, s the width. Recomputed, the layers' inputs and one layer.
    """
    layer = (34 * config.hidden_size + 5 * config.num_attention_heads * width) * itemsize / 2
    layers = config.num_hidden_layers
    return float(layers * config.hidden_size * itemsize + layer if recompute else layers * layer)
