"""Runs that earlier versions began resume and are readable; what cannot be continued names the version."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hub import WRITE_TOKEN, Hub
from make_run_fixtures import ENVIRONMENT, FIXTURES

from job.cli import main
from job.cloud import modal_worker
from job.config.earlier_versions import current_settings, differences, unknown_settings
from job.runs import schema
from job.settings import Settings, default_values

RUNS = sorted(FIXTURES.glob("run-*"))


def edit(path: Path, **entries: Any) -> None:
    content = json.loads(path.read_text()) | entries
    path.write_text(json.dumps(content))


def edit_settings(run: Path, *, drop: tuple[str, ...] = (), **settings: Any) -> None:
    old = json.loads((run / "manifest.json").read_text())["settings"]
    edit(run / "manifest.json", settings={name: old[name] for name in old if name not in drop} | settings)


def take(fixture: Path, status: str, tmp_path: Path, llama: Path, env: pytest.MonkeyPatch) -> Path:
    """Copy a run of a fixture into `runs`, and set the variables that it was begun with."""
    (tmp_path / "tiny-llama").symlink_to(llama)
    for name, value in ENVIRONMENT.items():
        env.setenv(name, value)
    env.setenv("TAGGER_RUN_ID", status)
    return Path(shutil.copytree(fixture / status, tmp_path / "runs" / status))


@pytest.fixture
def interrupted(tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return take(RUNS[-1], "interrupted", tmp_path, llama, monkeypatch)


def test_there_is_a_run_of_an_earlier_version() -> None:
    assert RUNS


@pytest.mark.parametrize("fixture", RUNS, ids=lambda path: path.name)
def test_an_interrupted_run_of_each_version_resumes_or_names_it(
    fixture: Path,
    tmp_path: Path,
    llama: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = take(fixture, "interrupted", tmp_path, llama, monkeypatch)
    state = json.loads((run / "checkpoints" / "checkpoint-2" / "state.json").read_text())
    if state["schema_version"] == schema.CHECKPOINT:
        assert main([]) == 0, capsys.readouterr().err
        assert "resuming after step 2 of 4" in caplog.text
        assert json.loads((run / "manifest.json").read_text())["status"] == "complete"
    else:
        assert main([]) == 2
        assert f"was written by version {fixture.name.removeprefix('run-')}" in capsys.readouterr().err


@pytest.mark.parametrize("fixture", RUNS, ids=lambda path: path.name)
def test_a_complete_run_of_each_version_can_be_used(
    fixture: Path,
    tmp_path: Path,
    llama: Path,
    monkeypatch: pytest.MonkeyPatch,
    loopback_hub: Hub,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = take(fixture, "complete", tmp_path, llama, monkeypatch)
    weights = (run / "adapter" / "adapter_model.safetensors").read_bytes()
    assert main([]) == 0, capsys.readouterr().err
    assert "already complete, nothing is repeated" in caplog.text
    capsys.readouterr()
    assert main(["sample", "a text"]) == 0
    assert capsys.readouterr().out.startswith("a text ->: ")
    monkeypatch.setenv("HF_TOKEN", WRITE_TOKEN)
    monkeypatch.setenv("TAGGER_HUB_REPO", "ada/tagger")
    assert main(["push"]) == 0, capsys.readouterr().err
    published = loopback_hub.models["ada/tagger"].branches["main"][-1].files
    assert published["adapter_model.safetensors"] == weights
    assert modal_worker.describe(run)["published"]["repo"] == "ada/tagger"


def test_former_names_and_values_stand_for_those_of_today() -> None:
    old = {"TAGGER_TRAIN_LOSS_ON": "all", "TAGGER_TRAIN_ACCUMULATION": 2, "TAGGER_SAMPLE_DECODING": "likely"}
    new = current_settings(old)
    assert new["TAGGER_TRAIN_COMPLETION_ONLY_LOSS"] is False
    assert new["TAGGER_TRAIN_GRADIENT_ACCUMULATION_STEPS"] == 2
    assert new["TAGGER_SAMPLE_DECODING"] == "marginal"
    assert new["TAGGER_LORA_R"] == 16, "what was not recorded did not exist yet"
    assert not unknown_settings(new)
    assert current_settings(new) == new


def test_no_setting_and_train_mean_the_same_split() -> None:
    new = {"TAGGER_DATA_SPLIT": None, "TAGGER_LORA_R": 16}
    assert not list(differences({"TAGGER_DATA_SPLIT": "train", "TAGGER_LORA_R": 16}, new))
    assert list(differences({"TAGGER_DATA_SPLIT": "test", "TAGGER_LORA_R": 8}, new)) == list(new)


def test_defaults_do_not_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAGGER_LORA_R", "8")
    assert default_values()["TAGGER_LORA_R"] == 16
    monkeypatch.delenv("TAGGER_LORA_R")
    assert default_values() == Settings().values()


def test_a_run_with_former_settings_resumes(
    interrupted: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    new = ("TAGGER_TRAIN_COMPLETION_ONLY_LOSS", "TAGGER_DATA_CONFIG", "TAGGER_DATA_TAG_DELIMITER")
    edit_settings(interrupted, drop=new, TAGGER_TRAIN_LOSS_ON="tags", TAGGER_DATA_SPLIT="train")
    versions = json.loads((interrupted / "manifest.json").read_text())["versions"]
    del versions["tagger-job"]
    edit(interrupted / "manifest.json", versions=versions)
    assert main(["check"]) == 0, capsys.readouterr().err
    edit_settings(interrupted, TAGGER_TRAIN_LOSS_ON="all")
    assert main(["check"]) == 2
    assert "TAGGER_TRAIN_COMPLETION_ONLY_LOSS was False and is True" in capsys.readouterr().err


def test_a_run_is_found_under_the_default_name_of_an_earlier_version(
    interrupted: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("TAGGER_RUN_ID")
    interrupted.rename(earlier := interrupted.with_name("tiny-llama-0123abcd"))
    shutil.copytree(earlier, interrupted.with_name("tiny-llama-another"))
    assert main(["check"]) == 0
    assert f"run: {Path('runs', earlier.name)}\n" in capsys.readouterr().out
    monkeypatch.setenv("TAGGER_LORA_R", "4")
    assert main(["check"]) == 0
    assert earlier.name not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("manifest.json", {"schema_version": 99}, "was begun by version 7.0.0 of the job (manifest schema 99)"),
        (
            "manifest.json",
            {"settings": {"TAGGER_TRAIN_MIXUP": 0.5}},
            "by version 7.0.0 of the job with TAGGER_TRAIN_MI",
        ),
        ("manifest.json", {"dataset": {"fingerprint": "other"}}, "or are read differently than by version 7.0.0"),
        ("checkpoints/checkpoint-2/state.json", {"schema_version": 99}, "was written by version 7.0.0 of the job"),
    ],
)
def test_what_cannot_be_continued_names_the_version_that_began_it(
    interrupted: Path, file: str, change: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = json.loads((interrupted / "manifest.json").read_text())
    edit(interrupted / "manifest.json", versions=manifest["versions"] | {"tagger-job": "7.0.0"})
    if settings := change.get("settings"):
        change = {"settings": manifest["settings"] | settings}
    edit(interrupted / file, **change)
    before = sorted(interrupted.rglob("*"))
    assert main([]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err
    assert sorted(interrupted.rglob("*")) == before, "nothing was trained"
