"""Blends: the probabilities of several decodings in one, by weights of their log odds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from job.dataset.tags import normalise_tag
from job.types import MIN_PROBABILITY

Part = Literal["marginal", "head", "tfidf"]
Confidences = Mapping[str, float]
"""Probabilities of the tags of one text; what is missing is below MIN_PROBABILITY."""
MAX_PROBABILITY = 0.9999

_Finite = Annotated[float, Field(allow_inf_nan=False)]


class Blend(BaseModel):
    """Weights that were found on calibration examples."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    weights: dict[Part, Annotated[_Finite, Field(ge=0)]]
    bias: _Finite

    def combine(self, found: Mapping[str, Confidences]) -> dict[str, float]:
        """Return the blended probability of each tag that some part found, if it is at least MIN_PROBABILITY."""
        blended = {}
        for tag in dict.fromkeys(tag for tags in found.values() for tag in tags):
            logit = self.bias + sum(
                weight * _log_odds(found[part].get(tag, 0.0)) for part, weight in self.weights.items() if weight
            )
            probability = 1 / (1 + math.exp(-max(-30.0, min(30.0, logit))))
            if probability >= MIN_PROBABILITY:
                blended[tag] = probability
        return blended


def only(part: str) -> Blend:
    """Return the blend that computes one part alone."""
    return Blend.model_validate({"weights": {part: 1.0}, "bias": 0.0})


def fit_blend(found: Mapping[str, Sequence[Confidences]], gold: Sequence[Sequence[str]]) -> Blend:
    """Return the weights that predict best, by log loss, which of the tags that some part found are gold tags.

    A part that would get a negative weight gets 0: it does not help. Without any correct tag, all weigh the same.
    """
    import numpy as np
    from sklearn.linear_model import LogisticRegression

    features, labels = [], []
    for number, tags in enumerate(gold):
        known = set(map(normalise_tag, tags))
        for tag in dict.fromkeys(tag for part in found.values() for tag in part[number]):
            features.append([_log_odds(part[number].get(tag, 0.0)) for part in found.values()])
            labels.append(normalise_tag(tag) in known)
    parts = list(found)
    if len(set(labels)) < 2:
        return Blend.model_validate({"weights": dict.fromkeys(parts, 1 / len(parts)), "bias": 0.0})
    matrix, used = np.array(features), list(range(len(parts)))
    while True:
        regression = LogisticRegression(tol=1e-8, max_iter=1000).fit(matrix[:, used], labels)
        worst = int(regression.coef_[0].argmin())
        if len(used) == 1 or regression.coef_[0][worst] >= 0:
            break
        del used[worst]
    weights = dict.fromkeys(parts, 0.0)
    weights |= {parts[i]: max(0.0, float(weight)) for i, weight in zip(used, regression.coef_[0], strict=True)}
    return Blend.model_validate({"weights": weights, "bias": float(regression.intercept_[0])})


def _log_odds(probability: float) -> float:
    clipped = min(max(probability, MIN_PROBABILITY), MAX_PROBABILITY)
    return math.log(clipped / (1 - clipped))
