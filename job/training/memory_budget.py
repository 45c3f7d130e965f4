"""The split of a step into micro-batches that fit into memory."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora import LoraLayer

from job.system.device import ComputeSpec
from job.training.batching import num_label_tokens
from job.training.graphs import MAX_TOKENS, TOKENS_MULTIPLE
from job.training.packing import PackedAttention
from job.types import EncodedExample

if TYPE_CHECKING:
    from job.settings import Train

GIB = 2**30

CUDA_OVERHEAD = 0.5 * GIB
"""Approximate bytes that the CUDA context and the fragmentation of the allocator take."""

LOGIT_BYTES = 8.0
"""Bytes for each logit of a label token: the fp32 logits, and a half-precision or temporary copy."""

MEMORY_SLACK = 1.06
"""By how much the estimate of packed layers exceeds what they keep, so that it is never less than what is used."""

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
    layer_bytes: float | None = None,
) -> BatchPlan:
    """Choose micro-batches that fit into the memory now free, of at most `max_tokens`; a configured size is kept.

    On a CPU, the free memory is shared by the job's `processes` on this machine.

    With gradient checkpointing `auto`, activations are recomputed only if the longest example does not fit
    otherwise. `config` is the configuration of the base model, `layer_bytes` what packed_layer_bytes returns.
    """
    config = config.get_text_config()
    longest = max(len(example.input_ids) for example in examples)
    label_share = num_label_tokens(examples) / sum(len(example.input_ids) for example in examples)
    on_gpu = compute.device.type == "cuda"
    free = MEMORY_FRACTION * compute.free_memory() / (1 if on_gpu else processes) - on_gpu * CUDA_OVERHEAD

    def tokens_that_fit(*, recompute: bool) -> int:
        itemsize = compute.dtype.itemsize
        activations = activation_bytes(config, longest, itemsize, recompute=recompute, layer_bytes=layer_bytes)
        return int(max(1.0, free / (activations + label_share * LOGIT_BYTES * config.vocab_size)))

    recompute = settings.gradient_checkpointing == "on"
    if settings.gradient_checkpointing == "auto":
        recompute = tokens_that_fit(recompute=False) < longest
    fit = tokens_that_fit(recompute=recompute)
    if on_gpu and TOKENS_MULTIPLE <= fit <= MAX_TOKENS:  # micro-batches are padded to such a multiple
        fit -= fit % TOKENS_MULTIPLE
    return BatchPlan(settings.micro_batch_tokens or min(max_tokens, fit), recompute)


def activation_bytes(
    config: Any, width: int, itemsize: int, *, recompute: bool, layer_bytes: float | None = None
) -> float:
    """Estimate the bytes of activations kept for the backward pass, for each token of a text of `width` tokens.

    Korthikanti et al. (2022, "Reducing Activation Recomputation"): 34 h + 5 a s for each layer with two-byte
    numbers, h the hidden size, a the attention heads, s the width. With recomputation: the inputs of all
    layers and the activations of one layer. `layer_bytes` are those of a layer where they are known.
    """
    hidden = _dimension(config, "hidden_size", "d_model", "n_embd")
    heads = _dimension(config, "decoder_attention_heads", "num_attention_heads")  # a Mamba or RWKV has none
    layers = _dimension(config, "decoder_layers", "num_hidden_layers", "n_layer")
    layer = layer_bytes or (34 * hidden + 5 * heads * width) * itemsize / 2 + _state_bytes(config, hidden)
    if not recompute:
        return float(layers * layer)
    # what a layer keeps does not include the gradients beside it: on an H100, 1.4 times as much in all
    return float(layers * hidden * itemsize + (1.5 * layer_bytes if layer_bytes else layer))


def packed_layer_bytes(model: Any, itemsize: int) -> float | None:
    """Estimate the bytes that a layer keeps for each token on a GPU, where texts are packed; None where they are not.

    The kernels of attention keep its inputs and output, and nothing of the size of its square. The norms keep their
    inputs in fp32. An adapter keeps its input, in fp32 if it comes from a norm, and a byte for each value of its mask.
    On an H100 in bf16 that was 30.0 bytes for each number of the hidden size for BLOOM and 30.7 for Llama, where 30.4
    and 30.9 were used; MEMORY_SLACK is added. `model` may have adapters, and may be on the meta device.
    """
    if not PackedAttention.supports(model):
        return None
    config = model.config
    hidden, heads = config.hidden_size, config.num_attention_heads
    keys = hidden * getattr(config, "num_key_value_heads", heads) / heads
    mlp = 4 * hidden if config.model_type == "bloom" else 2 * config.intermediate_size
    attention = (2 * hidden + 2 * keys) * itemsize * 9 / 8  # ALiBi's columns, or the padding of groups
    adapters = _adapter_bytes(model) / config.num_hidden_layers
    return float(MEMORY_SLACK * (8 * hidden + adapters + attention + mlp * itemsize))


def _adapter_bytes(model: torch.nn.Module) -> float:
    """Return the bytes that adapters keep for each token: masks, and inputs, which queries, keys and values share."""
    inputs: dict[str, int] = {}
    masks = 0
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            shared = re.sub(r"\b([qkv]|gate|up)_proj$", "input", name)
            inputs[shared] = max(inputs.get(shared, 0), int(module.in_features or 0))
            masks += int(module.in_features or 0) if any(rate.p for rate in _dropouts(module)) else 0
    return 4.0 * sum(inputs.values()) + masks


def _dropouts(module: LoraLayer) -> list[Any]:
    return [entry for entry in module.lora_dropout.values() if not isinstance(entry, torch.nn.Identity)]


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
