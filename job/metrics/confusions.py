"""Where tagger and data disagree: pairs of tags, best and worst answers, and possible errors in the data."""

from __future__ import annotations

from collections.abc import Sequence

from job.dataset.tags import normalise_tag
from job.metrics.counts import ConfusionCounts
from job.types import ConfusedTags, PossibleLabelError, Prediction

MIN_TEXTS = 2
"""A pair of tags that was confused in a single text may be chance."""

MIN_CONFIDENCE = 0.5
"""A wrong tag that is less likely is not called a possible error of the data."""


def confused_tags(gold: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> list[ConfusedTags]:
    """Return the pairs of a missed tag and a wrong one of the same texts, the most frequent first."""
    counts = ConfusionCounts.from_tags(gold, predicted)
    hits = counts.truth * counts.answer
    pairs = ((counts.truth - hits).T @ (counts.answer - hits)).tocoo()
    texts_with = counts.truth.sum(axis=0)
    found = [
        ConfusedTags(counts.tags[missed], counts.tags[wrong], int(texts), int(texts_with[missed]))
        for missed, wrong, texts in zip(*pairs.coords, pairs.data, strict=True)
        if texts >= MIN_TEXTS
    ]
    return sorted(found, key=lambda pair: (-pair.texts, pair.gold_texts, pair.gold, pair.predicted))


def possible_label_errors(predictions: Sequence[Prediction]) -> list[PossibleLabelError]:
    """Return the wrong tags that a tagger is sure of, the most confident first: the data may lack these tags.

    Sure means more likely than not, and at least as confident as it is on average when it is right; the idea is that
    of confident learning (Northcutt et al., 2021).
    """
    right: list[float] = []
    wrong: list[PossibleLabelError] = []
    for line, entry in enumerate(predictions, 1):
        gold = {normalise_tag(tag) for tag in entry.gold}
        for tag, confidence in zip(entry.predicted, entry.confidences or (), strict=False):
            if normalise_tag(tag) in gold:
                right.append(confidence)
            else:
                wrong.append(PossibleLabelError(line, tag, confidence))
    limit = max(MIN_CONFIDENCE, sum(right) / max(1, len(right)))
    found = [error for error in wrong if error.confidence >= limit] if right else []
    return sorted(found, key=lambda error: (-error.confidence, error.line))


def best_and_worst(predictions: Sequence[Prediction], n: int) -> tuple[list[Prediction], list[Prediction]]:
    """Return at most n answers with the highest F1 and n with the lowest one, the clearest ones first.

    Among equals, those with the most right tags and then the highest confidence are the best, and those with the most
    confident wrong tag the worst. No answer is in both lists, none of the best is all wrong, and none of the worst is
    all right.
    """
    scored = [(*_quality(prediction), number) for number, prediction in enumerate(predictions)]
    best = sorted((entry for entry in scored if entry[0] > 0), key=lambda s: (-s[0], -s[1], -s[2], s[4]))[:n]
    worst = [entry for entry in scored if entry[0] < 1 and entry not in best]
    worst = sorted(worst, key=lambda s: (s[0], -s[3], s[4]))[:n]
    return [predictions[entry[-1]] for entry in best], [predictions[entry[-1]] for entry in worst]


def answer_f1(prediction: Prediction) -> float:
    """Return the F1 of one answer; 0 if it and the text's tags are empty."""
    gold, predicted = (set(map(normalise_tag, tags)) for tags in (prediction.gold, prediction.predicted))
    return 2 * len(gold & predicted) / max(1, len(gold) + len(predicted))


def _quality(prediction: Prediction) -> tuple[float, int, float, float]:
    """Return F1, number of right tags, mean confidence of these, and the highest confidence of a wrong tag."""
    gold = {normalise_tag(tag) for tag in prediction.gold}
    predicted = [normalise_tag(tag) for tag in prediction.predicted]
    hits = len(gold & set(predicted))
    confidences = prediction.confidences or (0.0,) * len(predicted)
    right = [confidence for tag, confidence in zip(predicted, confidences, strict=True) if tag in gold]
    wrong = [confidence for tag, confidence in zip(predicted, confidences, strict=True) if tag not in gold]
    return answer_f1(prediction), hits, sum(right) / max(1, len(right)), max(wrong, default=0.0)
