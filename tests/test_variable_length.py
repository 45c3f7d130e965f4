"""Attention within texts of any lengths by one kernel, and ALiBi as columns of queries and keys."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from bench.gpu.gradients import cosine, difference, own
from bench.gpu.models import SHAPES, Work, examples
from job.training.kernels import Kernels
from job.training.variable_length import VariableLengths, alibi_slopes, bias_columns


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_columns_add_the_bias_to_every_score(dtype: torch.dtype) -> None:
    bias = torch.arange(2000.0)[:, None] * torch.tensor([2**-0.5, 2**-1.5, 2**-8]) * 8
    ones, columns = bias_columns(bias, dtype)
    assert ones.dtype == columns.dtype == dtype
    products = (ones[:1].double() * columns.double()).sum(-1)
    assert float((products - bias).abs().max() / bias.max()) < 2**-23


def test_alibi_is_that_of_a_bias_on_the_scores() -> None:
    lengths, heads, size, scale = [3, 9, 70], 4, 16, 0.25
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(sum(lengths), heads, size, generator=generator).bfloat16() for _ in range(3))
    boundaries = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    tokens = torch.cat([torch.arange(length) for length in lengths])
    texts = VariableLengths(boundaries, tokens, max(lengths), alibi_slopes(heads, query.device))
    found = texts.attention(query, key, value, scale=scale)
    start = 0
    for length in lengths:
        text = slice(start, start + length)
        positions = torch.arange(length)
        slopes = 2.0 ** -torch.arange(2.0, 2 * heads + 1, 2)  # 2^-2, 2^-4, 2^-6, 2^-8 for four heads
        bias = (positions[None] - positions[:, None]) * slopes[:, None, None]
        bias = bias.masked_fill(positions[None] > positions[:, None], -torch.inf)
        q, k, v = (x[text].transpose(0, 1)[None].float() for x in (query, key, value))
        expected = scaled_dot_product_attention(q, k, v, attn_mask=bias[None], scale=scale)[0].transpose(0, 1)
        torch.testing.assert_close(found[text].float(), expected, rtol=2e-2, atol=2e-2)
        start += length


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_equal_those_of_padded_groups(tmp_path: Path, shape: str) -> None:
    work = Work(torch.device("cpu"), tmp_path, toy=True)
    compute, rows = work.compute("bf16"), examples(5)
    model = work.model(shape, "none", compute)
    loss, expected = own(model, rows, compute, kernels=Kernels(int8="dequantized"))
    other_loss, found = own(model, rows, compute, kernels=Kernels(int8="dequantized", attention="varlen"))
    assert other_loss == pytest.approx(loss, rel=1e-3)
    assert cosine(found, expected) > 0.9995, difference(found, expected)
