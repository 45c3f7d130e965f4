"""A run's folder holds one run, and files that are whole."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from job.errors import InvalidInputError
from job.runs.run_folder import RunFolder, find_run
from job.settings import Settings
from job.types import Example, SplitData

EXAMPLES = SplitData((Example("a", ("x",)),), (Example("b", ("y",)),), skipped=1, fingerprint="f1")
OTHER = SplitData(EXAMPLES.train, EXAMPLES.held_out, skipped=1, fingerprint="f2")


def settings(path: Path, **train: object) -> Settings:
    return Settings.model_validate({"run": {"dir": path, "id": "one"}, "train": train})


def begun(path: Path) -> RunFolder:
    run = RunFolder.open(settings(path), EXAMPLES)
    run.begin("cpu")
    return run


def test_nothing_is_written_before_the_run_begins(tmp_path: Path) -> None:
    run = RunFolder.open(settings(tmp_path / "runs"), EXAMPLES)
    assert not (tmp_path / "runs").exists()
    run.begin("cpu")
    manifest = json.loads((run.path / "manifest.json").read_text())
    assert (manifest["schema_version"], manifest["status"], manifest["seed"]) == (1, "running", 42)
    data = {"fingerprint": "f1", "train": 1, "calibration": 0, "held_out": 1, "near_duplicates": 0, "skipped": 1}
    assert manifest["dataset"] == data
    assert {"settings", "versions", "timings", "device", "started"} <= manifest.keys()


def test_a_run_id_with_other_settings_is_refused_with_the_differences(tmp_path: Path) -> None:
    begun(tmp_path)
    RunFolder.open(settings(tmp_path, logging_steps=1), EXAMPLES)
    with pytest.raises(InvalidInputError, match="TAGGER_TRAIN_MAX_STEPS was 200 and is 10"):
        RunFolder.open(settings(tmp_path, max_steps=10), EXAMPLES)
    with pytest.raises(InvalidInputError, match="the contents of Abirate/english_quotes have changed"):
        RunFolder.open(settings(tmp_path), OTHER)


def test_the_same_settings_and_data_find_the_same_run(tmp_path: Path) -> None:
    named = [
        RunFolder.open(Settings.model_validate({"run": {"dir": tmp_path}, "train": train}), examples).path.name
        for train, examples in [({}, EXAMPLES), ({"logging_steps": 1}, EXAMPLES), ({"seed": 1}, EXAMPLES), ({}, OTHER)]
    ]
    assert named[0] == named[1]
    assert len(set(named)) == 3
    assert named[0].startswith("bloomz-560m-")


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "thesis.txt").write_text("mine")
    with pytest.raises(InvalidInputError, match="holds files but no run"):
        RunFolder.open(settings(tmp_path), EXAMPLES)
    (tmp_path / "one" / "manifest.json").write_text("{}")
    with pytest.raises(InvalidInputError, match="is not a manifest of this version"):
        RunFolder.open(settings(tmp_path), EXAMPLES)


@pytest.mark.parametrize("place", ["/proc/nowhere", "a_file"])
def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path, place: str) -> None:
    (tmp_path / "a_file").write_text("in the way")
    with pytest.raises(InvalidInputError, match=r"cannot be written: .*; set TAGGER_RUN_DIR"):
        RunFolder.open(settings(tmp_path / place), EXAMPLES)


def test_a_folder_takes_its_name_only_when_it_is_whole(tmp_path: Path) -> None:
    run = begun(tmp_path)

    def fill(text: str, *, fail: bool) -> None:
        with run.folder("adapter") as folder:
            (folder / "weights").write_text(text)
            if fail:
                raise OSError("disk full")

    fill("first", fail=False)
    with pytest.raises(OSError, match="disk full"):
        fill("second", fail=True)
    assert (run.adapter / "weights").read_text() == "first"
    fill("third", fail=False)
    assert (run.adapter / "weights").read_text() == "third"


def test_what_is_sealed_counts_as_done_until_it_is_altered(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = begun(tmp_path)
    with run.folder("adapter") as folder:
        (folder / "weights").write_text("trained")
        (folder / "README.md").write_text("card")
    run.write("metrics.json", "{}")
    assert not run.is_intact("adapter")
    run.record_checksums("adapter", "metrics.json")
    assert run.is_intact("adapter", "metrics.json")
    assert not run.is_intact("adapter", "samples.jsonl")
    (run.adapter / "README.md").write_text("my own words")
    assert run.is_intact("adapter"), "a card may be edited"
    (run.adapter / "weights").write_text("tr4ined")
    assert not run.is_intact("adapter")
    assert "adapter/weights is not as it was written; it is made again" in caplog.text
    (run.path / "metrics.json").unlink()
    assert not run.is_intact("metrics.json")
    assert "metrics.json is not there" in caplog.text


def test_the_time_of_a_chapter_is_that_of_all_its_attempts(tmp_path: Path) -> None:
    run = begun(tmp_path)

    def interrupted() -> None:
        with run.chapter("train"):
            time.sleep(0.02)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    manifest = json.loads((run.path / "manifest.json").read_text())
    assert manifest["status"] == "interrupted"
    first = manifest["timings"]["train"]
    assert first >= 0.02
    del run
    run = begun(tmp_path)
    with run.chapter("train"):
        time.sleep(0.02)
    assert run.manifest["timings"]["train"] >= first + 0.02


def test_what_a_killed_process_left_half_written_is_removed(tmp_path: Path) -> None:
    run = begun(tmp_path)
    (run.path / "metrics.json.17.tmp").write_text("{")
    (run.checkpoints / "checkpoint-7.tmp").mkdir()
    del run
    run = begun(tmp_path)
    assert not [*run.path.rglob("*.tmp")]


def test_the_second_owner_sees_what_the_first_has_done(tmp_path: Path) -> None:
    first = begun(tmp_path)
    second = RunFolder.open(settings(tmp_path), EXAMPLES)
    first.record_verdict(passed=True)
    del first
    second.lock()
    assert second.publishable


def test_the_adapter_of_the_newest_run_is_found(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="there is no trained adapter under"):
        find_run(settings(tmp_path).run.model_copy(update={"id": None}))
    with pytest.raises(InvalidInputError, match="there is no trained adapter in"):
        find_run(settings(tmp_path).run)
    for name, age in (("older", 100), ("newest", 0), ("oldest", 200)):
        run = RunFolder(tmp_path / name, {**begun(tmp_path).manifest})
        run.begin("cpu")
        with run.folder("adapter") as folder:
            (folder / "adapter_config.json").write_text("{}")
        os.utime(run.adapter, (time.time() - age, time.time() - age))
    assert find_run(Settings.model_validate({"run": {"dir": tmp_path}}).run).path.name == "newest"
    assert find_run(Settings.model_validate({"run": {"dir": tmp_path, "id": "older"}}).run).path.name == "older"


def test_a_run_has_one_owner(tmp_path: Path) -> None:
    code = (
        "from pathlib import Path\nfrom job.runs.run_folder import RunFolder\n"
        "from job.errors import InvalidInputError\n"
        f"try: RunFolder(Path({str(tmp_path / 'one')!r}), {{}}).lock()\n"
        "except InvalidInputError as refusal: print(refusal)"
    )
    run = begun(tmp_path)
    environ = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True)
    assert "another process is at work on" in done.stdout
    del run
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True)
    assert done.stdout == ""
