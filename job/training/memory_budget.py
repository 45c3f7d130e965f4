"""The split of a step into micro-batches that fit into memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from job.system.device import ComputeSpec
from job.training.batching import num_label_tokens
from job.types import EncodedExample

if TYPE_CHECKING:
    from job.settings import Train

GIB = 2**30

CUDA_OVERHEAD = 0.5 * GIB
"""Approximate bytes that the CUDA context and the fragmentation of the allocator take."""

LOGIT_BYTES = 8.0
"""Bytes for each logit of a label token: the fp32 logits, and a half-precision or temporary copy."""

MEMORY_FRACTION = 0.8
"""The share of free memory to plan with: the estimates are rough, and other processes allocate too."""


@dataclass(frozen=True)
class BatchPlan:
    """The size of micro-batches, and whether activations are recomputed."""

    micro_batch_tokens: int
    recompute: bool


def plan_batches(
    config: Any,
    examples: Sequence[EncodedExample],
    settings: Train,
    compute: ComputeSpec,
    *,
    max_tokens: int,
    processes: int = 1,
) -> BatchPlan:
    """Choose micro-batches that fit into the memory now free, of at most `max_tokens`; a configured size is kept.

    On a CPU, the free memory is shared by the job's `processes` on this machine.

    With gradient checkpointing `auto`, activations are recomputed only if the longest example does not fit
    otherwise. `config` is the configuration of the base model.
    """
    config = config.get_text_config()
    longest = max(len(example.input_ids) for example in examples)
    label_share = num_label_tokens(examples) / sum(len(example.input_ids) for example in examples)
    on_gpu = compute.device.type == "cuda"
    free = MEMORY_FRACTION * compute.free_memory() / (1 if on_gpu else processes) - on_gpu * CUDA_OVERHEAD

    def tokens_that_fit(*, recompute: bool) -> int:
        activations = activation_bytes(config, longest, compute.dtype.itemsize, recompute=recompute)
        return int(max(1.0, free / (activations + label_share * LOGIT_BYTES * config.vocab_size)))

    recompute = settings.gradient_checkpointing == "on"
    if settings.gradient_checkpointing == "auto":
        recompute = tokens_that_fit(recompute=False) < longest
    tokens = settings.micro_batch_tokens or min(max_tokens, tokens_that_fit(recompute=recompute))
    return BatchPlan(tokens, recompute)


def activation_bytes(config: Any, width: int, itemsize: int, *, recompute: bool) -> float:
    """Estimate the bytes of activations kept for the backward pass, for each token of a text of `width` tokens.

    Korthikanti et al. (2022, "Reducing Activation Recomputation"): 34 h + 5 a s for each layer with two-byte
    numbers, h the hidden size, a the attention heads, s the width. With recomputation: the inputs of all
    layers and the activations of one layer.
    """
    hidden = _dimension(config, "hidden_size", "d_model", "n_embd")
    heads = _dimension(config, "decoder_attention_heads", "num_attention_heads")  # a Mamba or RWKV has none
    layers = _dimension(config, "decoder_layers", "num_hidden_layers", "n_layer")
    layer = (34 * hidden + 5 * heads * width) * itemsize / 2 + _state_bytes(config, hidden)
    return float(layers * hidden * itemsize + layer if recompute else layers * layer)


def _state_bytes(config: Any, hidden: int) -> float:
    """Estimate the bytes that a state-space layer keeps for each token, in fp32 and without kernels of its own.

    Measured on tiny models. Mamba: the discretized matrices and the state, three numbers for each element of the state.
    Mamba-2 and xLSTM: about four for each head and each token of a chunk.
    """
    heads = _dimension(config, "mamba_n_heads", "n_mamba_heads", "mamba_num_heads", "num_heads")
    chunk = _dimension(config, "mamba_chunk_size", "chunk_size")
    if heads and chunk:
        return 4 * 4.0 * heads * chunk
    return (
        4
        * 3.0
        * _dimension(config, "expand", "mamba_expand")
        * hidden
        * _dimension(config, "state_size", "mamba_d_state")
    )


def _dimension(config: Any, *names: str) -> int:
    """Return the first of these numbers that the config has, the largest where it differs by layer; 0 if none."""
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, (list, tuple)) and value:
            value = max(value)
        if isinstance(value, int):
            return value
    return 0
