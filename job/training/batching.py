"""Which examples an optimizer step sees, and the micro-batches it is cut into."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch.nn.utils.rnn import pad_sequence

from job.dataset.tokenization import IGNORE_INDEX
from job.types import EncodedExample


def examples_of_step(
    examples: Sequence[EncodedExample], step: int, *, per_step: int, seed: int
) -> list[EncodedExample]:
    """The examples of an optimizer step (counted from 0): the same ones whatever ran before it.

    Epochs follow one another without a gap, each a seeded permutation of all examples, so every step
    has exactly `per_step` of them and every example comes once an epoch.
    """
    chosen: list[EncodedExample] = []
    position = step * per_step
    while len(chosen) < per_step:
        epoch, offset = divmod(position + len(chosen), len(examples))
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order = torch.randperm(len(examples), generator=generator)[offset : offset + per_step - len(chosen)]
        chosen += [examples[i].for_epoch(epoch) for i in order.tolist()]
    return chosen


def partition_by_cost(lengths: Sequence[int], *, limit: int, overhead: int, padded: bool) -> Iterator[slice]:
    """Cut ascending lengths into consecutive groups that cost the least, in tokens computed.

    A group costs `overhead` (what starting it takes, as tokens) and its tokens: their sum, or where
    rows are padded, rows times the longest. No group has more than `limit` tokens, unless it is one
    example that alone is longer.
    """
    best, start = [0.0], [0]  # cost of the first i lengths, and where their last group begins
    for end in range(1, len(lengths) + 1):
        best.append(float("inf"))
        start.append(end - 1)
        tokens = 0
        for begin in range(end - 1, -1, -1):
            tokens = (end - begin) * lengths[end - 1] if padded else tokens + lengths[begin]
            if tokens > limit and end - begin > 1:
                break
            if (cost := best[begin] + tokens + overhead) < best[end]:
                best[end], start[end] = cost, begin
    ends = [len(lengths)]
    while ends[-1] > 0:
        ends.append(start[ends[-1]])
    ends.reverse()
    return (slice(begin, end) for begin, end in pairwise(ends))


def micro_batches(
    examples: Sequence[EncodedExample], *, limit: int, overhead: int, padded: bool
) -> Iterator[Sequence[EncodedExample]]:
    """The examples of a step, sorted by length and cut; the cut changes what is computed at once, not the result.

    The longest come first, so that what the others need fits where theirs was, and memory that does
    not suffice is found at once.
    """
    by_length = sorted(examples, key=lambda example: len(example.input_ids))
    lengths = [len(example.input_ids) for example in by_length]
    parts = list(partition_by_cost(lengths, limit=limit, overhead=overhead, padded=padded))
    return (by_length[part] for part in reversed(parts))


def num_label_tokens(examples: Sequence[EncodedExample]) -> int:
    """Tokens that carry loss. The first of a text has nothing before it to be predicted from."""
    return sum(label != IGNORE_INDEX for example in examples for label in example.labels[1:])


class Collator:
    """Makes one micro-batch of examples, and picks the positions that carry loss.

    Padded, a row an example: `input_ids`, `attention_mask` and `labels`, int64 [rows, width]. Packed,
    all examples end to end in one row: `input_ids`, `position_ids` and `labels`, int64 [1, tokens].
    Both: `logits_to_keep`, bool of the same shape, true where the next token is a label;
    `shift_labels`, int64 [kept], those labels in order. The model computes logits for the kept
    positions alone: with a large vocabulary most of the memory and nearly half of the work of a step
    are logits.
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
                "labels": torch.cat(labels)[None],
            }
            next_labels = torch.cat(shifted)[None]
        else:
            rows = {
                "input_ids": pad_sequence(ids, batch_first=True, padding_value=self._pad_token_id),
                "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
                "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX),
            }
            next_labels = pad_sequence(shifted, batch_first=True, padding_value=IGNORE_INDEX)
        keep = next_labels != IGNORE_INDEX
        return {**rows, "shift_labels": next_labels[keep], "logits_to_keep": keep}
