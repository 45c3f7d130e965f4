"""What a run keeps of itself, so that nothing is measured twice and nothing is kept that is not true."""

from __future__ import annotations

from pathlib import Path

import pytest

from job.evaluate import score
from job.report import kept_evaluation
from job.results import Prediction, Scores
from job.run_folder import RunFolder

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
        assert kept_evaluation(run, "evaluate", "weights", evaluate) == OUTCOME
    assert len(made) == 1
    assert kept_evaluation(run, "evaluate", "other weights", evaluate) == OUTCOME
    assert len(made) == 2


def test_an_evaluation_that_cannot_be_kept_is_not_lost(run: RunFolder, caplog: pytest.LogCaptureFixture) -> None:
    run.checkpoints.rmdir()
    run.checkpoints.symlink_to("/proc/self", target_is_directory=True)
    assert kept_evaluation(run, "evaluate", "weights", lambda: OUTCOME) == OUTCOME
    assert "evaluate: not kept in case of an interruption" in caplog.text
