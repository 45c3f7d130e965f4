"""The confidence threshold with the best micro-F1."""

from __future__ import annotations

from collections.abc import Sequence

from job.dataset.tags import normalise_tag
from job.types import MIN_PROBABILITY

ScoredTags = Sequence[tuple[str, float]]
"""Tags of one text with their confidences."""


def best_threshold(gold: Sequence[Sequence[str]], scored: Sequence[ScoredTags]) -> tuple[float, float]:
    """Return the lowest threshold with the highest micro-F1, and that F1."""
    f1 = f1_curve(gold, scored)
    best = max(f1, key=lambda threshold: f1[threshold])
    return best, f1[best]


def f1_curve(gold: Sequence[Sequence[str]], scored: Sequence[ScoredTags]) -> dict[float, float]:
    """Return the micro-F1 by threshold, for thresholds from 0 in steps of MIN_PROBABILITY."""
    predictions, gold_counts = match_predictions(gold, scored)
    f1 = {}
    for threshold in (round(MIN_PROBABILITY * n, 4) for n in range(int(1 / MIN_PROBABILITY))):
        kept = [correct for confidence, _, correct in predictions if confidence >= threshold]
        f1[threshold] = 2 * sum(kept) / (len(kept) + sum(gold_counts))
    return f1


def match_predictions(
    gold: Sequence[Sequence[str]], scored: Sequence[ScoredTags]
) -> tuple[list[tuple[float, int, bool]], list[int]]:
    """Return (confidence, index of the text, correct) of each prediction, and the number of gold tags of each text.

    Spellings with the same normalised tag are one prediction, with the highest of their confidences.
    """
    predictions: list[tuple[float, int, bool]] = []
    gold_sets = [{normalise_tag(tag) for tag in tags} for tags in gold]
    for text, tags in enumerate(scored):
        confidences: dict[str, float] = {}
        for tag, confidence in tags:
            confidences[normalise_tag(tag)] = max(confidence, confidences.get(normalise_tag(tag), 0.0))
        predictions += [(confidence, text, tag in gold_sets[text]) for tag, confidence in confidences.items()]
    return predictions, [len(tags) for tags in gold_sets]
