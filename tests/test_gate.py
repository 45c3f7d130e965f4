"""The gate lets through what is shown to be no worse, and says by which numbers."""

from __future__ import annotations

import pytest

from job.gate import compare
from job.metrics.scores import score
from job.settings import Eval
from job.types import Prediction, Scores, Verdict

Evaluated = tuple[Scores, list[Prediction]]


def answered(right: int, n: int = 100, *, first: int = 0) -> Evaluated:
    """An evaluation on n texts, of which so many, from the first on, are answered with their tag."""
    good = range(first, first + right)
    predictions = [Prediction(str(i), ("a",), ("a" if i in good else "b",), "") for i in range(n)]
    return score([p.gold for p in predictions], [p.predicted for p in predictions]), predictions


def judged(new: Evaluated, old: Evaluated | None, **knobs: float) -> Verdict:
    return compare(Eval(gate="published", **knobs), *new, old, parent="c0ffee")


def test_the_floor_refuses_what_is_below_it() -> None:
    scores, predictions = answered(50)
    assert compare(Eval(gate="off", min_f1=0.9), scores, predictions, None).passed
    assert compare(Eval(gate="floor", min_f1=0.5), scores, predictions, None).passed
    verdict = compare(Eval(gate="floor", min_f1=0.6), scores, predictions, None)
    assert (verdict.verdict, verdict.reason) == (
        "fail",
        "the adapter's micro-F1 is 0.500, below TAGGER_EVAL_MIN_F1=0.6",
    )


def test_the_first_is_judged_by_the_floor() -> None:
    assert judged(answered(50), None, min_f1=0.5).passed
    assert judged(answered(50), None, min_f1=0.6).verdict == "fail"


@pytest.mark.parametrize(
    ("new", "old", "tolerance", "expected"),
    [
        (answered(80), answered(50), 0.0, "pass"),
        (answered(50), answered(80), 0.0, "fail"),
        (answered(50), answered(50), 0.0, "pass"),  # the same answers
        (answered(50), answered(50, first=40), 0.0, "insufficient evidence"),  # as good, but otherwise
        (answered(48), answered(50), 0.1, "pass"),
        (answered(48), answered(50), 0.0, "insufficient evidence"),
        (answered(50), answered(80), 0.1, "fail"),
        (answered(50), answered(80), 0.5, "pass"),
        (answered(29, 29), answered(0, 29), 0.0, "insufficient evidence"),
        (answered(30, 30), answered(0, 30), 0.0, "pass"),
    ],
)
def test_better_or_not_worse_by_more_than_the_tolerance_passes(
    new: Evaluated, old: Evaluated, tolerance: float, expected: str
) -> None:
    verdict = judged(new, old, tolerance=tolerance)
    assert verdict.verdict == expected, verdict.reason
    assert verdict.passed == (expected == "pass")
    assert verdict.parent == "c0ffee"


def test_the_verdict_gives_its_numbers() -> None:
    verdict = judged(answered(50), answered(80))
    assert (verdict.f1, verdict.published_f1, verdict.difference) == pytest.approx((0.5, 0.8, -0.3))
    assert verdict.interval is not None
    assert verdict.interval[0] < -0.3 < verdict.interval[1] < 0
    assert "micro-F1 is 0.500 and the published one's 0.800 on the same 100 examples: -0.300 (-0." in verdict.reason


def test_better_than_what_is_published_is_not_enough_below_the_floor() -> None:
    assert judged(answered(80), answered(50), min_f1=0.9).verdict == "fail"


def test_what_cannot_be_compared_does_not_pass() -> None:
    verdict = compare(Eval(gate="published"), *answered(80), None, broken="the adapter published in x no longer loads")
    assert verdict.verdict == "insufficient evidence"
    assert verdict.reason == "the adapter published in x no longer loads, so nothing can be compared with it"
