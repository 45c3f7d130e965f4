"""What a run keeps of itself, so that nothing is measured twice and nothing is kept that is not true."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from job import report
from job.decoding.config import DecodingConfig
from job.errors import PublishError
from job.metrics.scores import score
from job.report import cached_evaluation, cached_threshold, check_round_trip, save_samples
from job.runs.run_folder import RunFolder
from job.settings import Settings
from job.types import Prediction, Scores, TaggedText

OUTCOME = (score([["x", "y"]], [["x"]]), [Prediction("a text", ("x", "y"), ("x",), "['x']")])


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    manifest = {"schema_version": 1, "status": "running", "settings": {}, "dataset": {"fingerprint": "f"}}
    run = RunFolder(tmp_path / "run", {**manifest, "versions": {}, "timings": {}})
    run.begin("cpu")
    return run


def test_an_evaluation_is_kept_for_the_weights_that_were_evaluated(run: RunFolder) -> None:
    made = []

    def evaluate() -> tuple[Scores, list[Prediction]]:
        made.append("once more")
        return OUTCOME

    for _ in range(2):
        assert cached_evaluation(run, "evaluate", "weights", evaluate) == OUTCOME
    assert len(made) == 1
    assert cached_evaluation(run, "evaluate", "other weights", evaluate) == OUTCOME
    assert len(made) == 2


def test_an_evaluation_that_cannot_be_kept_is_not_lost(run: RunFolder, caplog: pytest.LogCaptureFixture) -> None:
    run.checkpoints.rmdir()
    run.checkpoints.symlink_to("/proc/self", target_is_directory=True)
    assert cached_evaluation(run, "evaluate", "weights", lambda: OUTCOME) == OUTCOME
    assert "evaluate: not kept in case of an interruption" in caplog.text


class Answering:
    """A tagger that gives one answer."""

    def __init__(self, decoding: str, **tags: float) -> None:
        self.decoding = DecodingConfig(decoding, "closed", tuple(tags), 0.05, 9)  # type: ignore[arg-type]
        self._tags = tags

    def tag(self, texts: list[str]) -> list[TaggedText]:
        tags = tuple(self._tags)
        return [TaggedText(text, "?", str(list(tags)), tags, True, tuple(self._tags.values())) for text in texts]


@pytest.mark.parametrize(
    ("again", "alike"),
    [
        (Answering("marginal", rain=0.301, sea=0.0501), True),
        (Answering("marginal", rain=0.4), False),
        (Answering("marginal", sea=0.0502), False),
        (Answering("greedy", rain=0.3), False),
    ],
)
def test_likely_tags_may_be_rounded_otherwise_and_lists_may_not(run: RunFolder, again: Any, alike: bool) -> None:
    save_samples(run, Answering("marginal", rain=0.3, sea=0.0502).tag(["a text"]))
    if alike:
        check_round_trip(run, lambda: again, Settings())
    else:
        with pytest.raises(PublishError, match="and answered .*rain.* what was saved is not what was trained"):
            check_round_trip(run, lambda: again, Settings())


def test_the_threshold_is_kept_for_the_weights_that_it_was_found_for(run: RunFolder) -> None:
    tagger: Any = Answering("marginal", rain=0.3)
    found = iter([0.2, 0.1])

    def calibrate() -> None:
        tagger.decoding = replace(tagger.decoding, threshold=next(found))

    for weights, expected in (("these", 0.2), ("these", 0.2), ("others", 0.1)):
        tagger.decoding = replace(tagger.decoding, threshold=0.0)
        cached_threshold(run, weights, tagger, calibrate)
        assert tagger.decoding.threshold == expected


def test_a_text_may_hold_whatever_separates_lines_elsewhere(run: RunFolder) -> None:
    texts = ["one\u2028line", "two\x85lines", "three\u2029lines\nand a fourth"]
    run.write_lines("predictions.jsonl", [asdict(Prediction(text, ("a",), (), "")) for text in texts])
    assert [prediction.text for prediction in report.predictions(run)] == texts
