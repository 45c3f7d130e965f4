"""Results are measured once, belong to the weights they were measured with, and are written as they were."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from job import results
from job.decoding.config import DEFAULT_CONFIG
from job.errors import InvalidInputError, PublishError
from job.metrics.scores import score
from job.results import cached_evaluation, cached_threshold, check_round_trip, save_samples
from job.runs.run_folder import RunFolder
from job.settings import Data, Sample, Settings
from job.types import Prediction, Scores, TaggedText, ThresholdScores

RESULT = (score([["x", "y"]], [["x"]]), [Prediction("a text", ("x", "y"), ("x",), "['x']", (0.5,))])


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    manifest = {"schema_version": 1, "status": "running", "settings": {}, "dataset": {"fingerprint": "f"}}
    run = RunFolder(tmp_path / "run", {**manifest, "versions": {}, "timings": {}})
    run.begin("cpu")
    return run


def test_an_evaluation_is_cached_for_its_weights(run: RunFolder) -> None:
    calls = []

    def evaluate() -> tuple[Scores, list[Prediction]]:
        calls.append("evaluate")
        return RESULT

    for _ in range(2):
        assert cached_evaluation(run, "evaluate", "weights", evaluate) == RESULT
    assert len(calls) == 1
    assert cached_evaluation(run, "evaluate", "other weights", evaluate) == RESULT
    assert len(calls) == 2


def test_an_evaluation_that_cannot_be_saved_is_returned(run: RunFolder, caplog: pytest.LogCaptureFixture) -> None:
    run.checkpoints.rmdir()
    run.checkpoints.symlink_to("/proc/self", target_is_directory=True)
    assert cached_evaluation(run, "evaluate", "weights", lambda: RESULT) == RESULT
    assert "evaluate: result not saved, a resumed run evaluates again" in caplog.text


class FixedTagger:
    """A tagger that gives the same answer to every text."""

    def __init__(self, decoding: str, **tags: float) -> None:
        self.decoding = DEFAULT_CONFIG.model_copy(
            update={"decoding": decoding, "vocabulary": "closed", "tags": tuple(tags), "threshold": 0.05, "max_tags": 9}
        )
        self._tags = tags

    def tag(self, texts: list[str]) -> list[TaggedText]:
        tags = tuple(self._tags)
        return [TaggedText(text, "?", str(list(tags)), tags, True, tuple(self._tags.values())) for text in texts]


@pytest.mark.parametrize(
    "reloaded",
    [
        FixedTagger("marginal", rain=0.4),
        FixedTagger("marginal", sea=0.0502),
        FixedTagger("greedy", rain=0.3),
    ],
)
def test_a_reloaded_adapter_that_answers_differently_is_an_error(run: RunFolder, reloaded: Any) -> None:
    save_samples(run, FixedTagger("marginal", rain=0.3, sea=0.0502).tag(["a text"]))
    with pytest.raises(PublishError, match="after training it answered .*rain.* what was saved is not what was train"):
        check_round_trip(run, lambda: reloaded, Settings())


def test_a_reloaded_adapter_may_round_confidences_differently(
    run: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    reloaded: Any = FixedTagger("marginal", rain=0.301, sea=0.0501)
    save_samples(run, FixedTagger("marginal", rain=0.3, sea=0.0502).tag(["a text"]))
    check_round_trip(run, lambda: reloaded, Settings())
    assert capsys.readouterr().out == "? ['rain', 'sea']\n"


def test_an_adapter_that_cannot_be_reloaded_is_a_publish_error(run: RunFolder) -> None:
    def fail() -> Any:
        raise InvalidInputError("it has no weights")

    save_samples(run, FixedTagger("greedy", rain=0.3).tag(["a text"]))
    with pytest.raises(
        PublishError, match=r"cannot be loaded back: it has no weights\. .*TAGGER_RUN_ID=run tagger-job"
    ):
        check_round_trip(run, fail, Settings())


def test_the_threshold_is_cached_for_its_weights(run: RunFolder) -> None:
    tagger: Any = FixedTagger("marginal", rain=0.3)
    thresholds = iter([0.2, 0.1])

    def calibrate() -> list[ThresholdScores]:
        tagger.decoding = tagger.decoding.model_copy(update={"threshold": next(thresholds)})
        return [ThresholdScores(tagger.decoding.threshold, 1, 0.5, 0.25, 0.3333)]

    for weights, expected in (("these", 0.2), ("these", 0.2), ("others", 0.1)):
        tagger.decoding = tagger.decoding.model_copy(update={"threshold": 0.0})
        cached_threshold(run, weights, tagger, calibrate)
        assert tagger.decoding.threshold == expected
        assert run.is_intact("thresholds.jsonl")
        assert run.read_lines("thresholds.jsonl")[0]["threshold"] == expected


def test_predictions_of_earlier_versions_are_read(run: RunFolder) -> None:
    (run.path / "predictions.jsonl").write_text('{"text": "t", "gold": ["a"], "predicted": ["b"], "raw": "[]"}\n')
    assert results.predictions(run) == [Prediction("t", ("a",), ("b",), "[]")]


def test_predictions_keep_unicode_line_separators(run: RunFolder) -> None:
    texts = ["one\u2028line", "two\x85lines", "three\u2029lines\nand a fourth"]
    run.write_lines("predictions.jsonl", [asdict(Prediction(text, ("a",), (), "")) for text in texts])
    assert [prediction.text for prediction in results.predictions(run)] == texts


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("link.jsonl", "is not a file that can be replaced"),
        ("folder", "is not a file that can be replaced"),
        ("x" * 201, "is not a file that can be replaced"),
        ("input.jsonl", "is also read by this job"),
        ("/proc/answers.jsonl", "/proc cannot be written"),
    ],
)
def test_an_output_that_cannot_be_written_is_an_input_error(output: str, message: str) -> None:
    Path("input.jsonl").touch()
    Path("link.jsonl").symlink_to("input.jsonl")
    Path("folder").mkdir()
    with pytest.raises(InvalidInputError, match=f"TAGGER_SAMPLE_OUTPUT.*{message}|{message}.*TAGGER_SAMPLE_OUTPUT"):
        results.check_output(Sample(output=Path(output), input=Path("input.jsonl")))
    results.check_output(Sample(output=Path("answers.jsonl"), input=Path("input.jsonl")), Data())


@pytest.mark.parametrize(
    ("sample", "data"),
    [
        ({}, {"dataset": "a.jsonl,folder/b.jsonl"}),
        ({}, {"dataset": "folder"}),
        ({}, {"dataset": "folder/*.jsonl"}),
        ({}, {"dataset": "s3://bucket/c.jsonl,folder/b.jsonl"}),
        ({}, {"dataset": "a.jsonl", "eval_dataset": "folder/b.jsonl"}),
        ({"vocabulary": "folder/b.jsonl"}, {"dataset": "a.jsonl"}),
    ],
)
def test_no_file_that_is_read_is_replaced_by_answers(sample: dict[str, Any], data: dict[str, Any]) -> None:
    Path("folder").mkdir()
    for name in ("a.jsonl", "folder/b.jsonl"):
        Path(name).touch()
    with pytest.raises(InvalidInputError, match="is also read by this job"):
        results.check_output(Sample(output=Path("folder/b.jsonl"), **sample), Data(**data))
