"""The padding of micro-batches to few sizes, whose passes are recorded as CUDA graphs."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BloomConfig, LlamaConfig

from bench.gpu.gradients import cosine, own
from bench.gpu.models import SHAPES, Work, examples, texts_of_length
from job.dataset.tokenization import IGNORE_INDEX
from job.training import variable_length
from job.training.batching import Collator, num_label_tokens
from job.training.gradients import GradientComputer
from job.training.graphs import MAX_TEXTS, MAX_TOKENS, TOKENS_MULTIPLE, GraphedPasses, pad_inputs
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


def test_padding_needs_no_more_memory_than_was_planned() -> None:
    given, lengths = inputs(texts_of_length(5, 60))
    assert pad_inputs(given, lengths, TOKENS_MULTIPLE) is not None
    assert pad_inputs(given, lengths, TOKENS_MULTIPLE - 1) is None


def graphed(tmp_path: Path, shape: str = SHAPES[1]) -> tuple[GradientComputer, list[EncodedExample]]:
    """Return what computes gradients with padding and with graphs, which a CPU does not record."""
    work = Work(torch.device("cpu"), tmp_path, toy=True)
    compute = work.compute("bf16")
    kernels = Kernels(attention="varlen", graphs="on")
    return GradientComputer(work.model(shape, "none", compute), 3, compute, seed=42, kernels=kernels), examples(9)


def test_a_model_with_graphs_is_freed_without_garbage_collection(tmp_path: Path) -> None:
    computer, rows = graphed(tmp_path)
    computer.set_recompute(False)
    with computer.installed():
        computer.compute(computer.split(rows, limit=10**6), step=0, label_tokens=num_label_tokens(rows), count=1)
    alive = weakref.ref(computer)
    gc.collect()
    gc.disable()
    try:
        del computer
        assert alive() is None
    finally:
        gc.enable()


def test_memory_of_recordings_is_given_back_before_micro_batches_are_divided(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computer, rows = graphed(tmp_path)
    computer.set_recompute(False)
    parts = computer.split(rows, limit=200)
    label_tokens = num_label_tokens(rows)
    with computer.installed():
        expected = computer.compute(parts, step=0, label_tokens=label_tokens, count=len(parts)).clone()
        backward, fails = computer._backward, [2]

        def scarce(*arguments: Any) -> torch.Tensor:
            fails[0] -= 1
            if fails[0] == 0:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return backward(*arguments)

        monkeypatch.setattr(computer, "_backward", scarce)
        assert computer._graphs is not None
        computer._graphs._recordings[1,] = None  # type: ignore[assignment]
        found = computer.compute(parts, step=0, label_tokens=label_tokens, count=len(parts)).clone()
        assert torch.equal(found, expected)
        fails[0] = 1  # now without recordings
        found = computer.compute(parts, step=0, label_tokens=label_tokens, count=len(parts))
        assert computer.exact.load(found).out_of_memory


@pytest.mark.parametrize(("size", "fits"), [(64, True), (100, False), (256, True), (264, False)])
def test_heads_without_a_kernel_of_flash_attention_are_padded_in_groups(size: int, fits: bool) -> None:
    assert variable_length.supports(LlamaConfig(hidden_size=4 * size, num_attention_heads=4)) == fits
    assert variable_length.supports(LlamaConfig(hidden_size=64, num_attention_heads=4, head_dim=size)) == fits
    assert variable_length.supports(BloomConfig(hidden_size=4 * (size - 8), n_head=4)) == fits


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


class ForgedGraph:
    """A CUDA graph whose recording is what was computed meanwhile, and whose replay computes nothing."""

    def __init__(self) -> None:
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1

    def pool(self) -> str:
        return "pool"


@pytest.fixture
def forged_cuda(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Forge the recording of graphs on a CPU; `fails` makes the next recording end as an invalid one does."""
    forged: dict[str, Any] = {"fails": False, "streams": [], "pools": [], "garbage": []}

    @contextmanager
    def record(graph: ForgedGraph, pool: object) -> Iterator[None]:
        forged["pools"].append(pool)
        forged["garbage"].append(gc.isenabled())
        yield
        if forged["fails"]:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", ForgedGraph)
    monkeypatch.setattr(torch.cuda, "graph", record)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "stream of training")
    monkeypatch.setattr(torch.cuda, "set_stream", forged["streams"].append)
    return forged


def graphed_passes() -> tuple[GraphedPasses, list[int], Any]:
    """Return passes that are recorded, and the list of how many tokens each computation had."""
    graphs, computed = GraphedPasses(torch.device("cpu")), list[int]()
    graphs._records = True

    def passes(inputs: dict[str, torch.Tensor], longest: int) -> torch.Tensor:
        computed.append(inputs["input_ids"].numel())
        return inputs["input_ids"].sum()

    return graphs, computed, lambda size: graphs(passes, {"input_ids": torch.ones(1, size)}, 64)


def test_a_size_is_recorded_at_its_second_occurrence_and_replayed(forged_cuda: dict[str, Any]) -> None:
    graphs, computed, compute = graphed_passes()
    for size in (512, 1024, 512, 512, 1024, 512):
        compute(size)
    assert computed == [512, 1024, 512, 1024]
    assert [recording.graph.replays for recording in graphs._recordings.values()] == [3, 1]
    assert forged_cuda["pools"] == [None, "pool"], "the recordings share their memory"
    assert forged_cuda["garbage"] == [False, False], "a graph that is deleted meanwhile ends a recording"
    assert gc.isenabled()


def test_a_recording_that_fails_is_computed_and_no_other_is_tried(
    forged_cuda: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    graphs, computed, compute = graphed_passes()
    compute(512)
    forged_cuda["fails"] = True
    assert compute(512) == 512
    assert forged_cuda["streams"] == ["stream of training"]
    assert gc.isenabled() and "no CUDA graphs" in caplog.text
    compute(512)
    assert computed == [512, 512, 512, 512] and not graphs._recordings and not graphs.clear()
