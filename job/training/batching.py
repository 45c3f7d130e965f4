"""Selection of the examples of an optimizer step, their micro-batches, and the tensors of a micro-batch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch.nn.utils.rnn import pad_sequence

from job.dataset.tokenization import IGNORE_INDEX
from job.types import EncodedExample


@dataclass(frozen=True)
class MicroBatch:
    """Examples of a step that are computed together."""

    examples: list[EncodedExample]
    indices: list[int]
    """The number of each example in its step, on which its dropout depends."""

    @property
    def lengths(self) -> list[int]:
        """The tokens of each example."""
        return [len(example.input_ids) for example in self.examples]


def examples_of_step(
    examples: Sequence[EncodedExample], step: int, *, per_step: int, seed: int
) -> list[EncodedExample]:
    """Return the `per_step` examples of an optimizer step (counted from 0); they depend on step and seed alone.

    Epochs follow one another without a gap, each a seeded permutation of all examples: every step has
    exactly `per_step` examples, and every example occurs once an epoch.
    """
    selected: list[EncodedExample] = []
    position = step * per_step
    while len(selected) < per_step:
        epoch, offset = divmod(position + len(selected), len(examples))
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order = torch.randperm(len(examples), generator=generator)[offset : offset + per_step - len(selected)]
        selected += [examples[i].for_epoch(epoch) for i in order.tolist()]
    return selected


def partition_by_cost(lengths: Sequence[int], *, limit: int, overhead: int, padded: bool) -> Iterator[slice]:
    """Split ascending lengths into consecutive groups of the lowest total cost, measured in computed tokens.

    A group costs `overhead` (its fixed cost, as a number of tokens) plus its tokens: the sum of its lengths,
    or, where rows are padded, the number of rows times the longest. A group has at most `limit` tokens,
    unless it is a single longer example. Dynamic programming over the end of the last group.
    """
    min_cost, last_start = [0.0], [0]  # for the first i lengths: the lowest cost, and where its last group starts
    for end in range(1, len(lengths) + 1):
        min_cost.append(float("inf"))
        last_start.append(end - 1)
        tokens = 0
        for start in range(end - 1, -1, -1):
            tokens = (end - start) * lengths[end - 1] if padded else tokens + lengths[start]
            if tokens > limit and end - start > 1:
                break
            if (cost := min_cost[start] + tokens + overhead) < min_cost[end]:
                min_cost[end], last_start[end] = cost, start
    bounds = [len(lengths)]
    while bounds[-1] > 0:
        bounds.append(last_start[bounds[-1]])
    bounds.reverse()
    return (slice(start, end) for start, end in pairwise(bounds))


def partition_evenly(lengths: Sequence[int], groups: int, *, padded: bool) -> list[slice]:
    """Split ascending lengths into at most `groups` consecutive groups, the largest of them as small as possible."""
    low, high = lengths[-1], len(lengths) * lengths[-1] if padded else sum(lengths)
    while low < high:
        limit = (low + high) // 2
        if len(_fill(lengths, limit, padded=padded)) <= groups:
            high = limit
        else:
            low = limit + 1
    return _fill(lengths, low, padded=padded)


def _fill(lengths: Sequence[int], limit: int, *, padded: bool) -> list[slice]:
    """Split ascending lengths, none above `limit` tokens, into groups that are filled up to it one after another."""
    bounds, tokens = [0], 0
    for end, length in enumerate(lengths):
        tokens = (end + 1 - bounds[-1]) * length if padded else tokens + length
        if tokens > limit:
            bounds.append(end)
            tokens = length
    return [slice(start, end) for start, end in pairwise([*bounds, len(lengths)])]


def micro_batches(
    examples: Sequence[EncodedExample], *, limit: int, overhead: int, padded: bool, parts: int = 1
) -> list[MicroBatch]:
    """Split the examples of a step, sorted by length, into micro-batches (see partition_by_cost).

    For several processes the number of micro-batches is a multiple of `parts`, if there are as many examples, and they
    are of similar size. The split changes memory and speed, and the step's result only by rounding. The longest
    examples come first: the others then fit into the memory that these have used, and a lack of memory shows at once.
    """
    by_length = sorted(range(len(examples)), key=lambda i: len(examples[i].input_ids))
    lengths = [len(examples[i].input_ids) for i in by_length]
    groups = list(partition_by_cost(lengths, limit=limit, overhead=overhead, padded=padded))
    if parts > 1:
        groups = partition_evenly(lengths, parts * math.ceil(len(groups) / parts), padded=padded)
    return [MicroBatch([examples[i] for i in by_length[group]], by_length[group]) for group in reversed(groups)]


def num_label_tokens(examples: Sequence[EncodedExample]) -> int:
    """Count the tokens that carry loss. The first token of a text has no context to be predicted from."""
    return sum(label != IGNORE_INDEX for example in examples for label in example.labels[1:])


class Collator:
    """Build the tensors of one micro-batch, and select the positions that carry loss.

    Padded, one row per example: `input_ids` and `attention_mask`, int64 [rows, width]. Packed, all examples
    concatenated in one row: `input_ids` and `position_ids`, int64 [1, tokens].
    Both: `logits_to_keep`, bool of the same shape, true where the next token is a label; `kept`, int64 [kept], the same
    as positions in the flattened rows, for on a GPU the CPU would wait for their number;
    `shift_labels`, int64 [kept], these labels in order. The model computes logits for the kept
    positions only: with a large vocabulary, logits take most of the memory and nearly half of the
    computation of a step.
    """

    def __init__(self, pad_token_id: int, *, packed: bool = False) -> None:
        self._pad_token_id = pad_token_id
        self._packed = packed

    def __call__(self, examples: Sequence[EncodedExample]) -> dict[str, torch.Tensor]:
        ids = [torch.tensor(example.input_ids) for example in examples]
        labels = [torch.tensor(example.labels) for example in examples]
        shifted = [torch.nn.functional.pad(row[1:], (0, 1), value=IGNORE_INDEX) for row in labels]
        if self._packed:
            rows = {
                "input_ids": torch.cat(ids)[None],
                "position_ids": torch.cat([torch.arange(len(row)) for row in ids])[None],
            }
            next_labels = torch.cat(shifted)[None]
        else:
            rows = {
                "input_ids": pad_sequence(ids, batch_first=True, padding_value=self._pad_token_id),
                "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
            }
            next_labels = pad_sequence(shifted, batch_first=True, padding_value=IGNORE_INDEX)
        keep = next_labels != IGNORE_INDEX
        kept = keep.flatten().nonzero().flatten()
        return {**rows, "shift_labels": next_labels[keep], "logits_to_keep": keep, "kept": kept}
