"""The confidence threshold with the best micro-F1."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from job.types import MIN_PROBABILITY

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
from job.dataset.tags import normalise_tag

ScoredTags = Sequence[tuple[str, float]]
"""Tags with their confidences."""


def best_threshold(gold: Sequence[Sequence[str]], ranked: Sequence[ScoredTags]) -> tuple[float, float]:
    """The confidence that tags had best be left out below for the highest micro-F1, and that F1.

    Of several that are as good, the lowest.
    """
    found = f1_curve(gold, ranked)
    best = max(found, key=lambda threshold: found[threshold])
    return best, found[best]


def f1_curve(gold: Sequence[Sequence[str]], ranked: Sequence[ScoredTags]) -> dict[float, float]:
    """Return the micro-F1 by threshold, for thresholds from 0 in steps of MIN_PROBABILITY."""
    answers, positives = match_predictions(gold, ranked)
    f1 = {}
    for threshold in (round(MIN_PROBABILITY * n, 4) for n in range(int(1 / MIN_PROBABILITY))):
        kept = [hit for confidence, _, hit in answers if confidence >= threshold]
        f1[threshold] = 2 * sum(kept) / (len(kept) + sum(positives))
    return f1


def match_predictions(
    gold: Sequence[Sequence[str]], ranked: Sequence[ScoredTags]
) -> tuple[list[tuple[float, int, bool]], list[int]]:
    """Confidence, text and rightness of each answer, and the number of right ones that each text has.

    Answers that are compared as one tag are one, as sure as the surest of them.
    """
    answers: list[tuple[float, int, bool]] = []
    true = [{normalise_tag(tag) for tag in tags} for tags in gold]
    for text, tags in enumerate(ranked):
        surest: dict[str, float] = {}
        for tag, confidence in tags:
            surest[normalise_tag(tag)] = max(confidence, surest.get(normalise_tag(tag), 0.0))
        answers += [(confidence, text, tag in true[text]) for tag, confidence in surest.items()]
    return answers, [len(tags) for tags in true]
