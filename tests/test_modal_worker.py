"""The worker runs the job in a container: attempts of a call, commits, outcomes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import SAYINGS
from hub import Hub
from modal.exception import InputCancellation
from tiny_run import REPO, TINY_ON_THE_HUB, fill_hub

from job.cloud import modal_launcher, modal_worker
from job.settings import Settings
from job.types import HubRevision, TaggedText


def test_a_warm_container_tags_with_the_current_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    heads, loaded = iter(["first", "first", "second"]), []

    class Silent:
        def tag(self, texts: list[str]) -> list[TaggedText]:
            return []

    def load(settings: Settings, *_: str, texts: int) -> Silent:
        loaded.append(settings.hub.revision)
        return Silent()

    monkeypatch.setattr("job.hub.access.resolve_revision", lambda *_: HubRevision(next(heads), None))
    monkeypatch.setattr("job.pipeline.load_tagger_as_trained", load)
    for _ in range(3):
        assert modal_worker.tag_texts({"TAGGER_HUB_REPO": REPO}, ["a text"])["exit_code"] == 0
    assert loaded == ["first", "second"]


class Volume:
    """Counts commits; raises `error` for the first `times` commits that have the checkpoint `at`."""

    def __init__(self, runs: Path, at: str = "none", error: type[BaseException] = OSError, times: int = 0) -> None:
        self.runs, self.at, self.error, self.times, self.commits = runs, at, error, times, 0

    def commit(self) -> None:
        self.commits += 1
        if self.times and any(self.runs.glob(f"*/checkpoints/{self.at}")):
            self.times -= 1
            raise self.error("volume busy")


@pytest.fixture
def env(loopback_hub: Hub, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Make this process a container, and return the variables that a caller sends."""
    fill_hub(loopback_hub, llama)
    monkeypatch.setenv("TAGGER_RUN_DIR", str(tmp_path / "runs"))
    monkeypatch.setenv("TAGGER_LORA_R", "2")  # not among the variables of the caller
    return {**TINY_ON_THE_HUB, "TAGGER_TRAIN_MAX_STEPS": "4", "TAGGER_HUB_PUSH": "never"}


def test_a_call_keeps_its_run_when_the_data_set_changes(env: dict[str, str], loopback_hub: Hub, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    interrupted = Volume(runs, "checkpoint-2", InputCancellation, times=1)
    with pytest.raises(InputCancellation):
        modal_worker.run_command("run", env, call="fc-1", commit=interrupted.commit)
    assert interrupted.commits > 2, "at the start, after the checkpoint, and at the end"
    [run] = [path for path in runs.iterdir() if not path.name.startswith(".")]
    assert [path.name for path in (run / "checkpoints").glob("checkpoint-*")] == ["checkpoint-2"]
    assert json.loads((run / "manifest.json").read_text())["status"] == "interrupted"

    more = SAYINGS.read_bytes().splitlines(keepends=True)[::-1]
    loopback_hub.datasets["tiny/sayings"].commit("main", "other data", {"train.jsonl": b"".join(more)})
    volume = Volume(runs)
    outcome = modal_worker.run_command("run", env, call="fc-1", commit=volume.commit)
    assert (outcome["exit_code"], outcome["run_id"], outcome["status"]) == (0, run.name, "complete")
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["settings"]["TAGGER_LORA_R"] == 16
    assert volume.commits > 3
    other = modal_worker.run_command("run", {**env, "TAGGER_HUB_REPO": ""}, call="fc-2", commit=Volume(runs).commit)
    assert other["run_id"] != run.name, "another call uses the current data"


def test_a_failed_commit_is_logged_and_at_the_end_an_error(
    env: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    volume = Volume(tmp_path / "runs", "*", OSError, times=99)
    with pytest.raises(OSError, match="volume busy"):
        modal_worker.run_command("run", env, call="fc-1", commit=volume.commit)
    assert "modal: the volume is not committed (volume busy)" in caplog.text
    [run] = [path for path in (tmp_path / "runs").iterdir() if not path.name.startswith(".")]
    assert json.loads((run / "manifest.json").read_text())["status"] == "complete"


def test_a_rejected_adapter_is_an_outcome_with_exit_code_3(
    env: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    strict = {"TAGGER_EVAL_GATE": "floor", "TAGGER_EVAL_MIN_F1": "0.99"}
    outcome = modal_worker.run_command("run", env | strict, call="fc-1", commit=Volume(tmp_path).commit)
    assert (outcome["exit_code"], outcome["status"]) == (3, "refused")
    assert outcome["gate"]["verdict"] == "fail"
    with pytest.raises(SystemExit) as ended:
        modal_launcher.exit_with(outcome)
    assert ended.value.code == 3
    assert "error: fail: " in capsys.readouterr().err
