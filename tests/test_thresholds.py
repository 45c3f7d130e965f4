"""The calibrated threshold has the best micro-F1."""

from __future__ import annotations

import random

import pytest
from test_scores import answers

from job.metrics.scores import score
from job.metrics.thresholds import best_threshold, f1_curve


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

    threshold, best = best_threshold(gold, scored)
    assert best == pytest.approx(f1(threshold))
    assert best == pytest.approx(max(f1(n / 100) for n in range(100)))
    assert all(f1(n / 100) < best for n in range(round(threshold * 100)))


def test_spellings_of_one_tag_are_one_prediction() -> None:
    gold = [["self-help"]]
    assert f1_curve(gold, [[("Self Help", 0.2), ("self-help", 0.6)]]) == f1_curve(gold, [[("self-help", 0.6)]])
