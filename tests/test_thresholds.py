"""The calibrated threshold has the best micro-F1."""

from __future__ import annotations

import random

import pytest
from test_scores import answers

from job.metrics.scores import score
from job.metrics.thresholds import best_threshold, threshold_curve


def test_no_threshold_has_a_better_f1_and_no_lower_one_an_equal() -> None:
    chance = random.Random(3)
    gold, predicted = answers(60, correct=0.5)
    scored = []
    for tags, given in zip(gold, predicted, strict=True):
        confidences = {tag: chance.uniform(0.2, 0.9) if tag in tags else chance.uniform(0.0, 0.6) for tag in given}
        scored.append(list(confidences.items()))

    def f1(threshold: float) -> float:
        kept = [[tag for tag, confidence in tags if confidence >= threshold] for tags in scored]
        return score(gold, kept).f1

    curve = threshold_curve(gold, scored)
    best = best_threshold(curve)
    assert best.f1 == pytest.approx(f1(best.threshold))
    assert best.f1 == pytest.approx(max(f1(n / 100) for n in range(100)))
    assert all(f1(n / 100) < best.f1 for n in range(round(best.threshold * 100)))
    for point in curve:
        kept = [[tag for tag, confidence in tags if confidence >= point.threshold] for tags in scored]
        expected = score(gold, kept)
        assert (point.precision, point.recall) == pytest.approx((expected.precision, expected.recall))
        assert point.predicted == sum(map(len, kept))


def test_spellings_of_one_tag_are_one_prediction() -> None:
    gold = [["self-help"]]
    both = threshold_curve(gold, [[("Self Help", 0.2), ("self-help", 0.6)]])
    assert both == threshold_curve(gold, [[("self-help", 0.6)]])
