"""Splits are reproducible, stable when data is added, and free of leaks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from conftest import SAYINGS

from job import data
from job.dataset.near_duplicates import near_duplicates
from job.dataset.split import split, split_calibration, split_digest, split_from
from job.errors import InvalidInputError
from job.settings import Data
from job.types import Example


def split_texts(texts: list[str], **settings: Any) -> tuple[set[str], set[str]]:
    train, held_out = split([Example(text, ("x",)) for text in texts], Data.model_validate(settings))
    return {e.text for e in train}, {e.text for e in held_out}


def test_a_split_without_training_or_held_out_examples_is_refused() -> None:
    texts = [f"{word} is a thing of its own" for word in ("rain", "bread", "iron", "winter", "salt", "paper")]
    with pytest.raises(InvalidInputError, match="EVAL_SIZE=6 holds out everything: the data has 6 examples"):
        split_texts(texts, eval_size=6)
    with pytest.raises(InvalidInputError, match="EVAL_SIZE=0.0001 leaves 0 of 6 examples for evaluation"):
        split_texts(texts, eval_size=0.0001)
    with pytest.raises(InvalidInputError, match="EVAL_SIZE=1 leaves 1 of 3 examples for evaluation and 0 for training"):
        split_texts(["a copy", "A copy", "a copy!"], eval_size=1)


def test_near_duplicates_are_never_on_both_sides(rows: list[dict[str, Any]]) -> None:
    texts = [row["quote"] for row in rows[:150]]
    changes = [
        lambda text: text.upper() + "!",
        lambda text: text.replace(",", " ,").replace(".", " ..."),
        lambda text: f"{text} And so it goes.",
        lambda text: " ".join(["Well,", *text.split()[1:]]),
    ]
    changed = {change(text): text for text in texts for change in changes if len(text) > 40}
    for seed in range(5):
        train, held_out = split_texts([*texts, *changed], eval_size=0.2, seed=seed)
        assert train
        assert held_out
        for variant, text in changed.items():
            assert not (variant in train and text in held_out), (variant, text)
            assert not (variant in held_out and text in train), (variant, text)


@pytest.mark.parametrize("copies", [3, 12, 60])
def test_many_copies_of_a_long_text_stay_together(rows: list[dict[str, Any]], copies: int) -> None:
    beginning = "the harbour master counted every lantern twice before he allowed himself to believe the boats were"
    variants = [f"{beginning} {i}" for i in range(copies)]
    for seed in range(5):
        train, held_out = split_texts(
            [*variants, *(row["quote"] for row in rows[: 4 * copies])], eval_size=0.3, seed=seed
        )
        assert len(train & set(variants)) in (0, copies)
        assert held_out


def test_a_number_holds_out_that_many_and_the_seed_which(rows: list[dict[str, Any]]) -> None:
    texts = [row["quote"] for row in rows]
    held_out = [split_texts(texts, eval_size=50, seed=seed)[1] for seed in (1, 1, 2)]
    assert [len(texts) for texts in held_out] == [50, 50, 50]
    assert held_out[0] == held_out[1] != held_out[2]


def test_with_a_fraction_new_data_moves_no_example(rows: list[dict[str, Any]]) -> None:
    texts = [row["quote"] for row in rows]
    train, held_out = split_texts(texts[:300], eval_size=0.2)
    more_train, more_held_out = split_texts(texts, eval_size=0.2)
    assert train < more_train
    assert held_out < more_held_out


def test_new_near_duplicates_move_no_example(rows: list[dict[str, Any]]) -> None:
    texts = [row["quote"] for row in rows[:200]]
    train, held_out = split_texts(texts, eval_size=0.2)
    variants = [f"{text} {more}" for text in texts for more in ("And so it goes.", "Or so they say.", "So be it.")]
    more_train, more_held_out = split_texts([*texts, *variants], eval_size=0.2)
    assert held_out == more_held_out & set(texts)
    assert more_train & set(texts) <= train  # near-duplicates of a new held-out text are left out
    everything = [*texts, *variants]
    near = near_duplicates(everything, np.array([text in more_held_out for text in everything]))
    assert more_train.isdisjoint(text for text, is_near in zip(everything, near, strict=True) if is_near)


def test_the_split_digest_depends_on_the_set_of_texts_alone(rows: list[dict[str, Any]]) -> None:
    examples = [Example(row["quote"], tuple(row["tags"])) for row in rows[:20]]
    other = Example("another text", ("x",))
    digest = split_digest(examples)
    assert digest == split_digest([Example(e.text, ("x",)) for e in reversed(examples)])
    assert digest != split_digest([*examples[1:], other])


def test_calibration_examples_come_from_the_training_examples() -> None:
    settings = Data(dataset=str(SAYINGS), calibration_size=40, eval_size=50)
    before = data.load(settings)
    after = split_calibration(before, settings)
    assert len(after.calibration) == 40
    assert after.held_out == before.held_out
    assert set(after.train) | set(after.calibration) <= set(before.train)
    assert not set(after.train) & set(after.calibration)
    assert split_calibration(before, settings) == after
    fractions = settings.model_copy(update={"eval_size": 0.2, "calibration_size": 0.2})
    by_fraction = split_calibration(data.load(fractions), fractions)
    ratio = len(by_fraction.calibration) / len(by_fraction.train)
    assert 0.1 < ratio < 0.4, "texts are hashed with another seed than for the held-out part"
    with pytest.raises(InvalidInputError, match="TAGGER_DATA_CALIBRATION_SIZE=9999 holds out everything"):
        split_calibration(before, settings.model_copy(update={"calibration_size": 9999}))


def test_a_text_that_is_held_out_elsewhere_leaves_the_training_data() -> None:
    examples = [Example(f"{word} is a thing of its own", ("x",)) for word in ("rain", "bread", "iron", "salt")]
    other = [Example("Rain is a thing of its own!", ("y",)), Example("something else altogether", ("y",))]
    train, held_out = split_from(examples, other)
    assert held_out == other
    assert train == examples[1:]
    with pytest.raises(InvalidInputError, match="hold all texts of the training data"):
        split_from(examples[:1], other)
