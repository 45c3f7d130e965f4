"""The scores are those that the definitions give."""

from __future__ import annotations

import random
from dataclasses import asdict

import pytest
from sklearn.metrics import jaccard_score, precision_recall_fscore_support
from sklearn.preprocessing import MultiLabelBinarizer

from job.dataset.tags import normalise_tag
from job.metrics.bootstrap import f1_difference
from job.metrics.scores import score, score_tags
from job.metrics.thresholds import best_threshold

FIGURES = ("precision", "recall", "f1", "macro_precision", "macro_recall", "macro_f1", "jaccard", "exact_match")


def answers(n: int, *, right: float, seed: int = 0) -> tuple[list[list[str]], list[list[str]]]:
    """Tags of n texts, and answers of which so many are right."""
    chance = random.Random(seed)
    gold = [chance.sample("abcdefghij", chance.randint(1, 4)) for _ in range(n)]
    return gold, [[tag if chance.random() < right else chance.choice("abcdefghijkl") for tag in tags] for tags in gold]


def test_micro_scores_and_jaccard_count_pairs_and_sets() -> None:
    scores = score([["a", "b"], ["a"], ["c"]], [["a"], ["a", "d"], []], [True, True, False])
    assert (scores.n, scores.well_formed) == (3, pytest.approx(2 / 3))
    assert scores.precision == pytest.approx(2 / 3)  # of a, a, d: both a
    assert scores.recall == pytest.approx(2 / 4)  # of a, b, a, c: both a
    assert scores.f1 == pytest.approx(2 * (2 / 3) * 0.5 / (2 / 3 + 0.5))
    assert scores.macro_f1 == pytest.approx((1 + 0 + 0 + 0) / 4)  # of a, b, c, d
    assert scores.jaccard == pytest.approx((1 / 2 + 1 / 2 + 0) / 3)
    assert scores.exact_match == 0


def test_every_figure_is_scikit_learn_s() -> None:
    gold, predicted = answers(80, right=0.6)
    binarizer = MultiLabelBinarizer().fit([*gold, *predicted])
    truth, answer = binarizer.transform(gold), binarizer.transform(predicted)
    micro = precision_recall_fscore_support(truth, answer, average="micro", zero_division=0.0)[:3]
    macro = precision_recall_fscore_support(truth, answer, average="macro", zero_division=0.0)[:3]
    alike = (jaccard_score(truth, answer, average="samples"), (truth == answer).all(axis=1).mean())
    found = asdict(score(gold, predicted))
    assert [found[name] for name in FIGURES] == pytest.approx([*micro, *macro, *alike])

    each = precision_recall_fscore_support(truth, answer, average=None, zero_division=0.0)
    expected = {
        tag: [*(round(float(x), 4) for x in (p, r, f)), n]
        for tag, p, r, f, n in zip(binarizer.classes_, *each, strict=True)
    }
    tags = score_tags(gold, predicted)
    assert {s.tag: [s.precision, s.recall, s.f1, s.gold] for s in tags} == expected
    assert [s.gold for s in tags] == sorted((s.gold for s in tags), reverse=True)


def test_an_interval_holds_its_figure_narrows_with_more_examples_and_is_the_same_each_time() -> None:
    small, large = (score(*answers(n, right=0.6)) for n in (40, 640))
    for scores in (small, large):
        for name in FIGURES:
            low, high = scores.intervals[name]
            assert low <= asdict(scores)[name] <= high, name
    widths = [scores.intervals["f1"][1] - scores.intervals["f1"][0] for scores in (small, large)]
    assert widths[0] == pytest.approx(4 * widths[1], rel=0.3)  # by the square root of 16
    assert score(*answers(40, right=0.6)) == small


def test_95_of_100_intervals_hold_the_true_difference() -> None:
    """Of two taggers of known quality, the difference on ever new samples of texts."""
    gold, worse = answers(6000, right=0.5, seed=1)
    better = answers(6000, right=0.6, seed=1)[1]
    truth = f1_difference(gold, better, worse)[0]
    held = 0
    for start in range(0, 6000, 60):
        part = slice(start, start + 60)
        low, high = f1_difference(gold[part], better[part], worse[part])[1]
        held += low <= truth <= high
    assert 88 <= held <= 99


def test_a_paired_difference_is_surer_than_two_intervals() -> None:
    gold, old = answers(200, right=0.5)
    new = [[*tags[:-1], gold[i][-1]] if i % 8 == 0 else tags for i, tags in enumerate(old)]
    difference, (low, high) = f1_difference(gold, new, old)
    assert 0 < low < difference < high
    apart = [score(gold, side).intervals["f1"] for side in (new, old)]
    assert apart[0][0] < apart[1][1], "their own intervals overlap"
    assert f1_difference(gold, old, old) == (0, [0, 0])


def test_order_case_and_spelling_of_white_space_do_not_count() -> None:
    assert score([["Science Fiction", "life"]], [["life", "science-fiction"]]).f1 == 1
    assert normalise_tag("  Self_Help  Books ") == "self-help-books"


def test_no_answer_at_all_scores_zero() -> None:
    scores = score([["a"], ["b"]], [[], []], [False, False])
    assert {asdict(scores)[name] for name in FIGURES} == {0}


@pytest.mark.parametrize(("gold", "predicted", "f1"), [("a", "a", 1), ("a", "b", 0), ("a", "-", 0), ("-", "-", 1)])
def test_data_with_a_single_tag_are_scored_too(gold: str, predicted: str, f1: float) -> None:
    assert score([[gold]], [[predicted]]).f1 == f1


def test_the_threshold_is_the_one_with_the_best_f1_and_no_other_has_a_better() -> None:
    chance = random.Random(3)
    gold, predicted = answers(60, right=0.5)
    ranked = []
    for tags, given in zip(gold, predicted, strict=True):
        likely = {tag: chance.uniform(0.2, 0.9) if tag in tags else chance.uniform(0.0, 0.6) for tag in given}
        ranked.append(list(likely.items()))

    def f1(threshold: float) -> float:
        kept = [[tag for tag, confidence in tags if confidence >= threshold] for tags in ranked]
        return score(gold, kept).f1

    threshold, best = best_threshold(gold, ranked)
    assert best == pytest.approx(f1(threshold))
    assert best == pytest.approx(max(f1(n / 100) for n in range(100)))
    assert all(f1(n / 100) < best for n in range(round(threshold * 100)))
