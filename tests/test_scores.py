"""Scores follow their definitions."""

from __future__ import annotations

import random
from dataclasses import asdict

import pytest
from sklearn.metrics import jaccard_score, precision_recall_fscore_support
from sklearn.preprocessing import MultiLabelBinarizer

from job.dataset.tags import normalise_tag
from job.metrics.scores import score, score_tags

FIGURES = ("precision", "recall", "f1", "macro_precision", "macro_recall", "macro_f1", "jaccard", "exact_match")


def answers(n: int, *, correct: float, seed: int = 0) -> tuple[list[list[str]], list[list[str]]]:
    """Return gold tags of n texts, and predicted tags of which about this share is correct."""
    chance = random.Random(seed)
    gold = [chance.sample("abcdefghij", chance.randint(1, 4)) for _ in range(n)]
    predicted = [[tag if chance.random() < correct else chance.choice("abcdefghijkl") for tag in tags] for tags in gold]
    return gold, predicted


def test_micro_scores_count_pairs_and_jaccard_counts_sets() -> None:
    scores = score([["a", "b"], ["a"], ["c"]], [["a"], ["a", "d"], []], [True, True, False])
    assert (scores.n, scores.well_formed) == (3, pytest.approx(2 / 3))
    assert scores.precision == pytest.approx(2 / 3)  # predicted a, a, d: both a are correct
    assert scores.recall == pytest.approx(2 / 4)  # gold a, b, a, c: both a are found
    assert scores.f1 == pytest.approx(2 * (2 / 3) * 0.5 / (2 / 3 + 0.5))
    assert scores.macro_f1 == pytest.approx((1 + 0 + 0 + 0) / 4)  # a, b, c, d
    assert scores.jaccard == pytest.approx((1 / 2 + 1 / 2 + 0) / 3)
    assert scores.exact_match == 0


def test_every_figure_equals_scikit_learn_s() -> None:
    gold, predicted = answers(80, correct=0.6)
    binarizer = MultiLabelBinarizer().fit([*gold, *predicted])
    truth, answer = binarizer.transform(gold), binarizer.transform(predicted)
    micro = precision_recall_fscore_support(truth, answer, average="micro", zero_division=0.0)[:3]
    macro = precision_recall_fscore_support(truth, answer, average="macro", zero_division=0.0)[:3]
    per_text = (jaccard_score(truth, answer, average="samples"), (truth == answer).all(axis=1).mean())
    found = asdict(score(gold, predicted))
    assert [found[name] for name in FIGURES] == pytest.approx([*micro, *macro, *per_text])


def test_the_scores_of_each_tag_equal_scikit_learn_s() -> None:
    gold, predicted = answers(80, correct=0.6)
    binarizer = MultiLabelBinarizer().fit([*gold, *predicted])
    each = precision_recall_fscore_support(
        binarizer.transform(gold), binarizer.transform(predicted), average=None, zero_division=0.0
    )
    expected = {
        tag: [*(round(float(x), 4) for x in (p, r, f)), n]
        for tag, p, r, f, n in zip(binarizer.classes_, *each, strict=True)
    }
    tags = score_tags(gold, predicted)
    assert {s.tag: [s.precision, s.recall, s.f1, s.gold] for s in tags} == expected
    assert [s.gold for s in tags] == sorted((s.gold for s in tags), reverse=True)


def test_an_interval_contains_its_figure_and_narrows_with_n() -> None:
    small, large = (score(*answers(n, correct=0.6)) for n in (40, 640))
    for scores in (small, large):
        for name in FIGURES:
            low, high = scores.intervals[name]
            assert low <= asdict(scores)[name] <= high, name
    widths = [scores.intervals["f1"][1] - scores.intervals["f1"][0] for scores in (small, large)]
    assert widths[0] == pytest.approx(4 * widths[1], rel=0.3)  # the square root of 16


def test_scores_and_intervals_are_the_same_each_time() -> None:
    assert score(*answers(40, correct=0.6)) == score(*answers(40, correct=0.6))


def test_order_case_and_separators_do_not_count() -> None:
    assert score([["Science Fiction", "life"]], [["life", "science-fiction"]]).f1 == 1
    assert normalise_tag("  Self_Help  Books ") == "self-help-books"


def test_no_answer_at_all_scores_zero() -> None:
    scores = score([["a"], ["b"]], [[], []], [False, False])
    assert {asdict(scores)[name] for name in FIGURES} == {0}


@pytest.mark.parametrize(("gold", "predicted", "f1"), [("a", "a", 1), ("a", "b", 0), ("a", "-", 0), ("-", "-", 1)])
def test_a_single_tag_is_scored(gold: str, predicted: str, f1: float) -> None:
    assert score([[gold]], [[predicted]]).f1 == f1
