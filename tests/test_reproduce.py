"""A manifest says how to make the same run again, and its attempts what the run took."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from json_schema import violations
from tiny_run import set_tiny_environment

from job import cli, pipeline, reproduce
from job.config import environment
from job.config.validators import parse_budget
from job.errors import InvalidInputError
from job.runs import attempts, budget, provenance
from job.runs.run_folder import RunFolder, read_manifest
from job.settings import Run
from job.types import Summary

ROOT = Path(__file__).parents[1]
SCHEMA = json.loads((ROOT / "job" / "runs" / "manifest.schema.json").read_text())


@pytest.fixture
def made(llama: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Make a run; return its folder. The environment then has no settings of training."""
    monkeypatch.chdir(tmp_path)
    set_tiny_environment(monkeypatch, llama)
    monkeypatch.setenv("TAGGER_TRAIN_MAX_STEPS", "3")
    monkeypatch.setenv("TAGGER_RUN_ID", "first")
    summary = pipeline.run(environment.load())
    assert isinstance(summary, Summary)
    for name in [name for name in os.environ if name.startswith("TAGGER_")]:
        if name not in ("TAGGER_RUN_DEVICE", "TAGGER_RUN_DIR", "TAGGER_HUB_PUSH"):
            monkeypatch.delenv(name)
    return summary.folder


def edit(run: Path, file: Path, **entries: Any) -> Path:
    """Write the manifest with other entries, as if the job had written it."""
    manifest = json.loads((run / "manifest.json").read_text())
    file.write_text(json.dumps(provenance.sealed(manifest | entries)))
    return file


def test_a_manifest_makes_bitwise_the_same_adapter_again(
    made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = json.loads((made / "manifest.json").read_text())
    assert not list(violations(manifest, SCHEMA, SCHEMA))
    assert provenance.is_sealed(manifest)
    assert manifest["sources"]["TAGGER_TRAIN_MAX_STEPS"] == "environment"
    assert manifest["packages"]["torch"] == manifest["versions"]["torch"]
    monkeypatch.setenv("TAGGER_RUN_ID", "again")
    assert cli.main(["run", "--from", str(made / "manifest.json")]) == 0
    again = made.parent / "again"
    for name in ("adapter/adapter_model.safetensors", "predictions.jsonl"):
        assert (again / name).read_bytes() == (made / name).read_bytes(), name
    assert read_manifest(again)["reproduces"] == {"run_id": "first", "sha256": manifest["sha256"]}
    [attempt] = read_manifest(again)["attempts"]
    assert (attempt["status"], attempt["exit_code"]) == ("complete", 0)


def test_what_is_no_manifest_of_a_run_is_refused(made: Path, tmp_path: Path) -> None:
    original = (made / "manifest.json").read_text()
    unsealed = json.loads(original)
    del unsealed["sha256"]
    damaged = {
        "absent.json": (None, "cannot be read: No such file"),
        "text.json": ("no JSON", "is not JSON"),
        "later.json": ('{"schema_version": 9, "settings": {}}', "has the schema version 9"),
        "edited.json": (original.replace('"TAGGER_LORA_R": 16', '"TAGGER_LORA_R": 8'), "was edited after the job"),
        "old.json": (json.dumps(unsealed), "recorded too little"),
    }
    for name, (content, message) in damaged.items():
        if content is not None:
            (tmp_path / name).write_text(content)
        with pytest.raises(InvalidInputError) as error:
            reproduce.read(tmp_path / name)
        assert message in str(error.value)


def test_other_settings_data_versions_or_devices_are_named(
    made: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    versions = read_manifest(made)["versions"]
    older = edit(made, tmp_path / "older.json", versions=versions | {"peft": "0.1"}, device="NVIDIA T4 in fp16")
    monkeypatch.setenv("TAGGER_RUN_ID", "other")
    assert cli.main(["run", "--from", str(older)]) == 2
    error = capsys.readouterr().err
    assert "peft was 0.1 and is" in error
    assert "the device was NVIDIA T4 in fp16 and is CPU" in error
    assert "--allow-differences" in error
    rows = Path(read_manifest(made)["settings"]["TAGGER_DATA_DATASET"]).read_text().splitlines(keepends=True)
    (tmp_path / "other.jsonl").write_text("".join(rows[1:]))
    monkeypatch.setenv("TAGGER_DATA_DATASET", str(tmp_path / "other.jsonl"))
    monkeypatch.setenv("TAGGER_LORA_R", "4")
    assert cli.main(["run", "--from", str(made / "manifest.json")]) == 2
    assert "TAGGER_LORA_R=4 is set and the manifest has 16" in capsys.readouterr().err
    monkeypatch.delenv("TAGGER_LORA_R")
    assert cli.main(["run", "--from", str(made / "manifest.json")]) == 2
    assert "the contents of" in capsys.readouterr().err
    assert not (made.parent / "other").exists()
    assert cli.main(["run", "--from", str(made / "manifest.json"), "--allow-differences"]) == 0
    assert cli.main(["run", "--allow-differences"]) == 2


def test_an_estimate_stands_beside_what_the_run_took(
    llama: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    set_tiny_environment(monkeypatch, llama)
    monkeypatch.setenv("TAGGER_TRAIN_MAX_STEPS", "8")
    monkeypatch.setenv("TAGGER_RUN_PRICE_PER_HOUR", "3.6")
    assert cli.main(["check", "--measure", "--json"]) == 0
    estimate = json.loads(capsys.readouterr().out)["estimate"]
    schema = json.loads((ROOT / "job" / "runs" / "check.schema.json").read_text())
    assert not list(violations(estimate, schema["properties"]["estimate"], schema))
    assert estimate["dollars"] == pytest.approx(estimate["total_seconds"] / 1000, abs=1e-3)
    assert not (tmp_path / "runs").exists()
    run = pipeline.run(environment.load())
    assert isinstance(run, Summary)
    page = (run.folder / "report.md").read_text()
    assert "Estimated before:" in page
    assert "tokens a second" in page
    data = json.loads((run.folder / "report.json").read_text())
    assert data["estimate"] == estimate
    assert data["cost"]["source"] == "TAGGER_RUN_PRICE_PER_HOUR"


def test_a_used_up_budget_saves_and_is_not_exceeded_by_another_attempt(
    llama: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    set_tiny_environment(monkeypatch, llama)
    variables = {"TAGGER_RUN_ID": "run", "TAGGER_TRAIN_MAX_STEPS": "100000", "TAGGER_RUN_BUDGET": "3s"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(budget, "LOOK_SECONDS", 0.1)
    assert cli.main(["run"]) == 75
    assert "interrupted by TAGGER_RUN_BUDGET; the same command resumes" in capsys.readouterr().err
    run = tmp_path / "runs" / "run"
    assert list((run / "checkpoints").glob("checkpoint-*"))
    [attempt] = read_manifest(run)["attempts"]
    assert (attempt["status"], attempt["exit_code"]) == ("interrupted", 75)
    assert cli.main(["run"]) == 2
    assert "TAGGER_RUN_BUDGET=3s is used up: the attempts of" in capsys.readouterr().err
    monkeypatch.setenv("TAGGER_RUN_BUDGET", "$1")
    assert cli.main(["run"]) == 2
    assert "no price of CPU" in capsys.readouterr().err
    assert len(read_manifest(run)["attempts"]) == 1


def test_a_killed_attempt_counts_until_its_last_file(tmp_path: Path) -> None:
    run = RunFolder(tmp_path, {"status": "running", "timings": {}})
    attempts.begin(run, "2026-11-26T10:00:00Z", device="CPU", gpus=0, processes=1)
    started = attempts._timestamp(attempts.attempts(run)[0])
    (tmp_path / "log.jsonl").write_text("")
    for name, seconds in (("manifest.json", 1), ("log.jsonl", 90)):
        os.utime(tmp_path / name, (started + seconds, started + seconds))
    assert attempts.used_seconds(run) == pytest.approx(90)
    assert budget.seconds_left(Run(budget="2m"), run, "CPU", 0) == pytest.approx(30)
    later = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started + 1000))
    attempts.begin(run, later, device="CPU", gpus=0, processes=1)
    assert [entry["status"] for entry in attempts.attempts(run)] == ["killed", "running"]


def test_a_price_is_that_of_the_settings_or_of_all_gpus() -> None:
    assert budget.price_per_hour(Run(price_per_hour=2.5), "NVIDIA L4 in bf16", 4) == (2.5, "TAGGER_RUN_PRICE_PER_HOUR")
    found = budget.price_per_hour(Run(), "NVIDIA L4 in bf16", 4)
    assert found is not None
    assert found[0] == pytest.approx(4 * 3600 * 0.000222)
    assert budget.price_per_hour(Run(), "CPU (x86_64, 2 threads) in fp32", 0) is None


def test_a_budget_is_a_time_or_dollars() -> None:
    expected = {"90s": (90, "s"), "30m": (1800, "s"), "2h": (7200, "s"), "$3.5": (3.5, "$")}
    assert {text: parse_budget(text) for text in expected} == expected
    for wrong in ("", "3", "0s", "$", "-1h", "3d", "$3h", "1e9h", "h"):
        with pytest.raises(ValueError, match="expected a time"):
            parse_budget(wrong)
