"""The padding of micro-batches to few sizes, whose passes are recorded as CUDA graphs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench.gpu.gradients import cosine, own
from bench.gpu.models import SHAPES, Work, examples, texts_of_length
from job.dataset.tokenization import IGNORE_INDEX
from job.training.batching import Collator
from job.training.graphs import MAX_TEXTS, MAX_TOKENS, TOKENS_MULTIPLE, pad_inputs
from job.training.kernels import Kernels
from job.types import EncodedExample

PLAIN = Kernels(attention="varlen", graphs="off")


def inputs(rows: list[EncodedExample]) -> tuple[dict[str, torch.Tensor], list[int]]:
    lengths = [len(row.input_ids) for row in rows]
    return {**Collator(3, packed=True)(rows), "dropout_tokens": torch.arange(sum(lengths))}, lengths


def test_padding_adds_texts_of_its_own_and_no_label() -> None:
    given, lengths = inputs(examples(7))
    found = pad_inputs(given, lengths)
    assert found is not None
    padded, longest = found
    tokens, labels = sum(lengths), len(given["shift_labels"])
    assert padded["input_ids"].shape[1] % TOKENS_MULTIPLE == 0
    assert padded["input_ids"][0, :tokens].tolist() == given["input_ids"][0].tolist()
    texts = padded["boundaries"].diff()
    assert texts[: len(lengths)].tolist() == lengths
    assert (int(texts.sum()), len(texts), int(texts.max()) <= longest) == (padded["input_ids"].numel(), MAX_TEXTS, True)
    assert padded["shift_labels"].tolist() == given["shift_labels"].tolist() + [IGNORE_INDEX] * (
        len(padded["kept"]) - labels
    )


def test_what_is_too_large_is_not_padded() -> None:
    assert pad_inputs(*inputs(texts_of_length(1, MAX_TOKENS + 1))) is None
    assert pad_inputs(*inputs(texts_of_length(MAX_TEXTS + 1, 12))) is None


@pytest.mark.parametrize("shape", SHAPES)
def test_padding_changes_no_gradient(tmp_path: Path, shape: str) -> None:
    work = Work(torch.device("cpu"), tmp_path, toy=True)
    compute, rows = work.compute("bf16"), examples(9)
    for quantize in ("none", "int8"):
        model = work.model(shape, quantize, compute, dropout=0.1)
        loss, expected = own(model, rows, compute, kernels=PLAIN)
        padded_loss, found = own(model, rows, compute, kernels=Kernels(attention="varlen", graphs="on"))
        assert padded_loss == pytest.approx(loss, rel=1e-4)
        assert cosine(found, expected) > 0.9995


def test_the_steps_of_a_run_have_few_sizes() -> None:
    sizes = set()
    for step in range(100):
        found = pad_inputs(*inputs(examples(16, seed=step)))
        assert found is not None
        padded, longest = found
        sizes.add((longest, *(tensor.shape for tensor in padded.values())))
    assert len(sizes) <= 12, "each size is computed twice before its recording is used"
