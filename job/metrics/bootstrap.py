"""Bootstrap confidence intervals, and the paired comparison of two taggers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
from job.metrics.counts import ConfusionCounts

BOOTSTRAP_SAMPLES = 1000
"""Of the held-out examples, drawn with replacement and a fixed seed, for every interval."""

PERCENTILES = (2.5, 97.5)


def f1_difference(
    gold: Sequence[Sequence[str]], new: Sequence[Sequence[str]], old: Sequence[Sequence[str]]
) -> tuple[float, list[float]]:
    """The micro-F1 of `new` less that of `old` on the same texts, and its 95% interval by a paired bootstrap.

    Paired: both are measured on the same samples of the texts, so that what is hard for both does not count.
    """
    import numpy as np

    weights = np.vstack([np.ones(len(gold)), bootstrap_weights(len(gold))])
    f1 = [ConfusionCounts.of(gold, predicted).micro(weights)[2] for predicted in (new, old)]
    difference = f1[0] - f1[1]
    return float(difference[0]), interval(difference[1:])


def bootstrap_weights(n: int) -> Floats:
    """How often each of n examples is in each bootstrap sample: RESAMPLES rows that each sum to n."""
    import numpy as np

    drawn = np.random.default_rng(0).integers(n, size=(BOOTSTRAP_SAMPLES, n))
    flat = (drawn + n * np.arange(BOOTSTRAP_SAMPLES)[:, None]).ravel()
    return np.bincount(flat, minlength=BOOTSTRAP_SAMPLES * n).reshape(BOOTSTRAP_SAMPLES, n).astype(float)


def interval(values: Floats) -> list[float]:
    import numpy as np

    return [round(float(end), 4) for end in np.percentile(values, PERCENTILES)]
