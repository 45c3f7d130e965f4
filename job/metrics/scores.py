"""Precision, recall, F1 and other figures of predicted tags, with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from job.types import Scores, TagScores

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
from job.metrics.bootstrap import bootstrap_weights, interval
from job.metrics.counts import ConfusionCounts, _ratio


def score(
    gold: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]], parsed: Sequence[bool] | None = None
) -> Scores:
    """Precision, recall and F1, micro over all (text, tag) pairs and macro over tags, and how alike the sets are.

    Macro figures are means over the tags that occur, in gold or predicted. Jaccard is the mean over
    texts of shared tags among all tags; exact match the share of texts whose tags are all right and
    none too many. Without `parsed` every answer counts as a whole list. Intervals are percentiles of
    the figures on RESAMPLES bootstrap samples of the texts (Efron and Tibshirani, 1993, ch. 13).
    """
    import numpy as np

    counted = ConfusionCounts.of(gold, predicted)
    whole = np.ones(len(gold)) if parsed is None else np.array(parsed, float)
    drawn = bootstrap_weights(len(gold))
    # the first row is the examples themselves, the others are the samples drawn of them
    weights = np.vstack([np.ones(len(gold)), drawn])
    union = counted.gold + counted.predicted - counted.hits
    a_text = {
        "jaccard": _ratio(counted.hits, union),
        "exact_match": (union == counted.hits).astype(float),
        "well_formed": whole,
    }
    figures = dict(zip(("precision", "recall", "f1"), counted.micro(weights), strict=True))
    figures |= dict(zip(("macro_precision", "macro_recall", "macro_f1"), counted.macro(weights), strict=True))
    figures |= {name: weights @ values / len(gold) for name, values in a_text.items()}
    intervals = {name: interval(values[1:]) for name, values in figures.items()}
    return Scores(n=len(gold), **{name: float(values[0]) for name, values in figures.items()}, intervals=intervals)


def score_tags(gold: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> list[TagScores]:
    """Precision, recall and F1 of each tag that occurs, the most frequent first."""
    import numpy as np

    counted = ConfusionCounts.of(gold, predicted)
    weights = np.vstack([np.ones(len(gold)), bootstrap_weights(len(gold))])
    found: list[TagScores] = []
    for start, (hits, answers, truth) in counted.by_tag(weights):
        precision, recall, f1 = _ratio(hits, answers), _ratio(hits, truth), _ratio(2 * hits, answers + truth)
        for i, tag in enumerate(counted.tags[start : start + len(hits)]):
            p, r, f = (round(float(figure[i, 0]), 4) for figure in (precision, recall, f1))
            found.append(TagScores(tag, int(truth[i, 0]), int(answers[i, 0]), p, r, f, interval(f1[i, 1:])))
    return sorted(found, key=lambda score: (-score.gold, score.tag))
