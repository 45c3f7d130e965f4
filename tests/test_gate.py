"""The gate passes an adapter that is shown to be no worse, and its verdict names the numbers."""

from __future__ import annotations

import pytest

from job.gate import compare
from job.metrics.scores import score
from job.settings import Eval
from job.types import Prediction, Scores, Verdict

Evaluated = tuple[Scores, list[Prediction]]


def evaluated(correct: int, n: int = 100, *, first: int = 0) -> Evaluated:
    """Return an evaluation on n texts with `correct` correct answers, starting at text `first`."""
    right = range(first, first + correct)
    predictions = [Prediction(str(i), ("a",), ("a" if i in right else "b",), "") for i in range(n)]
    return score([p.gold for p in predictions], [p.predicted for p in predictions]), predictions


def compare_published(new: Evaluated, old: Evaluated | None, **limits: float) -> Verdict:
    return compare(Eval(gate="published", **limits), *new, old, parent_commit="c0ffee")


def test_the_floor_rejects_a_lower_f1() -> None:
    scores, predictions = evaluated(50)
    assert compare(Eval(gate="off", min_f1=0.9), scores, predictions, None).passed
    assert compare(Eval(gate="floor", min_f1=0.5), scores, predictions, None).passed
    verdict = compare(Eval(gate="floor", min_f1=0.6), scores, predictions, None)
    assert (verdict.verdict, verdict.reason) == (
        "fail",
        "the adapter's micro-F1 is 0.500, below TAGGER_EVAL_MIN_F1=0.6",
    )


def test_the_floor_alone_decides_about_the_first_adapter() -> None:
    assert compare_published(evaluated(50), None, min_f1=0.5).passed
    assert compare_published(evaluated(50), None, min_f1=0.6).verdict == "fail"


@pytest.mark.parametrize(
    ("new", "old", "tolerance", "expected"),
    [
        (evaluated(80), evaluated(50), 0.0, "pass"),
        (evaluated(50), evaluated(80), 0.0, "fail"),
        (evaluated(50), evaluated(50), 0.0, "pass"),  # the same answers
        (evaluated(50), evaluated(50, first=40), 0.0, "insufficient evidence"),  # the same F1 on other texts
        (evaluated(48), evaluated(50), 0.1, "pass"),
        (evaluated(48), evaluated(50), 0.0, "insufficient evidence"),
        (evaluated(50), evaluated(80), 0.1, "fail"),
        (evaluated(50), evaluated(80), 0.5, "pass"),
        (evaluated(29, 29), evaluated(0, 29), 0.0, "insufficient evidence"),
        (evaluated(30, 30), evaluated(0, 30), 0.0, "pass"),
    ],
)
def test_an_adapter_passes_if_it_is_not_worse_by_the_tolerance(
    new: Evaluated, old: Evaluated, tolerance: float, expected: str
) -> None:
    verdict = compare_published(new, old, tolerance=tolerance)
    assert verdict.verdict == expected, verdict.reason
    assert verdict.passed == (expected == "pass")
    assert verdict.parent_commit == "c0ffee"


def test_the_verdict_gives_its_numbers() -> None:
    verdict = compare_published(evaluated(50), evaluated(80))
    assert (verdict.f1, verdict.published_f1, verdict.difference) == pytest.approx((0.5, 0.8, -0.3))
    assert verdict.interval is not None
    assert verdict.interval[0] < -0.3 < verdict.interval[1] < 0
    assert "micro-F1 is 0.500 and the published one's 0.800 on the same 100 examples: -0.300 (-0." in verdict.reason


def test_a_better_adapter_below_the_floor_fails() -> None:
    assert compare_published(evaluated(80), evaluated(50), min_f1=0.9).verdict == "fail"


def test_a_published_adapter_that_cannot_be_evaluated_is_not_replaced() -> None:
    load_error = "the adapter published in x no longer loads"
    verdict = compare(Eval(gate="published"), *evaluated(80), None, load_error=load_error)
    assert verdict.verdict == "insufficient evidence"
    assert verdict.reason == "the adapter published in x no longer loads, so nothing can be compared with it"
