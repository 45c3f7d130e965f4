"""A tagger is evaluated by its answers, and calibrated on them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import pytest

from job.decoding.config import DEFAULT_CONFIG
from job.evaluate import calibrate, evaluate
from job.metrics.scores import score
from job.types import Example, Prediction, TaggedText

EXAMPLES = [Example("one", ("rain", "sea")), Example("two", ("sun",)), Example("three", ("rain",))]
CONFIDENCES = {"one": {"rain": 0.6, "sea": 0.3}, "two": {"rain": 0.25, "sun": 0.5}, "three": {"sea": 0.05}}


class FixedTagger:
    """A tagger with fixed confidences, of which it leaves out those below its threshold."""

    def __init__(self, threshold: float) -> None:
        self.decoding = DEFAULT_CONFIG.model_copy(update={"threshold": threshold})

    def tag(self, texts: Sequence[str]) -> list[TaggedText]:
        answers = []
        for text in texts:
            kept = {tag: value for tag, value in CONFIDENCES[text].items() if value >= self.decoding.threshold}
            raw = str(list(CONFIDENCES[text]))
            answers.append(TaggedText(text, f"{text} ->:", raw, tuple(kept), text != "two", tuple(kept.values())))
        return answers


def test_predictions_and_scores_belong_to_the_examples() -> None:
    tagger: Any = FixedTagger(threshold=0.28)
    scores, predictions = evaluate(tagger, EXAMPLES)
    assert predictions == [
        Prediction("one", ("rain", "sea"), ("rain", "sea"), "['rain', 'sea']", (0.6, 0.3)),
        Prediction("two", ("sun",), ("sun",), "['rain', 'sun']", (0.5,)),
        Prediction("three", ("rain",), (), "['sea']"),
    ]
    gold, predicted = [p.gold for p in predictions], [p.predicted for p in predictions]
    assert scores == score(gold, predicted, [True, False, True])


def test_calibration_sees_what_an_earlier_threshold_left_out(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    tagger: Any = FixedTagger(threshold=0.9)
    curve = calibrate(tagger, EXAMPLES)
    assert tagger.decoding.threshold == 0.26, "the lowest that keeps all correct tags and drops the wrong ones"
    assert [point.predicted for point in curve if point.threshold in (0.0, 0.26, 0.6, 0.61)] == [5, 3, 1, 0]
    assert "threshold 0.26, micro-F1 0.857 on 3 training examples set aside" in caplog.text
