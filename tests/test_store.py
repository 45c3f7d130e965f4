"""A run in object storage: its copy, its lease, and resuming on another disk."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import s3
from s3 import Fault
from tiny_run import set_tiny_environment

from job import pipeline
from job.cli import main
from job.errors import InvalidInputError, JobError
from job.runs import store
from job.runs.objects import StoreError, open_objects
from job.runs.run_folder import RunFolder
from job.runs.store_lease import StoreLease
from job.runs.stored_run import StoredRun, marked
from job.settings import Settings

ROOT = Path(__file__).parents[1]
RESULTS = ("adapter/adapter_model.safetensors", "log.jsonl", "predictions.jsonl", "samples.jsonl")


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[s3.Store]:
    """An S3 server, whose failures are waited for briefly."""
    monkeypatch.setattr("job.runs.objects.RETRY_SECONDS", 1)
    monkeypatch.setattr("job.runs.store.FINAL_PAUSE_SECONDS", 0.0)
    with s3.serve() as (objects, variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        yield objects


@pytest.fixture(params=["s3", "file"])
def url(request: pytest.FixtureRequest, bucket: s3.Store, tmp_path: Path) -> str:
    return "s3://bucket/some/prefix" if request.param == "s3" else f"file://{tmp_path}/store"


def test_objects_are_written_read_listed_and_deleted(url: str, tmp_path: Path) -> None:
    objects = open_objects(url)
    assert list(objects.list("")) == []
    assert objects.get("a/b") is None
    objects.put("a/b", b"1")
    objects.put("a/b", b"2")
    large = tmp_path / "large"
    large.write_bytes(os.urandom(12_000_000))
    with large.open("rb") as file:
        objects.put("a/large", file)
    objects.put("other", b"3")
    assert list(objects.list("a/")) == ["a/b", "a/large"]
    assert objects.get("a/b") == b"2"
    with (tmp_path / "copy").open("w+b") as copy:
        assert objects.download("a/large", copy)
        assert not objects.download("a/none", copy)
    objects.delete(["a/b", "a/none", "other"])
    assert list(objects.list("")) == ["a/large"]


def test_an_object_is_only_written_if_it_is_absent(url: str) -> None:
    objects = open_objects(url)
    assert objects.put_if_absent("lease", b"mine")
    assert not objects.put_if_absent("lease", b"yours")
    assert objects.get("lease") == b"mine"


def test_a_write_whose_answer_was_lost_was_made(bucket: s3.Store) -> None:
    bucket.faults = [Fault("PUT", "lose_answer")]
    assert open_objects("s3://bucket/x").put_if_absent("lease", b"mine")


@pytest.mark.parametrize("kind", ["503", "403"])
def test_a_store_that_fails_says_why_in_one_line(bucket: s3.Store, kind: Any) -> None:
    bucket.faults = [Fault("PUT", kind, times=99)]
    with pytest.raises(StoreError, match=r"^[^\n]*(SlowDown|AccessDenied)[^\n]*$"):
        open_objects("s3://bucket/x").put("a", b"")


@pytest.fixture
def stored_run(url: str) -> StoredRun:
    return StoredRun(open_objects(url), "run")


def test_a_run_has_one_owner(stored_run: StoredRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("job.runs.store_lease.RENEW_SECONDS", 0.02)
    monkeypatch.setattr("job.runs.store_lease.POLL_SECONDS", 0.02)
    lease = StoreLease(stored_run)
    with pytest.raises(InvalidInputError, match="another process is working on .*/run .process"):
        StoreLease(stored_run)
    lease.check_store()
    lease.release()
    second = StoreLease(stored_run)  # at once
    assert second.generation == lease.generation + 1
    second.release()


def test_a_lease_that_is_not_renewed_is_taken_over_and_its_owner_notices(
    stored_run: StoredRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("job.runs.store_lease.LEASE_SECONDS", 0.1)
    monkeypatch.setattr("job.runs.store_lease.has_ended", lambda owner: False)
    first = StoreLease(stored_run)
    second = StoreLease(stored_run)
    first.check()
    with pytest.raises(JobError, match="another process has taken over"):
        first.check_store()
    with pytest.raises(JobError, match="another process has taken over"):
        first.check()
    second.check_store()
    first.release()  # changes nothing
    second.check_store()
    second.release()


def start(*lines: str) -> subprocess.Popen[bytes]:
    """Start a process, and not a fork of this one, in which obstore's threads would be missing."""
    script = "\n".join(["import os, signal, sys, time", "from job.runs.objects import open_objects", *lines])
    return subprocess.Popen([sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": str(ROOT)})


def test_the_lease_of_a_killed_process_is_taken_over_at_once(stored_run: StoredRun) -> None:
    owner = start(
        "from job.runs.store_lease import StoreLease; from job.runs.stored_run import StoredRun",
        f"StoreLease(StoredRun(open_objects({stored_run.objects.url!r}), 'run'))",
        "os.kill(os.getpid(), signal.SIGKILL)",
    )
    assert owner.wait(60) == -signal.SIGKILL
    started = time.monotonic()
    StoreLease(stored_run).release()
    assert time.monotonic() - started < 5


def test_of_many_that_want_a_run_one_gets_it(stored_run: StoredRun, tmp_path: Path) -> None:
    begin = time.time() + 1.5  # when all have started
    wanted = f"open_objects({stored_run.objects.url!r}).put_if_absent('run/lease', str(os.getpid()).encode())"
    wait = f"time.sleep({begin} - time.time() if time.time() < {begin} else 0)"
    codes = [child.wait(60) for child in [start(wait, f"sys.exit(0 if {wanted} else 1)") for _ in range(4)]]
    assert sorted(codes) == [0, 1, 1, 1]


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
