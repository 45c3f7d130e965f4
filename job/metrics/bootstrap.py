"""Bootstrap confidence intervals, and the paired comparison of two taggers (Efron and Tibshirani, 1993)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from job.metrics.counts import ConfusionCounts

if TYPE_CHECKING:
    from job.metrics.counts import Floats

BOOTSTRAP_SAMPLES = 1000
"""Samples of the held-out texts, drawn with replacement and a fixed seed, for every interval."""

PERCENTILES = (2.5, 97.5)


def f1_difference(
    gold: Sequence[Sequence[str]], new: Sequence[Sequence[str]], old: Sequence[Sequence[str]]
) -> tuple[float, list[float]]:
    """Return micro-F1 of `new` minus micro-F1 of `old` on the same texts, and its 95% interval by a paired bootstrap.

    Paired: both are scored on the same samples of the texts, so texts that are hard for both do not widen the
    interval.
    """
    import numpy as np

    weights = np.vstack([np.ones(len(gold)), bootstrap_weights(len(gold))])
    f1 = [ConfusionCounts.from_tags(gold, predicted).micro(weights)[2] for predicted in (new, old)]
    difference = f1[0] - f1[1]
    return float(difference[0]), interval(difference[1:])


def bootstrap_weights(n: int) -> Floats:
    """Return how often each bootstrap sample has each of n texts: [BOOTSTRAP_SAMPLES, n], each row sums to n."""
    import numpy as np

    drawn = np.random.default_rng(0).integers(n, size=(BOOTSTRAP_SAMPLES, n))
    flat = (drawn + n * np.arange(BOOTSTRAP_SAMPLES)[:, None]).ravel()
    return np.bincount(flat, minlength=BOOTSTRAP_SAMPLES * n).reshape(BOOTSTRAP_SAMPLES, n).astype(float)


def interval(values: Floats) -> list[float]:
    """Return lower and upper end of the 95% percentile interval of a figure's values on the bootstrap samples."""
    import numpy as np

    return [round(float(end), 4) for end in np.percentile(values, PERCENTILES)]
