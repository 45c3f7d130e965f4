"""Causal attention within texts of any lengths by one kernel: torch's FlashAttention, with ALiBi where needed."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers.models.bloom.modeling_bloom import build_alibi_tensor

ALIBI_TERMS = 3
"""How many half-precision numbers represent a bias: three of bf16 have the 24 bits of fp32."""
HEAD_SIZE_MULTIPLE, MAX_HEAD_SIZE = 8, 256
"""Sizes of heads that FlashAttention has kernels for."""
ALIBI_COLUMNS = 8
"""Columns that ALiBi adds to queries and keys, a multiple of HEAD_SIZE_MULTIPLE."""


class VariableLengths:
    """The texts of a packed row, as FlashAttention takes them.

    `boundaries`, int32 [texts + 1], are where each text begins and the last one ends. `positions`, int64 [tokens], are
    those of the tokens in their texts. No text has more than `longest` tokens. `slopes` are ALiBi's, fp32 [heads].

    FlashAttention takes no bias. ALiBi (Press et al., 2022) adds slope * (position of the key - position of the query)
    to a score, and softmax ignores what is equal for all keys of a query: slope * position of the key remains. This is
    a product of further columns, 1 in the queries and the bias in the keys. It is split into ALIBI_TERMS numbers of
    half precision; the kernel adds their products in fp32.
    """

    def __init__(
        self, boundaries: torch.Tensor, positions: torch.Tensor, longest: int, slopes: torch.Tensor | None
    ) -> None:
        self._boundaries, self._longest = boundaries, longest
        self._bias = None if slopes is None else positions[:, None] * slopes
        self._columns: dict[tuple[torch.dtype, float], tuple[torch.Tensor, torch.Tensor]] = {}

    def attention(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, scale: float) -> torch.Tensor:
        """Compute attention for inputs in half precision of [tokens, heads, head size]; returns the same shape."""
        size = value.shape[-1]
        if self._bias is not None:
            ones, columns = self._alibi(key.dtype, scale, self._bias)
            query, key = torch.cat([query, ones], -1), torch.cat([key, columns], -1)
            value = pad(value, (0, ALIBI_COLUMNS))
        if query.device.type == "cpu":  # FlashAttention has no such kernel there; this is the reference
            return self._text_by_text(query, key, value, scale)[..., :size]
        bounds, longest = self._boundaries, self._longest
        output: torch.Tensor = _flash_attention()(query, key, value, bounds, bounds, longest, longest, scale=scale)
        return output[..., :size]

    def _alibi(self, dtype: torch.dtype, scale: float, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the further columns of queries and keys, [tokens, heads, ALIBI_COLUMNS]; all layers share them."""
        if (dtype, scale) not in self._columns:
            self._columns[dtype, scale] = bias_columns(bias / scale, dtype)
        return self._columns[dtype, scale]

    def _text_by_text(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
        lengths: list[int] = self._boundaries.diff().tolist()
        assert max(lengths) <= self._longest, "the kernel would leave out the rest of the text"
        parts = [torch.split(x.transpose(0, 1), lengths, 1) for x in (query, key, value)]
        grouped = query.shape[1] != key.shape[1]
        outputs = [
            scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True, scale=scale, enable_gqa=grouped)[0]
            for q, k, v in zip(*parts, strict=True)
            if q.shape[1]
        ]
        return torch.cat(outputs, 1).transpose(0, 1)


def supports(config: Any) -> bool:
    """Return whether FlashAttention has kernels for the heads of a model that can be packed."""
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    size += ALIBI_COLUMNS if config.model_type == "bloom" else 0
    return bool(size % HEAD_SIZE_MULTIPLE == 0 and size <= MAX_HEAD_SIZE)


def alibi_slopes(heads: int, device: torch.device) -> torch.Tensor:
    """Return ALiBi's slope of each head, fp32 [heads]."""
    return build_alibi_tensor(torch.ones(1, 2, device=device), heads, torch.float32)[:, 0, 1]


def bias_columns(bias: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return columns for queries and keys whose product is the bias of a key, fp32 [tokens, heads].

    Both are [tokens, heads, ALIBI_COLUMNS] in a half-precision `dtype`.
    """
    terms, rest = [], bias
    for _ in range(ALIBI_TERMS):
        terms.append(rest.to(dtype))
        rest = rest - terms[-1].float()
    unused = (0, ALIBI_COLUMNS - ALIBI_TERMS)
    ones = pad(bias.new_ones(ALIBI_TERMS, dtype=dtype), unused).expand(*bias.shape, -1)
    return ones, pad(torch.stack(terms, -1), unused)


@functools.cache
def _flash_attention() -> Callable[..., Any]:
    """Return torch's causal variable-length attention; its parameters differ from version to version."""
    from torch.nn.attention.varlen import varlen_attn

    parameters = inspect.signature(varlen_attn).parameters
    fixed: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in parameters else {"is_causal": True}
    if "enable_gqa" in parameters:
        fixed["enable_gqa"] = True
    if "scale" in parameters:
        return functools.partial(varlen_attn, **fixed)

    def scaled(query: torch.Tensor, *others: Any, scale: float) -> Any:
        return varlen_attn(query * (scale * query.shape[-1] ** 0.5), *others, **fixed)

    return scaled
