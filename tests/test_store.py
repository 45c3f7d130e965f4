"""A run in object storage: its copy, its lease, and resuming on another disk."""

from __future__ import annotations

import itertools
import json
import os
import re
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import s3
from s3 import Fault
from tiny_run import set_tiny_environment

from job import pipeline, preflight
from job.cli import main
from job.errors import GateRejected, InvalidInputError, JobError, PublishError
from job.notify import Ending
from job.runs import ownership, shutdown, store
from job.runs.objects import Objects
from job.runs.run_folder import RunFolder
from job.runs.store_lease import StoreLease
from job.runs.stored_run import StoredRun, fetch, marked
from job.settings import Run, Settings

RESULTS = ("adapter/adapter_model.safetensors", "log.jsonl", "predictions.jsonl", "samples.jsonl")


def write_run(path: Path, **files: str) -> RunFolder:
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(content)
    return RunFolder(path, {"status": "running"})


def upload(stored_run: StoredRun, run: RunFolder, *states: dict[str, str]) -> None:
    """Send states of a run, one after the other."""
    lease = StoreLease(stored_run)
    for files in states:
        write_run(run.path, **files)
        sender = store._Upload(stored_run, lease, run.path)
        sender._number = len(stored_run.seals())
        sender.saved()
        assert sender.finish() is None
    lease.release()


def test_the_newest_state_comes_down_with_its_times(stored_run: StoredRun, tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", lock="", lease="")
    os.utime(tmp_path / "a")
    upload(stored_run, run, {"one": "1", "sub/two": "2"}, {"one": "new"})
    os.utime(run.path / "one", (1, 1))
    upload(stored_run, run, {"sub/three": "3"})
    seal = stored_run.restore(tmp_path / "b")
    assert marked(tmp_path / "b", stored_run.name).seal == seal  # type: ignore[union-attr]
    found = {path.relative_to(tmp_path / "b").as_posix() for path in (tmp_path / "b").rglob("*") if path.is_file()}
    assert found == {"one", "sub/two", "sub/three", ".stored.json"}
    assert (tmp_path / "b" / "one").read_text() == "new"
    assert (tmp_path / "b" / "one").stat().st_mtime == 1
    assert stored_run.read("sub/three") == b"3"
    assert stored_run.read("none") is None


def two_states(stored_run: StoredRun, tmp_path: Path) -> Run:
    """Store a run of this disk, and a newer state of it from another one; return the settings to read it with."""
    upload(stored_run, write_run(tmp_path / "runs" / "run"), {"manifest.json": "old"})
    upload(stored_run, write_run(tmp_path / "other" / "run"), {"manifest.json": "new"})
    return Run(dir=tmp_path / "runs", id="run", store=stored_run.objects.url)


def test_reading_brings_a_newer_state_and_keeps_the_lock_that_others_wait_for(
    stored_run: StoredRun, tmp_path: Path
) -> None:
    settings = two_states(stored_run, tmp_path)
    lock = settings.dir / "run" / "lock"
    lock.touch()
    waited_for = lock.stat().st_ino
    fetch(settings)
    assert (settings.dir / "run" / "manifest.json").read_text() == "new"
    assert lock.stat().st_ino == waited_for
    ownership.acquire(settings.dir / "run").release()


def test_reading_leaves_a_folder_alone_that_another_process_works_in(
    stored_run: StoredRun, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = two_states(stored_run, tmp_path)
    owner = ownership.acquire(settings.dir / "run")
    fetch(settings)
    assert (settings.dir / "run" / "manifest.json").read_text() == "old"
    assert "a newer state of it in" in caplog.text
    owner.release()


def test_a_start_leaves_a_folder_alone_that_another_process_works_in(
    stored_run: StoredRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("job.runs.ownership.WAIT_SECONDS", 0.1)
    settings = two_states(stored_run, tmp_path)
    owner = ownership.acquire(settings.dir / "run")
    with (
        pytest.raises(InvalidInputError, match="another process is working on"),
        store.stored(settings, RunFolder(settings.dir / "run", {"status": "running"})),
    ):
        pass
    assert (settings.dir / "run" / "manifest.json").read_text() == "old"
    owner.release()


def test_what_a_killed_restore_leaves_is_no_run_and_is_removed(
    tiny: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run"]) == 0
    leftover, other = Path("runs/tiny.0a1b2c3d.tmp"), Path("runs/tiny.mine.tmp")
    shutil.copytree("runs/tiny", leftover)
    other.mkdir()
    assert main(["runs"]) == 0
    assert leftover.name not in capsys.readouterr().out
    shutil.rmtree("runs/tiny")
    tiny.delenv("TAGGER_RUN_ID")
    assert main(["sample", "a song about rain"]) == 0  # from the store
    assert Path("runs/tiny/adapter").is_dir()
    assert not leftover.exists()
    assert other.exists()


@pytest.mark.parametrize("damage", ["a file is missing", "a file has changed", "the seal is cut", "a path leads out"])
def test_a_damaged_state_is_not_used(
    stored_run: StoredRun, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    upload(stored_run, write_run(tmp_path / "a"), {"one": "1"}, {"one": "2"})
    newest = stored_run.seals()[0]
    content = stored_run.get(newest.name) or b""
    [entry] = json.loads(content)["files"].values()
    data = f"{newest.generation:06d}/files/{entry['sha256']}"
    if damage == "a file is missing":
        stored_run.delete([data])
    elif damage == "a file has changed":
        stored_run.put(data, b"3")
    else:
        changed = content[:-5] if damage == "the seal is cut" else content.replace(b'"one"', b'"../one"')
        stored_run.put(newest.name, changed)
    stored_run.restore(tmp_path / "b")
    assert (tmp_path / "b" / "one").read_text() == "1"
    assert "cannot be used" in caplog.text
    assert not (tmp_path / "one").exists()


def test_an_owner_that_was_replaced_changes_nothing(
    stored_run: StoredRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("job.runs.store_lease.LEASE_SECONDS", 0.1)
    monkeypatch.setattr("job.runs.store_lease.has_ended", lambda owner: False)
    first = StoreLease(stored_run)
    old = store._Upload(stored_run, first, write_run(tmp_path / "a", one="old").path)
    old.saved()
    second = StoreLease(stored_run)
    new = store._Upload(stored_run, second, write_run(tmp_path / "b", one="new").path)
    new.saved()
    assert new.finish() is None
    seals = stored_run.seals()
    write_run(tmp_path / "a", one="older, but later")
    old.saved()
    assert "another process has taken over" in str(old.finish())
    assert stored_run.seals() == seals
    assert stored_run.read("one") == b"new"
    with pytest.raises(JobError, match="another process has taken over"):
        old.check()
    second.release()


class Busy:
    """Objects whose owner saves and prunes after each of the first `times` listings of a reader."""

    def __init__(self, objects: Objects, save: Callable[[], None], times: int) -> None:
        self.objects, self.save, self.times, self.url = objects, save, times, objects.url

    def __getattr__(self, name: str) -> Any:
        return getattr(self.objects, name)

    def list(self, prefix: str) -> dict[str, int]:
        found = self.objects.list(prefix)
        self.times -= 1
        if self.times >= 0:
            self.save()
        return found


def test_a_run_whose_owner_saves_meanwhile_is_read(
    stored_run: StoredRun, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run, lease = write_run(tmp_path / "a", one="0"), StoreLease(stored_run)
    sender, numbers = store._Upload(stored_run, lease, run.path), iter(range(1, 99))

    def save() -> None:
        for _ in range(store.KEPT_SEALS):
            write_run(run.path, one=str(next(numbers)))
            sender._send(store._State(run.path))

    save()
    for times in (1, 3):
        assert StoredRun(Busy(stored_run.objects, save, times), "run").read("one") == (run.path / "one").read_bytes()
        copy, folder = StoredRun(Busy(stored_run.objects, save, times), "run"), tmp_path / f"b{times}"
        assert copy.restore(folder) == stored_run.seals()[0]
        assert (folder / "one").read_text() == (run.path / "one").read_text()
    assert "cannot be used" not in caplog.text
    assert sender.finish() is None
    lease.release()


def test_a_run_without_any_state_that_can_be_used_says_so(stored_run: StoredRun, tmp_path: Path) -> None:
    upload(stored_run, write_run(tmp_path / "a"), {"one": "1"}, {"one": "2"})
    stored_run.delete([name for name in stored_run.names() if "/files/" in name])
    assert stored_run.read("one") is None
    with pytest.raises(InvalidInputError, match="none of the 2 states in .* can be used"):
        stored_run.restore(tmp_path / "b")
    assert not (tmp_path / "b").exists()


@contextmanager
def no_more_files(most: int) -> Iterator[None]:
    """Let this process open only `most` more files."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    # the limit is one of numbers, and those between the open files are free too
    taken = {int(entry.name) for entry in Path("/proc/self/fd").iterdir()}
    free = itertools.islice((number for number in itertools.count() if number not in taken), most)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(free) + 1, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_a_state_that_cannot_be_read_completely_is_not_stored(
    stored_run: StoredRun, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = write_run(tmp_path / "a", **{f"file{number}": str(number) for number in range(99)})
    lease = StoreLease(stored_run)
    sender = store._Upload(stored_run, lease, run.path)
    with no_more_files(20):
        sender.saved()
    while sender._waiting is not None:  # the state at the end would take its place
        time.sleep(0.001)
    assert sender.finish() is None
    lease.release()
    assert len(stored_run.newest_files() or ()) == 99
    assert "Too many open files" in caplog.text
    assert len(stored_run.seals()) == 1


def test_what_is_written_last_is_stored(stored_run: StoredRun, tmp_path: Path) -> None:
    settings = Run(dir=tmp_path, id="run", store=stored_run.objects.url)
    run = RunFolder(tmp_path / "run", {"status": "complete"})
    with store.stored(settings, run):
        write_run(run.path, **{"manifest.json": "1"})
        run.notify_saved()
        write_run(run.path, **{"tracking/wandb.json": "everything was sent"})
    assert stored_run.read("tracking/wandb.json") == b"everything was sent"


def test_a_folder_that_was_deleted_replaces_no_state(stored_run: StoredRun, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    upload(stored_run, run, {"one": "1"})
    shutil.rmtree(run.path)
    run.path.mkdir()
    upload(stored_run, run, {})
    assert stored_run.read("one") == b"1"


def test_only_what_the_job_has_written_is_deleted(stored_run: StoredRun, tmp_path: Path) -> None:
    others = ["notes.txt", "000001/mine", "lease/readme", "000000/files/notes", "lease/000000.json.bak", "0/seals/1"]
    for name in others:
        stored_run.put(name, b"")
    upload(stored_run, write_run(tmp_path / "a"), {"one": "1"})
    run, lease = write_run(tmp_path / "b"), StoreLease(stored_run)
    sender = store._Upload(stored_run, lease, run.path)
    for number in range(4):
        write_run(run.path, one=str(number))
        sender._send(store._State(run.path))
    assert sender.finish() is None
    lease.release()
    names = stored_run.names()
    assert set(others) <= set(names)
    assert {seal.generation for seal in stored_run.seals()} == {2}
    assert len([name for name in names if "/files/" in name and name not in others]) == 2


def test_runs_that_have_nothing_new_store_nothing(stored_run: StoredRun, tmp_path: Path) -> None:
    settings = Run(dir=tmp_path, id="run", store=stored_run.objects.url)
    run = write_run(tmp_path / "run", **{"manifest.json": "1", "large": "2"})
    found = []
    for _ in range(4):
        with store.stored(settings, run):
            pass
        found.append({name for name in stored_run.names() if not name.startswith("lease/")})
    assert len(found[0]) == 3
    assert found[0] == found[1] == found[3]
    assert len(stored_run.names("lease/")) == 2


def test_two_owners_that_store_once_leave_two_states(stored_run: StoredRun, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    for number in range(4):
        upload(stored_run, run, {"one": str(number)})
    assert [seal.generation for seal in stored_run.seals()] == [4, 3]
    assert len(stored_run.names()) == 2 + 2 + 2


def test_a_store_that_does_not_answer_ends_the_job_in_time(
    bucket: s3.Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("job.runs.objects.REQUEST_SECONDS", 2)
    monkeypatch.setattr("job.runs.store.FINAL_SECONDS", 0.3)
    monkeypatch.setattr("job.runs.store_lease.RELEASE_SECONDS", 0.1)
    monkeypatch.setattr(shutdown._state, "left_behind", False)
    run, started = write_run(tmp_path / "run", **{"manifest.json": "1"}), time.monotonic()

    def lose_the_store() -> None:
        with store.stored(Run(dir=tmp_path, id="run", store="s3://bucket/x"), run):
            bucket.faults = [Fault("PUT", "stop", times=9999)]
            write_run(run.path, one="1")

    with pytest.raises(PublishError, match=r"no file was stored for 0\.3 s"):
        lose_the_store()
    assert time.monotonic() - started < 1.5
    assert shutdown.are_threads_left_behind()


def test_a_run_that_is_rejected_says_that_its_last_state_is_not_stored(
    bucket: s3.Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = write_run(tmp_path / "run", **{"manifest.json": "1"})
    bucket.faults = [Fault("PUT .*/files/", "403", times=9999)]
    with pytest.raises(GateRejected), store.stored(Run(dir=tmp_path, id="run", store="s3://bucket/x"), run):
        raise GateRejected("worse")
    assert "the last state" in caplog.text


@pytest.fixture
def tiny(url: str, llama: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    set_tiny_environment(monkeypatch, llama).setenv("TAGGER_RUN_STORE", url)
    monkeypatch.setenv("TAGGER_TRAIN_SAVE_STEPS", "1")
    return monkeypatch


def settings_of(tiny: pytest.MonkeyPatch) -> Settings:
    from job.config import environment

    return environment.load()


def interrupt_at(step: int) -> Any:
    def on_saved(run: RunFolder) -> None:
        if (run.checkpoints / f"checkpoint-{step}").exists():
            raise KeyboardInterrupt

    return on_saved


def test_a_run_resumes_on_an_empty_disk_as_if_it_had_not_been_interrupted(
    tiny: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            pipeline.run(settings_of(tiny), interrupt_at(step))
        shutil.rmtree("runs")
    assert main(["run"]) == 0
    assert "with the checkpoint of step 2" in caplog.text
    manifest = json.loads(Path("runs/tiny/manifest.json").read_text())
    assert [attempt["status"] for attempt in manifest["attempts"]] == ["interrupted", "interrupted", "complete"]
    Path("runs/tiny").rename("resumed")
    tiny.delenv("TAGGER_RUN_STORE")
    assert main(["run"]) == 0
    for name in RESULTS:
        assert Path("resumed", name).read_bytes() == Path("runs/tiny", name).read_bytes(), name


def test_a_run_that_another_process_stored_meanwhile_is_compared_again(
    tiny: pytest.MonkeyPatch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.setenv("TAGGER_LORA_R", "3")
    waiting = preflight.check(settings_of(tiny))  # nothing is stored yet
    tiny.setenv("TAGGER_LORA_R", "16")
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(settings_of(tiny), interrupt_at(1))
    shutil.rmtree("runs")
    with pytest.raises(InvalidInputError, match="TAGGER_LORA_R was 16 and is 3"):
        pipeline.run_checked(waiting, Ending())


def test_a_complete_run_is_used_from_the_store(
    tiny: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert main(["run"]) == 0
    shutil.rmtree("runs")
    assert main(["runs"]) == 0
    assert "complete" in capsys.readouterr().out
    tiny.delenv("TAGGER_RUN_ID")
    assert main(["sample", "a song about rain"]) == 0
    assert "a song about rain ->: [" in capsys.readouterr().out
    shutil.rmtree("runs")
    tiny.setenv("TAGGER_RUN_ID", "tiny")
    assert main(["run"]) == 0
    assert "already complete" in caplog.text
    tiny.setenv("TAGGER_LORA_R", "3")
    shutil.rmtree("runs")
    assert main(["run"]) == 2
    assert "TAGGER_LORA_R was 16 and is 3" in capsys.readouterr().err


def test_a_store_that_fails_costs_progress_and_ends_with_4(
    tiny: pytest.MonkeyPatch, bucket: s3.Store, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.setenv("TAGGER_RUN_STORE", "s3://bucket/failing")
    bucket.faults = [Fault("PUT .*/files/", "403", times=9999)]
    assert main(["run"]) == 4
    assert caplog.text.count("progress is not stored") == 1
    assert "could not be stored in s3://bucket/failing/tiny" in capsys.readouterr().err
    assert json.loads(Path("runs/tiny/manifest.json").read_text())["status"] == "complete"
    bucket.faults = []
    assert main(["run"]) == 0
    shutil.rmtree("runs")
    assert main(["run"]) == 0
    assert "already complete" in caplog.text


def test_a_store_that_cannot_be_used_is_refused_before_anything_is_spent(
    tiny: pytest.MonkeyPatch, bucket: s3.Store, capsys: pytest.CaptureFixture[str]
) -> None:
    for value, message in (
        ("s3://other/x", "NoSuchBucket"),
        ("ftp://bucket/x", "expected s3://, gs:// or az://"),
        ("s3://key:pass@bucket", "without user or password|no user or password"),
        ("file:///proc/none", "TAGGER_RUN_STORE=file:///proc/none cannot be"),
        ("az://container/x", "cannot be opened"),
    ):
        tiny.setenv("TAGGER_RUN_STORE", value)
        assert main(["run"]) == 2, value
        error = capsys.readouterr().err
        assert re.search(message, error), error
        assert "pass" not in error.replace("password", "")
        assert not Path("runs").exists()


def test_a_run_that_was_not_made_with_the_store_is_not_replaced(
    tiny: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run"]) == 0
    Path("runs/tiny/.stored.json").unlink()
    assert main(["run"]) == 2
    assert "was not made with this store" in capsys.readouterr().err
    assert Path("runs/tiny/adapter").is_dir()


def test_a_folder_that_is_no_run_is_not_replaced(tiny: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run"]) == 0
    shutil.rmtree("runs")
    Path("runs/tiny").mkdir(parents=True)
    Path("runs/tiny/thesis.tex").write_text("mine")
    assert main(["sample", "a song"]) == 2
    assert "holds files but no run" in capsys.readouterr().err
    assert Path("runs/tiny/thesis.tex").read_text() == "mine"
    Path("runs/tiny/thesis.tex").unlink()
    Path("runs/tiny/tracking/local").mkdir(parents=True)  # all that is left of an attempt that was killed early
    assert main(["sample", "a song"]) == 0


def test_a_state_whose_seal_has_no_answer_stays_on_this_disk(
    tiny: pytest.MonkeyPatch, bucket: s3.Store, caplog: pytest.LogCaptureFixture
) -> None:
    tiny.setenv("TAGGER_RUN_STORE", "s3://bucket/answers")
    bucket.faults = [Fault("PUT .*/seals/", "lose_answer"), Fault("PUT .*/(seals|files)/", "403", times=9999)]
    assert main(["run"]) == 4
    bucket.faults = []
    assert main(["run"]) == 0
    assert "already complete" in caplog.text


def test_a_newer_state_replaces_that_of_an_earlier_attempt(
    tiny: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(settings_of(tiny), interrupt_at(1))
    Path("runs").rename("other")
    assert main(["run"]) == 0  # by another machine
    shutil.rmtree("runs")
    Path("other").rename("runs")
    assert main(["run"]) == 0
    assert "already complete" in caplog.text
