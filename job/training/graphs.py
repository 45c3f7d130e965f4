"""CUDA graphs of the forward and backward pass of a micro-batch, and the padding that gives micro-batches one size."""

from __future__ import annotations

import gc
import itertools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import pad

from job.dataset.tokenization import IGNORE_INDEX
from job.system.device import release_memory

log = logging.getLogger(__name__)

Inputs = dict[str, torch.Tensor]
Passes = Callable[[Inputs, int], torch.Tensor]
"""Computes the gradients of inputs on the device, whose longest text has at most so many tokens; returns the loss."""

TOKENS_MULTIPLE = 512
"""Rows are padded to a multiple of this many tokens. On a GPU that waits for the CPU, padding takes no time."""
LABELS_MULTIPLE = 64
"""Label tokens are padded to a multiple of this many, which have logits."""
MAX_TOKENS = 4096
"""Larger micro-batches keep the GPU busy; they are not padded, and not recorded."""
MAX_TEXTS = 128
"""Texts of a padded row, those of padding included."""
MAX_RECORDINGS = 64
"""A recording takes a few MiB on the GPU; sizes beyond that are computed without."""
PADDING_TEXT = 64
"""Tokens of a text of padding, and the smallest maximum of the length of texts."""


def pad_inputs(inputs: Inputs, lengths: Sequence[int], limit: int = MAX_TOKENS) -> tuple[Inputs, int] | None:
    """Pad a packed row to one of few sizes; return it and the maximum of its texts' lengths.

    None if it is too large, or would have more than `limit` tokens, for which there may be no memory.

    The padding is texts of their own, so that no text attends to them, without label tokens. The padded `shift_labels`
    are IGNORE_INDEX, at position 0 of the row. `logits_to_keep` is left out: `kept` says the same.
    """
    tokens, labels = sum(lengths), len(inputs["shift_labels"])
    width, kept = padded_size(tokens, labels)
    missing = width - tokens
    padding = [min(PADDING_TEXT, missing - start) for start in range(0, missing, PADDING_TEXT)]
    texts = [*lengths, *padding]
    if width > min(limit, MAX_TOKENS) or len(texts) > MAX_TEXTS:
        return None
    ends = list(itertools.accumulate(texts))
    positions = [torch.arange(length) for length in padding]
    padded = {
        **{name: tensor for name, tensor in inputs.items() if name != "logits_to_keep"},
        "input_ids": pad(inputs["input_ids"], (0, missing)),
        "position_ids": torch.cat([inputs["position_ids"][0], *positions])[None],
        "dropout_tokens": pad(inputs["dropout_tokens"], (0, missing)),
        "kept": pad(inputs["kept"], (0, kept - labels)),
        "shift_labels": pad(inputs["shift_labels"], (0, kept - labels), value=IGNORE_INDEX),
        "boundaries": torch.tensor([0, *ends, *[width] * (MAX_TEXTS - len(texts))], dtype=torch.int32),
    }
    return padded, min(_power_of_two(max(texts), PADDING_TEXT), width)


def padded_size(tokens: int, labels: int) -> tuple[int, int]:
    """Return the tokens and the label tokens of a micro-batch that is padded."""
    sizes = ((tokens, TOKENS_MULTIPLE), (labels, LABELS_MULTIPLE))
    width, kept = (math.ceil(number / multiple) * multiple for number, multiple in sizes)
    return width, kept


def _power_of_two(number: int, least: int) -> int:
    return max(least, 1 << (number - 1).bit_length())


@dataclass
class _Recording:
    """A graph, the inputs that it reads and the loss that it writes."""

    graph: Any
    inputs: Inputs
    loss: torch.Tensor


class GraphedPasses:
    """Record the passes for each size of inputs at its second occurrence, and replay the recording from then on.

    The first occurrence is computed as usual, so that a size that does not return costs nothing, and so that everything
    exists that is made once. The recordings share their memory: one is replayed after another.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seen: set[tuple[int, ...]] = set()
        self._recordings: dict[tuple[int, ...], _Recording] = {}
        self._pool: Any = None
        self._records = device.type == "cuda"

    def __call__(self, passes: Passes, inputs: Inputs, longest: int) -> torch.Tensor:
        """Compute the gradients of padded inputs on the CPU (see pad_inputs); return the loss.

        The passes are always the same. They are no attribute, which would keep the model alive until the garbage is
        collected: they are a method of what these graphs belong to.
        """
        # every shape counts: a recording reads and writes memory of one size
        key = (longest, *(size for tensor in inputs.values() for size in tensor.shape))
        recording = self._recordings.get(key)
        if recording is None and key in self._seen and self._records and len(self._recordings) < MAX_RECORDINGS:
            recording = self._record(key, passes, inputs, longest)
        self._seen.add(key)
        if recording is None:
            return passes(to_device(inputs, self._device), longest)
        for name, tensor in inputs.items():
            recording.inputs[name].copy_(tensor, non_blocking=True)
        recording.graph.replay()
        return recording.loss

    def clear(self) -> bool:
        """Forget the recordings, which gives their memory back, and record no more: memory was short.

        Returns whether there were some.
        """
        had_some = bool(self._recordings)
        self._recordings.clear()
        self._pool, self._records = None, False
        return had_some

    def _record(self, key: tuple[int, ...], passes: Passes, inputs: Inputs, longest: int) -> _Recording | None:
        """Record the passes for inputs of this size; None, and no further attempt, if they cannot be recorded.

        What was recorded is forgotten then: if memory was short, the passes without a recording need its memory.
        """
        static = to_device(inputs, self._device)
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self._device)
        try:
            with _no_garbage_collection(), torch.cuda.graph(graph, pool=self._pool):
                loss = passes(static, longest)
        except RuntimeError as error:
            torch.cuda.set_stream(stream)  # torch leaves that of the recording as the current one
            log.warning("train: no CUDA graphs, which only makes training slower: %s", str(error).partition("\n")[0])
            loss = None
        if loss is None:
            self.clear()
            release_memory(self._device)
            return None
        self._pool = graph.pool()
        self._recordings[key] = _Recording(graph, static, loss)
        return self._recordings[key]


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Collect garbage before the block and none within it.

    Deleting a graph of an earlier training while another is recorded ends the recording, and CUDA's error then ends the
    process where bitsandbytes meets it.
    """
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def to_device(inputs: Inputs, device: torch.device) -> Inputs:
    """Copy inputs to the device; the CPU does not wait."""
    return {name: tensor.to(device, non_blocking=True) for name, tensor in inputs.items()}
