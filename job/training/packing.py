"""Attention for packed rows: texts are concatenated, and no layer but attention computes padding."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.models.bloom.modeling_bloom import BloomAttention, build_alibi_tensor, dropout_add

from job.training.batching import partition_by_cost
from job.training.kernels import compute_dtype
from job.training.variable_length import VariableLengths, alibi_slopes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ATTENTION_NAME = "tagger_packed"
SDPA_INTERFACE_ARCHITECTURES = ("llama", "qwen2")
"""Architectures whose attention can be replaced through AttentionInterface, and that take position ids."""
GROUP_OVERHEAD = {"cpu": 64, "cuda": 1024}
"""The cost of one more attention call, as a number of padded tokens."""


BIAS_ALIGNMENT = 8
"""On a GPU the kernels of attention with a bias copy one whose width is no multiple of this."""


@dataclass(frozen=True)
class _LengthGroup:
    """Texts of similar length, padded on the right for one attention call."""

    rows: int
    width: int
    gather: torch.Tensor
    """int64 [rows * width]: the token of the row at each padded position; an arbitrary one where there is padding."""
    scatter: torch.Tensor
    """int64 [tokens]: the padded position of each token."""

    @classmethod
    def build(cls, lengths: Sequence[int], start: int, device: torch.device, *, multiple: int) -> _LengthGroup:
        """Build the group of ascending lengths whose texts begin at token `start`, with a width that is a multiple."""
        rows, width = len(lengths), math.ceil(lengths[-1] / multiple) * multiple
        mask = torch.arange(width) < torch.tensor(lengths)[:, None]
        scatter = mask.flatten().nonzero().flatten()
        gather = torch.full((mask.numel(),), start)
        gather[scatter] = torch.arange(start, start + len(scatter))
        return cls(rows, width, gather.to(device, non_blocking=True), scatter.to(device, non_blocking=True))

    def pad(self, row: torch.Tensor) -> torch.Tensor:
        """Pad the group's texts: from [tokens of the row, heads, head size] to [rows, heads, width, head size]."""
        return row.index_select(0, self.gather).view(self.rows, self.width, *row.shape[1:]).transpose(1, 2)


class PackedAttention:
    """Compute causal self-attention within each text of a packed row.

    Texts of similar length are padded and computed together, so that no text attends to another; only
    attention, a small part of the computation, computes padding. The padding is on the right, where
    causal attention from a real token never looks.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._uses_alibi = model.config.model_type == "bloom"
        self._slopes: torch.Tensor | None = None
        self._groups: list[_LengthGroup] = []
        self._alibi: torch.Tensor | None = None
        self._biases: dict[tuple[int, torch.dtype], torch.Tensor] = {}
        self._texts: VariableLengths | None = None

    @staticmethod
    def supports(model: PreTrainedModel) -> bool:
        """Return whether texts can be packed for this architecture; others are padded."""
        config = model.config
        if config.model_type == "bloom":
            return not config.slow_but_exact
        return config.model_type in SDPA_INTERFACE_ARCHITECTURES and not getattr(config, "use_sliding_window", False)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Replace the model's attention, and restore it at the end of the block, for generation uses its own."""
        # its name also keeps transformers from building a mask of the row's square, which nothing would use
        AttentionInterface.register(ATTENTION_NAME, self._interface_forward)
        config = self._model.config
        original = config._attn_implementation
        replaced = [module for module in self._model.modules() if isinstance(module, BloomAttention)]
        for module in replaced:
            module.forward = functools.partial(self._bloom_forward, module)  # type: ignore[method-assign]
        if self._uses_alibi:
            config._attn_implementation = ATTENTION_NAME
        else:
            self._model.set_attn_implementation(ATTENTION_NAME)
        try:
            yield
        finally:
            for module in replaced:
                del module.forward
            if self._uses_alibi:
                config._attn_implementation = original
            else:
                self._model.set_attn_implementation(original)

    def set_texts(self, boundaries: torch.Tensor, positions: torch.Tensor, longest: int) -> None:
        """Set the texts of the next row, for one kernel instead of groups (see VariableLengths)."""
        if self._uses_alibi and self._slopes is None:
            self._slopes = alibi_slopes(self._model.config.n_head, boundaries.device)
        self._texts = VariableLengths(boundaries, positions, longest, self._slopes)

    def set_sequence_lengths(self, lengths: Sequence[int], device: torch.device) -> None:
        """Set the lengths of the texts in the next row, in ascending order."""
        overhead = GROUP_OVERHEAD.get(device.type, GROUP_OVERHEAD["cuda"])
        multiple = BIAS_ALIGNMENT if self._uses_alibi and device.type == "cuda" else 1
        self._groups, start = [], 0
        for group in partition_by_cost(lengths, limit=sum(lengths), overhead=overhead, padded=True):
            self._groups.append(_LengthGroup.build(lengths[group], start, device, multiple=multiple))
            start += sum(lengths[group])
        self._biases.clear()
        if self._uses_alibi:
            self._alibi = _alibi(self._model.config.n_head, max(group.width for group in self._groups), device)

    def attention(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, scale: float, dropout: float
    ) -> torch.Tensor:
        """Compute attention for inputs of [tokens, heads, head size]; returns [1, tokens, heads, head size]."""
        dtype = compute_dtype(query, query.dtype)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        if self._texts is not None:
            return self._texts.attention(query, key, value, scale=scale)[None]
        outputs = []
        for number, group in enumerate(self._groups):
            q, k, v = (group.pad(x) for x in (query, key, value))
            if self._alibi is None:
                bias: dict[str, Any] = {"is_causal": True, "enable_gqa": query.shape[1] != key.shape[1]}
            else:
                bias = {"attn_mask": self._bias(self._alibi, number, dtype)}
            attended = scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scale, **bias)
            outputs.append(attended.transpose(1, 2).flatten(0, 1).index_select(0, group.scatter))
        return (outputs[0] if len(outputs) == 1 else torch.cat(outputs))[None]

    def _bias(self, alibi: torch.Tensor, number: int, dtype: torch.dtype) -> torch.Tensor:
        """Return the bias of a group, [1, heads, width, width]; all layers share it."""
        if (number, dtype) not in self._biases:
            width = self._groups[number].width
            self._biases[number, dtype] = alibi[:, :, :width, :width].to(dtype).contiguous()
        return self._biases[number, dtype]

    def _interface_forward(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *,
        scaling: float,
        dropout: float = 0.0,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        rows = (x[0].transpose(0, 1) for x in (query, key, value))
        return self.attention(*rows, scale=scaling, dropout=dropout), None

    def _bloom_forward(
        self, module: Any, hidden_states: torch.Tensor, residual: torch.Tensor, **_: Any
    ) -> tuple[torch.Tensor, None]:
        fused = module.query_key_value(hidden_states)[0]
        query, key, value = fused.view(len(fused), module.num_heads, 3, module.head_dim).unbind(2)
        dropout = module.attention_dropout.p if module.training else 0.0
        attended = self.attention(query, key, value, scale=module.inv_norm_factor, dropout=dropout)
        output = module.dense(attended.flatten(-2))
        return dropout_add(output, residual, module.hidden_dropout, module.training), None


def _alibi(heads: int, width: int, device: torch.device) -> torch.Tensor:
    """Build ALiBi (Press et al., 2022) and the causal mask as one additive bias, fp32 [1, heads, width, width].

    Distances are relative to the query and not to the start of the text: softmax gives the same result,
    and half precision represents the short distances, which matter most, exactly.
    """
    ones = torch.ones(1, width, device=device)
    by_key = build_alibi_tensor(ones, heads, torch.float32)
    future = torch.ones(width, width, dtype=torch.bool, device=device).triu(1)
    return (by_key - by_key.transpose(1, 2)).masked_fill(future, float("-inf"))[None]
