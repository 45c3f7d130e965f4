"""Evaluate a tagger on held-out examples, and calibrate its threshold."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from job.decoding.head import TagHead, fit_head
from job.metrics.scores import score
from job.metrics.thresholds import best_threshold, threshold_curve
from job.system.events import event
from job.types import Example, Prediction, Scores, ThresholdScores

if TYPE_CHECKING:
    from job.inference import TextsTagger
    from job.sample import Tagger

log = logging.getLogger(__name__)


def evaluate(tagger: TextsTagger, examples: Sequence[Example]) -> tuple[Scores, list[Prediction]]:
    """Tag the texts of the examples, and score the answers against the examples' tags."""
    answers = tagger.tag([example.text for example in examples])
    scores = score([e.tags for e in examples], [a.tags for a in answers], [a.well_formed for a in answers])
    predictions = [
        Prediction(e.text, e.tags, a.tags, a.raw, a.confidences) for e, a in zip(examples, answers, strict=True)
    ]
    return scores, predictions


def fit(tagger: Tagger, examples: Sequence[Example]) -> TagHead:
    """Return a tag head for a tagger's model, fitted on its training examples."""
    states = tagger.hidden_states([example.text for example in examples])
    head = fit_head(states, examples, tagger.decoding.tags)
    log.info("evaluate: the tag head learned %d of %d tags", len(head.tags), len(tagger.decoding.tags))
    return head


def calibrate(tagger: Tagger, examples: Sequence[Example]) -> list[ThresholdScores]:
    """Set a tagger's threshold to the best one on these examples, which it must not have been trained on.

    Returns the scores at every threshold.
    """
    tagger.decoding = tagger.decoding.model_copy(update={"threshold": 0.0})
    answers = tagger.tag([example.text for example in examples])
    scored = [list(zip(answer.tags, answer.confidences, strict=True)) for answer in answers]
    curve = threshold_curve([example.tags for example in examples], scored)
    best = best_threshold(curve)
    tagger.decoding = tagger.decoding.model_copy(update={"threshold": best.threshold})
    fields = {"threshold": best.threshold, "micro_f1": best.f1, "examples": len(examples)}
    line = "evaluate: threshold %g, micro-F1 %.3f on %d training examples set aside"
    log.info(line, *fields.values(), extra=event("threshold", **fields))
    return curve
