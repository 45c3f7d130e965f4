"""Bootstrap confidence intervals, and the paired comparison of two taggers (Efron and Tibshirani, 1993)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from job.metrics.counts import ConfusionCounts

if TYPE_CHECKING:
    from job.metrics.counts import Floats

BOOTSTRAP_SAMPLES = 1000
"""Samples of the held-out texts, drawn with replacement and a fixed seed, for every interval."""

CONFIDENCE = 0.95


def f1_difference(
    gold: Sequence[Sequence[str]],
    new: Sequence[Sequence[str]],
    old: Sequence[Sequence[str]],
    confidence: float = CONFIDENCE,
) -> tuple[float, list[float]]:
    """Return micro-F1 of `new` minus micro-F1 of `old` on the same texts, and its interval by a paired bootstrap.

    Paired: both are scored on the same samples of the texts, so texts that are hard for both do not widen the
    interval. An interval with a higher confidence is found on more samples: its ends are rarer.
    """
    import numpy as np

    counts = [ConfusionCounts.from_tags(gold, predicted) for predicted in (new, old)]

    def difference(weights: Floats) -> Floats:
        return counts[0].micro(weights)[2] - counts[1].micro(weights)[2]

    draws = math.ceil(round((1 - CONFIDENCE) / (1 - confidence), 6))
    values = np.concatenate([difference(bootstrap_weights(len(gold), seed)) for seed in range(draws)])
    return float(difference(np.ones((1, len(gold))))[0]), interval(values, confidence)


def bootstrap_weights(n: int, seed: int = 0) -> Floats:
    """Return how often each bootstrap sample has each of n texts: [BOOTSTRAP_SAMPLES, n], each row sums to n."""
    import numpy as np

    drawn = np.random.default_rng(seed).integers(n, size=(BOOTSTRAP_SAMPLES, n))
    flat = (drawn + n * np.arange(BOOTSTRAP_SAMPLES)[:, None]).ravel()
    return np.bincount(flat, minlength=BOOTSTRAP_SAMPLES * n).reshape(BOOTSTRAP_SAMPLES, n).astype(float)


def interval(values: Floats, confidence: float = CONFIDENCE) -> list[float]:
    """Return lower and upper end of the percentile interval of a figure's values on the bootstrap samples."""
    import numpy as np

    tail = round(50 * (1 - confidence), 6)  # percent on each side
    return [round(float(end), 4) for end in np.percentile(values, (tail, 100 - tail))]
