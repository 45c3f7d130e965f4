"""Each baseline predicts what it promises, whatever the data."""

from __future__ import annotations

import json
from typing import Any

import pytest

from job.metrics.baselines import most_common_tags, score_baselines
from job.types import Example


def test_the_most_common_tags_are_as_many_as_a_text_has() -> None:
    train = [Example("1", ("a", "b")), Example("2", ("a", "b")), Example("3", ("a", "c"))]
    examples = [Example("4", ("a", "b")), Example("5", ("c",))]
    assert most_common_tags(train, examples) == [["a", "b"]] * 2
    scores = score_baselines(train, examples)["most_common_tags"]
    assert scores.precision == pytest.approx(2 / 4)
    assert scores.recall == pytest.approx(2 / 3)


def test_tfidf_learns_which_words_go_with_a_tag(rows: list[dict[str, Any]]) -> None:
    words = ["rain", "bread", "sea"] * 200
    examples = [Example(f"{row['quote']} {word}", (word,)) for row, word in zip(rows, words, strict=True)]
    scores = score_baselines(examples[:300], examples[300:])
    assert scores["tfidf"].recall > 0.95
    assert scores["tfidf"].f1 > scores["most_common_tags"].f1 + 0.2


@pytest.mark.parametrize(
    "tags",
    [["x"] * 40, ["x", "y"] * 20, [str(i) for i in range(40)]],
    ids=["one tag", "two", "each its own"],
)
def test_data_with_little_to_learn_have_baselines_too(tags: list[str]) -> None:
    for text in ("text {}", "?!"):
        examples = [Example(text.format(i), (tag,)) for i, tag in enumerate(tags)]
        scores = score_baselines(examples[:30], examples[30:])
        assert {s.n for s in scores.values()} == {10}
        json.dumps([vars(s) for s in scores.values()], allow_nan=False)
