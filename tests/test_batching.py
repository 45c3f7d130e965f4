"""Every example is seen once an epoch, and micro-batches hold all examples of a step within the token limit."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from job.training.batching import Collator, examples_of_step, micro_batches, num_label_tokens, partition_by_cost
from job.types import EncodedExample

TWO = [EncodedExample([1, 2, 3, 4], [-100, -100, 3, 4]), EncodedExample([5, 6], [5, 6])]


def numbered(n: int) -> list[EncodedExample]:
    return [EncodedExample([i] * (1 + i % 7), [i] * (1 + i % 7)) for i in range(n)]


def test_each_epoch_has_its_own_permutation_of_tags() -> None:
    examples = [
        EncodedExample([i], [i], (EncodedExample([10 + i], [i]), EncodedExample([20 + i], [i]))) for i in range(4)
    ]
    seen = [examples_of_step(examples, step, per_step=4, seed=1) for step in range(4)]
    assert [sorted(example.input_ids[0] // 10 for example in step) for step in seen] == [[n] * 4 for n in (0, 1, 2, 0)]


@pytest.mark.parametrize(("n", "per_step"), [(10, 4), (3, 8), (16, 16), (7, 1)])
def test_each_epoch_sees_every_example_once_in_full_steps(n: int, per_step: int) -> None:
    examples = numbered(n)
    steps = [examples_of_step(examples, step, per_step=per_step, seed=1) for step in range(n)]
    assert {len(step) for step in steps} == {per_step}
    seen = [example.input_ids[0] for step in steps for example in step]
    for epoch in range(per_step):
        assert Counter(seen[epoch * n : (epoch + 1) * n]) == Counter(range(n))
    assert steps[-1] == examples_of_step(examples, n - 1, per_step=per_step, seed=1)


def test_the_seed_determines_the_order() -> None:
    a, b, again = (examples_of_step(numbered(50), 0, per_step=50, seed=seed) for seed in (1, 2, 1))
    assert a != b
    assert a == again


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("limit", [1, 30, 600, 10_000])
def test_micro_batches_keep_the_limit_and_hold_all_examples(limit: int, padded: bool) -> None:
    lengths = [5, 5, 6, 9, 12, 12, 40, 41, 130, 471]
    examples = [EncodedExample([i] * n, [i] * n) for i, n in reversed(list(enumerate(lengths)))]
    cut = list(micro_batches(examples, limit=limit, overhead=20, padded=padded))
    assert all(batch.examples == [examples[i] for i in batch.indices] for batch in cut)
    batches = [batch.examples for batch in cut]
    assert sorted(e.input_ids[0] for batch in batches for e in batch) == list(range(10))
    assert [len(e.input_ids) for batch in reversed(batches) for e in batch] == lengths, "the longest come first"
    for batch in batches:
        sizes = [len(example.input_ids) for example in batch]
        tokens = len(sizes) * max(sizes) if padded else sum(sizes)
        assert tokens <= limit or len(sizes) == 1


def test_the_partition_has_the_lowest_cost() -> None:
    assert list(partition_by_cost([10, 10, 100], limit=1000, overhead=20, padded=True)) == [slice(0, 2), slice(2, 3)]
    assert list(partition_by_cost([10, 10, 12], limit=1000, overhead=20, padded=True)) == [slice(0, 3)]
    assert list(partition_by_cost([10, 10, 100], limit=1000, overhead=20, padded=False)) == [slice(0, 3)]


def test_the_first_token_of_a_text_carries_no_loss() -> None:
    assert num_label_tokens(TWO) == 3


def test_padded_examples_have_one_row_each() -> None:
    batch = Collator(pad_token_id=9)(TWO)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4], [5, 6, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch["logits_to_keep"].tolist() == [[False, True, True, False], [True, False, False, False]]
    assert batch["shift_labels"].tolist() == [3, 4, 6]


def test_packed_examples_share_a_row_but_predict_only_their_own() -> None:
    batch = Collator(pad_token_id=9, packed=True)(TWO)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5, 6]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1]]
    assert batch["logits_to_keep"].tolist() == [[False, True, True, False, True, False]]
    assert batch["shift_labels"].tolist() == [3, 4, 6]
    assert batch["input_ids"].dtype == torch.int64
