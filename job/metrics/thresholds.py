"""The confidence threshold with the best micro-F1."""

from __future__ import annotations

from collections.abc import Sequence

from job.dataset.tags import normalise_tag
from job.types import MIN_PROBABILITY, ThresholdScores

ScoredTags = Sequence[tuple[str, float]]
"""Tags of one text with their confidences."""


def best_threshold(curve: Sequence[ThresholdScores]) -> ThresholdScores:
    """Return the lowest threshold with the highest micro-F1, with its scores."""
    return max(curve, key=lambda point: (point.f1, -point.threshold))


def threshold_curve(gold: Sequence[Sequence[str]], scored: Sequence[ScoredTags]) -> list[ThresholdScores]:
    """Return the micro figures by threshold, for thresholds from 0 in steps of MIN_PROBABILITY."""
    predictions, gold_counts = match_predictions(gold, scored)
    curve = []
    for threshold in (round(MIN_PROBABILITY * n, 4) for n in range(int(1 / MIN_PROBABILITY))):
        kept = [correct for confidence, _, correct in predictions if confidence >= threshold]
        hits, answers, truth = sum(kept), len(kept), sum(gold_counts)
        precision, recall = hits / max(1, answers), hits / max(1, truth)
        curve.append(ThresholdScores(threshold, answers, precision, recall, 2 * hits / max(1, answers + truth)))
    return curve


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
