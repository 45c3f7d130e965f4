"""Evaluate a tagger on held-out examples, and calibrate its threshold."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from job.decoding.blend import Blend, fit_blend, only
from job.decoding.head import fit_head
from job.decoding.scorers import Scorers
from job.decoding.tfidf import fit_tfidf
from job.metrics.scores import score
from job.metrics.thresholds import best_threshold, threshold_curve
from job.system.events import event
from job.types import Example, Prediction, Scores, ThresholdScores

if TYPE_CHECKING:
    from job.inference import TextsTagger
    from job.sample import Tagger

log = logging.getLogger(__name__)

MAX_CALIBRATED_TAGS = 1000
"""Most tags of each part that the weights of a blend are found on, for each text."""


def evaluate(tagger: TextsTagger, examples: Sequence[Example]) -> tuple[Scores, list[Prediction]]:
    """Tag the texts of the examples, and score the answers against the examples' tags."""
    answers = tagger.tag([example.text for example in examples])
    scores = score([e.tags for e in examples], [a.tags for a in answers], [a.well_formed for a in answers])
    predictions = [
        Prediction(e.text, e.tags, a.tags, a.raw, a.confidences) for e, a in zip(examples, answers, strict=True)
    ]
    return scores, predictions


def fit(tagger: Tagger, examples: Sequence[Example]) -> Scorers:
    """Return the scorers that a tagger's decoding needs, fitted on its training examples."""
    parts, known = tagger.decoding.decoding.split("+"), tagger.decoding.tags
    head = tfidf = None
    if "head" in parts:
        head = fit_head(tagger.hidden_states([example.text for example in examples]), examples, known)
        log.info("evaluate: the tag head learned %d of %d tags", len(head.tags), len(known))
    if "tfidf" in parts:
        tfidf = fit_tfidf(examples, known)
    return Scorers(head, tfidf)


def calibrate(tagger: Tagger, examples: Sequence[Example]) -> list[ThresholdScores]:
    """Set a tagger's threshold, and the weights of a blend, to the best ones on these examples.

    It must not have been trained on them.

    Returns the scores at every threshold.
    """
    tagger.decoding = tagger.decoding.model_copy(update={"threshold": 0.0, "blend": None})
    texts = [example.text for example in examples]
    scored = _blend(tagger, examples) if "+" in tagger.decoding.decoding else _confidences(tagger, texts)
    curve = threshold_curve([example.tags for example in examples], scored)
    best = best_threshold(curve)
    tagger.decoding = tagger.decoding.model_copy(update={"threshold": best.threshold})
    fields = {"threshold": best.threshold, "micro_f1": best.f1, "examples": len(examples)}
    line = "evaluate: threshold %g, micro-F1 %.3f on %d training examples set aside"
    log.info(line, *fields.values(), extra=event("threshold", **fields))
    return curve


def _blend(tagger: Tagger, examples: Sequence[Example]) -> list[list[tuple[str, float]]]:
    """Set the weights of a tagger's blend; return the blended confidences of each text, the best first."""
    decoding, found = tagger.decoding, {}
    for part in decoding.decoding.split("+"):
        tagger.decoding = decoding.model_copy(update={"blend": only(part), "max_tags": MAX_CALIBRATED_TAGS})
        found[part] = [dict(tags) for tags in _confidences(tagger, [example.text for example in examples])]
    blend = fit_blend(found, [example.tags for example in examples])
    tagger.decoding = decoding.model_copy(update={"blend": blend})
    log.info("evaluate: weights of the blend: %s", _weights(blend))
    scored = []
    for number in range(len(examples)):
        tags = blend.combine({part: every[number] for part, every in found.items()})
        scored.append(sorted(tags.items(), key=lambda entry: (-entry[1], entry[0]))[: decoding.max_tags])
    return scored


def _weights(blend: Blend) -> str:
    return ", ".join(f"{part} {weight:.2f}" for part, weight in blend.weights.items())


def _confidences(tagger: Tagger, texts: Sequence[str]) -> list[list[tuple[str, float]]]:
    return [list(zip(answer.tags, answer.confidences, strict=True)) for answer in tagger.tag(texts)]
