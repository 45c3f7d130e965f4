"""Intervals cover the true difference of two taggers as often as they promise."""

from __future__ import annotations

import pytest
from test_scores import answers

from job.metrics.bootstrap import BOOTSTRAP_SAMPLES, bootstrap_weights, f1_difference
from job.metrics.scores import score


def test_each_sample_has_as_many_texts_as_there_are() -> None:
    weights = bootstrap_weights(30)
    assert weights.shape == (BOOTSTRAP_SAMPLES, 30)
    assert set(weights.sum(axis=1)) == {30}
    assert weights.mean(axis=0) == pytest.approx(1, abs=0.2)
    assert (weights == bootstrap_weights(30)).all(), "the seed is fixed"


def test_95_of_100_intervals_contain_the_true_difference() -> None:
    gold, worse = answers(6000, correct=0.5, seed=1)
    better = answers(6000, correct=0.6, seed=1)[1]
    truth = f1_difference(gold, better, worse)[0]
    covered = 0
    for start in range(0, 6000, 60):
        part = slice(start, start + 60)
        low, high = f1_difference(gold[part], better[part], worse[part])[1]
        covered += low <= truth <= high
    assert 88 <= covered <= 99


def test_a_paired_interval_is_narrower_than_two_separate_ones() -> None:
    gold, old = answers(200, correct=0.5)
    new = [[*tags[:-1], gold[i][-1]] if i % 8 == 0 else tags for i, tags in enumerate(old)]
    difference, (low, high) = f1_difference(gold, new, old)
    assert 0 < low < difference < high
    separate = [score(gold, predicted).intervals["f1"] for predicted in (new, old)]
    assert separate[0][0] < separate[1][1], "the separate intervals overlap"


def test_a_tagger_does_not_differ_from_itself() -> None:
    gold, predicted = answers(50, correct=0.5)
    assert f1_difference(gold, predicted, predicted) == (0, [0, 0])
