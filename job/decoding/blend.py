"""Blends: the probabilities of several decodings in one, as a noisy OR with a weight for each."""

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
MIN_EVIDENCE = 1e-9
"""Least evidence of a correct tag, so that weights of 0 have a finite loss."""


class Blend(BaseModel):
    """Weights that were found on calibration examples.

    Each part is taken as a cause of its own for a tag (noisy OR: Pearl, 1988, "Probabilistic Reasoning in Intelligent
    Systems", section 4.3.2): with the parts' probabilities p, the tag is absent with probability
    (1 - p_1)^w_1 (1 - p_2)^w_2 ... A part that does not know a tag has a p of 0 for it, which says nothing against it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    weights: dict[Part, Annotated[float, Field(ge=0, allow_inf_nan=False)]]

    def combine(self, found: Mapping[str, Confidences]) -> dict[str, float]:
        """Return the blended probability of each tag that some part found, if it is at least MIN_PROBABILITY."""
        blended = {}
        for tag in dict.fromkeys(tag for tags in found.values() for tag in tags):
            evidence = sum(
                weight * _evidence(found[part].get(tag, 0.0)) for part, weight in self.weights.items() if weight
            )
            probability = -math.expm1(-evidence)
            if probability >= MIN_PROBABILITY:
                blended[tag] = probability
        return blended


def only(part: str) -> Blend:
    """Return the blend that computes one part alone."""
    return Blend.model_validate({"weights": {part: 1.0}})


def fit_blend(found: Mapping[str, Sequence[Confidences]], gold: Sequence[Sequence[str]]) -> Blend:
    """Return the weights that predict best, by log loss, which of the tags that some part found are gold tags.

    The loss is convex in the weights, so that there is one answer. A part that does not help gets 0. Where all of the
    found tags are correct, or none is, no weights are best, and all weigh the same.
    """
    import numpy as np
    from scipy.optimize import minimize

    rows, labels = [], []
    for number, tags in enumerate(gold):
        known = set(map(normalise_tag, tags))
        for tag in dict.fromkeys(tag for part in found.values() for tag in part[number]):
            rows.append([_evidence(part[number].get(tag, 0.0)) for part in found.values()])
            labels.append(normalise_tag(tag) in known)
    parts = list(found)
    equal = [1 / len(parts)] * len(parts)
    if len(set(labels)) < 2:
        return Blend.model_validate({"weights": dict(zip(parts, equal, strict=True))})
    evidence, is_gold = np.array(rows), np.array(labels)
    correct, against = evidence[is_gold], evidence[~is_gold].sum(0)

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        # -log(1 - exp(-s)) of the gold tags, -log(exp(-s)) = s of the others; s is the weighted evidence
        total = np.maximum(correct @ weights, MIN_EVIDENCE)
        with np.errstate(over="ignore"):  # of much evidence, whose gradient is 0
            gradient = against - (correct / np.expm1(total)[:, None]).sum(0)
        return float(against @ weights - np.log(-np.expm1(-total)).sum()), gradient

    bounds = [(0.0, None)] * len(parts)
    best = minimize(loss, equal, jac=True, bounds=bounds, method="L-BFGS-B", options={"ftol": 1e-12})
    return Blend.model_validate({"weights": dict(zip(parts, map(float, best.x), strict=True))})


def _evidence(probability: float) -> float:
    """Return -log P(the tag is absent)."""
    return -math.log1p(-min(probability, MAX_PROBABILITY))
