"""Precision, recall, F1 and other figures of predicted tags, with intervals."""

from __future__ import annotations

from collections.abc import Sequence

from job.metrics.bootstrap import bootstrap_weights, interval
from job.metrics.counts import ConfusionCounts, ratio
from job.types import Scores, TagScores


def score(
    gold: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]], well_formed: Sequence[bool] | None = None
) -> Scores:
    """Score the predicted tags of each text against its gold tags, compared as normalise_tag has them.

    Precision, recall and F1 are micro figures over all (text, tag) pairs; macro figures are means over the tags that
    occur in gold or predicted. Jaccard is the mean over texts of shared tags / all tags of both; exact match is the
    share of texts whose two tag sets are equal. Without `well_formed`, every answer counts as a complete list.
    Intervals are 95% percentile intervals over BOOTSTRAP_SAMPLES samples of the texts (Efron and Tibshirani, 1993,
    ch. 13).
    """
    import numpy as np

    counts = ConfusionCounts.from_tags(gold, predicted)
    complete = np.ones(len(gold)) if well_formed is None else np.array(well_formed, float)
    # row 0 scores the texts themselves, the other rows are bootstrap samples
    weights = np.vstack([np.ones(len(gold)), bootstrap_weights(len(gold))])
    union = counts.gold + counts.predicted - counts.hits
    per_text = {
        "jaccard": ratio(counts.hits, union),
        "exact_match": (union == counts.hits).astype(float),
        "well_formed": complete,
    }
    figures = dict(zip(("precision", "recall", "f1"), counts.micro(weights), strict=True))
    figures |= dict(zip(("macro_precision", "macro_recall", "macro_f1"), counts.macro(weights), strict=True))
    figures |= {name: weights @ values / len(gold) for name, values in per_text.items()}
    intervals = {name: interval(values[1:]) for name, values in figures.items()}
    return Scores(n=len(gold), **{name: float(values[0]) for name, values in figures.items()}, intervals=intervals)


def score_tags(gold: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> list[TagScores]:
    """Return precision, recall and F1 of each tag that occurs, the most frequent first."""
    import numpy as np

    counts = ConfusionCounts.from_tags(gold, predicted)
    weights = np.vstack([np.ones(len(gold)), bootstrap_weights(len(gold))])
    scores: list[TagScores] = []
    for start, (hits, answers, truth) in counts.by_tag(weights):
        precision, recall, f1 = ratio(hits, answers), ratio(hits, truth), ratio(2 * hits, answers + truth)
        for i, tag in enumerate(counts.tags[start : start + len(hits)]):
            p, r, f = (round(float(figure[i, 0]), 4) for figure in (precision, recall, f1))
            scores.append(TagScores(tag, int(truth[i, 0]), int(answers[i, 0]), p, r, f, interval(f1[i, 1:])))
    return sorted(scores, key=lambda score: (-score.gold, score.tag))
