"""A run's folder holds one run, and files that are whole."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from job.results import Example, Examples, Refused
from job.run_folder import RunFolder, find, write_whole
from job.settings import Settings

EXAMPLES = Examples((Example("a", ("x",)),), (Example("b", ("y",)),), skipped=1, fingerprint="f1")
OTHER = Examples(EXAMPLES.train, EXAMPLES.held_out, skipped=1, fingerprint="f2")


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
    assert manifest["dataset"] == {"fingerprint": "f1", "train": 1, "held_out": 1, "skipped": 1}
    assert {"settings", "versions", "timings", "device", "started"} <= manifest.keys()


def test_a_run_id_with_other_settings_is_refused_with_the_differences(tmp_path: Path) -> None:
    begun(tmp_path)
    RunFolder.open(settings(tmp_path, logging_steps=1), EXAMPLES)
    with pytest.raises(Refused, match="TAGGER_TRAIN_MAX_STEPS was 200 and is 10"):
        RunFolder.open(settings(tmp_path, max_steps=10), EXAMPLES)
    with pytest.raises(Refused, match="the contents of Abirate/english_quotes have changed"):
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
    with pytest.raises(Refused, match="holds files but no run"):
        RunFolder.open(settings(tmp_path), EXAMPLES)
    (tmp_path / "one" / "manifest.json").write_text("{}")
    with pytest.raises(Refused, match="is not a manifest of this version"):
        RunFolder.open(settings(tmp_path), EXAMPLES)


@pytest.mark.parametrize("place", ["/proc/nowhere", "a_file"])
def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path, place: str) -> None:
    (tmp_path / "a_file").write_text("in the way")
    with pytest.raises(Refused, match=r"cannot be written: .*; set TAGGER_RUN_DIR"):
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


def test_a_file_that_cannot_be_written_leaves_the_one_before(tmp_path: Path) -> None:
    write_whole(tmp_path / "a.json", "before")
    with pytest.raises(UnicodeEncodeError):
        write_whole(tmp_path / "a.json", "\ud800")
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]
    assert (tmp_path / "a.json").read_text() == "before"


def test_the_adapter_of_the_newest_run_is_found(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="there is no trained adapter under"):
        find(settings(tmp_path).run.model_copy(update={"id": None}))
    with pytest.raises(Refused, match="there is no trained adapter in"):
        find(settings(tmp_path).run)
    for name, age in (("older", 100), ("newest", 0), ("oldest", 200)):
        run = RunFolder(tmp_path / name, {**begun(tmp_path).manifest})
        run.begin("cpu")
        with run.folder("adapter") as folder:
            (folder / "adapter_config.json").write_text("{}")
        os.utime(run.adapter, (time.time() - age, time.time() - age))
    assert find(Settings.model_validate({"run": {"dir": tmp_path}}).run).path.name == "newest"
    assert find(Settings.model_validate({"run": {"dir": tmp_path, "id": "older"}}).run).path.name == "older"


def test_a_run_has_one_owner(tmp_path: Path) -> None:
    code = (
        "from job.run_folder import RunFolder; from pathlib import Path; from job.results import Refused\n"
        f"try: RunFolder(Path({str(tmp_path / 'one')!r}), {{}}).lock()\n"
        "except Refused as refusal: print(refusal)"
    )
    run = begun(tmp_path)
    environ = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True)
    assert "another process is at work on" in done.stdout
    del run
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True)
    assert done.stdout == ""
