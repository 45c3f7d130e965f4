"""A run folder holds one run with the same settings and data, has one owner, and knows which parts are intact."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import open_to_other_users

from job.errors import InvalidInputError
from job.runs.run_folder import RunFolder, find_run, with_recorded_revisions
from job.settings import Settings
from job.types import DataReport, Example, SkippedRows, SplitData

REPORT = DataReport(3, (SkippedRows("no tags", 1, "line 3"),))
EXAMPLES = SplitData((Example("a", ("x",)),), (Example("b", ("y",)),), "f1", report=REPORT)
CHANGED = SplitData(EXAMPLES.train, EXAMPLES.held_out, "f2", report=REPORT)


def settings(path: Path, **train: object) -> Settings:
    return Settings.model_validate({"run": {"dir": path, "id": "one"}, "train": train})


def start_run(path: Path) -> RunFolder:
    run = RunFolder.open(settings(path), EXAMPLES)
    run.begin("cpu")
    return run


def test_nothing_is_written_before_the_run_begins(tmp_path: Path) -> None:
    run = RunFolder.open(settings(tmp_path / "runs"), EXAMPLES)
    assert not (tmp_path / "runs").exists()
    run.begin("cpu")
    manifest = json.loads((run.path / "manifest.json").read_text())
    assert (manifest["schema_version"], manifest["status"], manifest["seed"]) == (1, "running", 42)
    data = {
        "fingerprint": "f1",
        "train": 1,
        "calibration": 0,
        "held_out": 1,
        "near_duplicates": 0,
        "merged": 0,
        "skipped": 1,
    }
    assert manifest["dataset"] == data
    assert {"settings", "versions", "timings", "device", "started"} <= manifest.keys()


def test_other_settings_or_data_for_a_run_are_refused(tmp_path: Path) -> None:
    start_run(tmp_path)
    RunFolder.open(settings(tmp_path, logging_steps=1), EXAMPLES)
    with pytest.raises(InvalidInputError, match="TAGGER_TRAIN_MAX_STEPS was 200 and is 10"):
        RunFolder.open(settings(tmp_path, max_steps=10), EXAMPLES)
    with pytest.raises(InvalidInputError, match="the contents of Abirate/english_quotes have changed"):
        RunFolder.open(settings(tmp_path), CHANGED)


def test_the_same_settings_and_data_find_the_same_run(tmp_path: Path) -> None:
    inputs = [({}, EXAMPLES), ({"logging_steps": 1}, EXAMPLES), ({"seed": 1}, EXAMPLES), ({}, CHANGED)]
    named = [
        RunFolder.open(Settings.model_validate({"run": {"dir": tmp_path}, "train": train}), examples).path.name
        for train, examples in inputs
    ]
    assert named[0] == named[1]
    assert len(set(named)) == 3
    assert named[0].startswith("bloomz-560m-")


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "thesis.txt").write_text("text")
    with pytest.raises(InvalidInputError, match="holds files but no run"):
        RunFolder.open(settings(tmp_path), EXAMPLES)
    (tmp_path / "one" / "manifest.json").write_text("{}")
    with pytest.raises(InvalidInputError, match="is not a manifest of this version"):
        RunFolder.open(settings(tmp_path), EXAMPLES)


@pytest.mark.parametrize("path", ["/proc/nowhere", "a_file"])
def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path, path: str) -> None:
    (tmp_path / "a_file").write_text("not a folder")
    with pytest.raises(InvalidInputError, match=r"cannot be written: .*; set TAGGER_RUN_DIR"):
        RunFolder.open(settings(tmp_path / path), EXAMPLES)


def test_a_folder_gets_its_name_when_it_is_complete(tmp_path: Path) -> None:
    run = start_run(tmp_path)

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


def test_files_are_intact_until_they_change(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = start_run(tmp_path)
    with run.folder("adapter") as folder:
        (folder / "weights").write_text("trained")
        (folder / "README.md").write_text("card")
    run.write("metrics.json", "{}")
    assert not run.is_intact("adapter")
    run.record_checksums("adapter", "metrics.json")
    assert run.is_intact("adapter", "metrics.json")
    assert not run.is_intact("adapter", "samples.jsonl")
    (run.adapter / "README.md").write_text("an edited card")
    assert run.is_intact("adapter"), "the card may be edited"
    (run.adapter / "weights").write_text("tr4ined")
    assert not run.is_intact("adapter")
    assert "adapter/weights has changed since it was written; it is recreated" in caplog.text
    (run.path / "metrics.json").unlink()
    assert not run.is_intact("metrics.json")
    assert "metrics.json is missing" in caplog.text


def test_a_chapters_time_is_summed_over_its_attempts(tmp_path: Path) -> None:
    run = start_run(tmp_path)

    def interrupt() -> None:
        with run.chapter("train"):
            time.sleep(0.02)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupt()
    manifest = json.loads((run.path / "manifest.json").read_text())
    assert manifest["status"] == "interrupted"
    first = manifest["timings"]["train"]
    assert first >= 0.02
    del run
    run = start_run(tmp_path)
    with run.chapter("train"):
        time.sleep(0.02)
    assert run.manifest["timings"]["train"] >= first + 0.02


def test_temporary_files_of_a_killed_process_are_removed(tmp_path: Path) -> None:
    run = start_run(tmp_path)
    (run.path / "metrics.json.17.tmp").write_text("{")
    (run.checkpoints / "checkpoint-7.tmp").mkdir()
    del run
    run = start_run(tmp_path)
    assert not [*run.path.rglob("*.tmp")]


def test_the_next_owner_sees_the_changes_of_the_previous_one(tmp_path: Path) -> None:
    first = start_run(tmp_path)
    second = RunFolder.open(settings(tmp_path), EXAMPLES)
    first.record_verdict(passed=True)
    del first
    second.lock()
    assert second.publishable


def test_the_run_with_the_newest_adapter_is_found(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="there is no trained adapter under"):
        find_run(settings(tmp_path).run.model_copy(update={"id": None}))
    with pytest.raises(InvalidInputError, match="there is no trained adapter in"):
        find_run(settings(tmp_path).run)
    for name, age in (("older", 100), ("newest", 0), ("oldest", 200)):
        run = RunFolder(tmp_path / name, {**start_run(tmp_path).manifest})
        run.begin("cpu")
        with run.folder("adapter") as folder:
            (folder / "adapter_config.json").write_text("{}")
        os.utime(run.adapter, (time.time() - age, time.time() - age))
    assert find_run(Settings.model_validate({"run": {"dir": tmp_path}}).run).path.name == "newest"
    assert find_run(Settings.model_validate({"run": {"dir": tmp_path, "id": "older"}}).run).path.name == "older"


def test_a_run_has_one_owner_at_a_time(tmp_path: Path) -> None:
    code = (
        "from pathlib import Path\nfrom job.runs.run_folder import RunFolder\n"
        "from job.errors import InvalidInputError\nfrom job.runs import ownership\nownership.WAIT_SECONDS = 0.1\n"
        f"try: RunFolder(Path({str(tmp_path / 'one')!r}), {{}}).lock()\n"
        "except InvalidInputError as error: print(error)"
    )
    run = start_run(tmp_path)
    environ = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True)
    assert "another process is working on" in done.stdout
    del run
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True)
    assert done.stdout == ""


def test_an_owner_that_has_failed_lets_go_though_its_error_is_kept(tmp_path: Path) -> None:
    run = start_run(tmp_path)

    def fail(run: RunFolder) -> None:
        with run.released_afterwards():
            raise OSError("the Hub is gone")

    with pytest.raises(OSError, match="the Hub is gone") as kept:
        fail(run)
    RunFolder.open(settings(tmp_path), EXAMPLES).lock()
    assert kept.traceback, "its frames still hold the run"


@pytest.mark.parametrize("left", ["nothing", "lock", "lease", "an unfinished manifest"])
def test_a_process_that_ended_before_it_recorded_a_run_blocks_nothing(tmp_path: Path, left: str) -> None:
    (tmp_path / "one" / "checkpoints").mkdir(parents=True)
    if left == "an unfinished manifest":
        (tmp_path / "one" / "manifest.json.0123abcd.tmp").touch()
    elif left != "nothing":
        (tmp_path / "one" / left).touch()
    RunFolder.open(settings(tmp_path), EXAMPLES)
    (tmp_path / "one" / "checkpoints" / "thesis.txt").touch()
    with pytest.raises(InvalidInputError, match="holds files but no run"):
        RunFolder.open(settings(tmp_path), EXAMPLES)


@pytest.fixture
def other_user(tmp_path: Path) -> Iterator[None]:
    """Become another user, for whom the folders above the test's are open."""
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    open_to_other_users(tmp_path)
    os.seteuid(54321)
    yield
    os.seteuid(0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda run: run.chmod(0o755), "the run folder .*one cannot be written: Permission denied; set TAGGER_RUN_DIR"),
        (lambda run: (run / "checkpoints").chmod(0o755), "one/checkpoints cannot be written: Permission denied"),
        (lambda run: (run / "manifest.json").chmod(0o600), "manifest.json cannot be read: Permission denied; run the"),
        (
            lambda run: (run / "metrics.json").chmod(0o600),
            "metrics.json cannot be read: Permission denied; run the job",
        ),
        (lambda run: None, None),
    ],
)
def test_a_run_of_another_user_is_shared_or_refused_in_a_sentence(
    tmp_path: Path, other_user: None, change: Callable[[Path], None], message: str | None
) -> None:
    os.seteuid(0)
    run = start_run(tmp_path)
    run.write("metrics.json", "{}")
    run.record_checksums("metrics.json")
    run.release()
    for folder in (run.path, run.checkpoints):
        folder.chmod(0o777)
    change(run.path)
    os.seteuid(54321)

    def resume() -> None:
        again = RunFolder.open(settings(tmp_path), EXAMPLES)
        assert again.is_intact("metrics.json")
        again.lock()
        again.record_verdict(passed=True)

    if message is None:
        resume()
    else:
        with pytest.raises(InvalidInputError, match=message):
            resume()


def test_a_run_resumes_with_its_recorded_revisions(tmp_path: Path) -> None:
    first = settings(tmp_path).with_revisions(base="base-1", data="data-1")
    RunFolder.open(first, EXAMPLES).begin("cpu")
    resumed = with_recorded_revisions(settings(tmp_path))
    assert (resumed.base.revision, resumed.data.revision) == ("base-1", "data-1")
    configured = with_recorded_revisions(settings(tmp_path).with_revisions(base="base-2", data=None))
    assert (configured.base.revision, configured.data.revision) == ("base-2", "data-1")
    other = Settings.model_validate({"run": {"dir": tmp_path, "id": "one"}, "base": {"model": "another/base"}})
    assert with_recorded_revisions(other).base.revision is None
    assert with_recorded_revisions(other).data.revision == "data-1"
