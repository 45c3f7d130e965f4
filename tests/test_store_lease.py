"""The lease of a run in a store: one owner, across processes and machines."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import s3

from job.errors import InvalidInputError, JobError
from job.runs.objects import open_objects
from job.runs.store_lease import StoreLease
from job.runs.stored_run import StoredRun

ROOT = Path(__file__).parents[1]


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


def test_of_two_owners_of_one_generation_one_is_told(bucket: s3.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without conditional writes, two that start at once both write the same lease."""
    bucket.is_conditional = False
    stored_run = StoredRun(open_objects("s3://bucket/x"), "run")
    first = StoreLease(stored_run)
    with monkeypatch.context() as patch:
        patch.setattr(StoreLease, "_newest", lambda lease: None)  # it has looked before the first one wrote
        second = StoreLease(stored_run)
    assert first.generation == second.generation
    second.check_store()
    with pytest.raises(JobError, match="another process has taken over"):
        first.check_store()
    first.release()
    second.check_store()
    second.release()


def test_a_lease_that_is_overwritten_at_once_is_refused(bucket: s3.Store) -> None:
    class Overtaken(StoredRun):
        def put_if_absent(self, name: str, content: bytes) -> bool:
            self.put(name, b'{"token": "other", "pid": 7, "host": "there"}')
            return True

    with pytest.raises(InvalidInputError, match="another process is working on .*process 7 on there"):
        StoreLease(Overtaken(open_objects("s3://bucket/x"), "run"))


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
