"""Whether an adapter is good enough to be published."""

from __future__ import annotations

from job.results import GateFailed, Scores
from job.settings import Eval


def gate(settings: Eval, scores: Scores) -> None:
    """Raise GateFailed when the adapter is not good enough to be published."""
    if settings.gate == "floor" and scores.f1 < settings.min_f1:
        raise GateFailed(
            f"the adapter's micro-F1 is {scores.f1:.3f}, below TAGGER_EVAL_MIN_F1={settings.min_f1:g}: "
            "it is not published"
        )
