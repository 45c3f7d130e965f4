"""A run has one owner, also on file systems without locks, and nobody waits for one that has ended."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import open_to_other_users

from job.errors import InvalidInputError, JobError
from job.runs import ownership

ROOT = Path(__file__).parents[1]
WITHOUT_LOCKS = """
#include <errno.h>
int flock(int file, int operation) { errno = %s; return -1; }
"""
HOLD = """
import sys, time
from pathlib import Path
from job.errors import InvalidInputError
from job.runs import ownership
ownership.RENEW_SECONDS, ownership.LEASE_SECONDS = 0.2, 1.0
try:
    owner = ownership.acquire(Path(sys.argv[1]))
except InvalidInputError as error:
    sys.exit(str(error))
print("owner", flush=True)
if sys.argv[2:]:
    time.sleep(30)
owner.release()
"""


@pytest.fixture(scope="module", params=["ENOLCK", "EOPNOTSUPP", "ENOSYS"])
def no_locks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return an environment in which the C library has no flock."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    folder = tmp_path_factory.mktemp("preload")
    (folder / "no_locks.c").write_text(WITHOUT_LOCKS % request.param)
    library = folder / "no_locks.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, folder / "no_locks.c"], check=True)
    return {**os.environ, "LD_PRELOAD": str(library), "PYTHONPATH": str(ROOT)}


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ownership, "RENEW_SECONDS", 0.1)
    monkeypatch.setattr(ownership, "LEASE_SECONDS", 0.5)


@pytest.fixture
def lease(tmp_path: Path, fast: None) -> Iterator[ownership.Lease]:
    owner = ownership.Lease(tmp_path)
    yield owner
    owner.release()


def write_lease(run: Path, **entries: object) -> None:
    (run / ownership.LEASE).write_text(json.dumps({"token": "theirs", "host": "node-7", "pid": 1, **entries}))


def acquire(run: Path, environ: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", HOLD, run], env=environ, capture_output=True, text=True, check=False)


def test_without_locks_a_lease_keeps_others_out_until_its_owner_ends(no_locks: dict[str, str], tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path, "hold"], env=no_locks, stdout=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == "owner\n"
        refused = acquire(tmp_path, no_locks)
        assert f"another process is working on {tmp_path} (process {owner.pid} on " in refused.stderr
        owner.send_signal(signal.SIGKILL)
    assert (tmp_path / ownership.LEASE).exists()
    assert acquire(tmp_path, no_locks).stdout == "owner\n", "a process that was killed is not waited for"
    assert not (tmp_path / ownership.LEASE).exists()
    assert not list(tmp_path.glob("*.tmp"))


def test_a_lease_that_another_machine_renews_is_respected(tmp_path: Path, fast: None) -> None:
    write_lease(tmp_path, renewals=1)
    renewal = threading.Timer(0.2, write_lease, [tmp_path], {"renewals": 2})
    renewal.start()
    with pytest.raises(InvalidInputError, match=r"another process is working on .* \(process 1 on node-7\)"):
        ownership.Lease(tmp_path)
    renewal.join()


@pytest.mark.parametrize(
    "content", ["{}", "", '{"token": 1, "host"', '{"host": "node-7", "pid": 1, "process": "a b 1 2"}']
)
def test_a_lease_that_nobody_renews_is_taken_over(tmp_path: Path, fast: None, content: str) -> None:
    (tmp_path / ownership.LEASE).write_text(content)
    os.utime(tmp_path / ownership.LEASE, (2**33, 2**33))  # a clock that is ahead does not matter
    started = time.monotonic()
    ownership.Lease(tmp_path).release()
    assert time.monotonic() - started >= ownership.LEASE_SECONDS
    assert not list(tmp_path.iterdir())


def test_of_several_that_take_over_one_becomes_the_owner(tmp_path: Path, fast: None) -> None:
    write_lease(tmp_path)
    owners: list[ownership.Lease] = []

    def take_over() -> None:
        with suppress(InvalidInputError):
            owners.append(ownership.Lease(tmp_path))

    threads = [threading.Thread(target=take_over) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    time.sleep(3 * ownership.RENEW_SECONDS)
    still = [owner for owner in owners if not owner._lost]
    assert len(still) == 1
    for owner in owners:
        owner.release()


def test_an_owner_that_has_lost_its_lease_stops(lease: ownership.Lease, tmp_path: Path) -> None:
    lease.check()
    write_lease(tmp_path)
    with pytest.raises(JobError, match="another process has taken over"):
        lease.check()
    lease.release()
    assert (tmp_path / ownership.LEASE).exists(), "it belongs to the other one"


def test_a_lock_respects_the_lease_of_a_machine_without_locks(lease: ownership.Lease, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="another process is working on"):
        ownership.acquire(tmp_path)
    lease.release()
    ownership.acquire(tmp_path).release()


def test_another_users_lock_file_can_be_locked(tmp_path: Path) -> None:
    (tmp_path / ownership.LOCK).touch(mode=0o444)
    if os.geteuid() != 0:
        ownership.acquire(tmp_path).release()
        return
    open_to_other_users(tmp_path)
    tmp_path.chmod(0o777)
    os.seteuid(54321)
    try:
        ownership.acquire(tmp_path).release()
    finally:
        os.seteuid(0)


def test_a_file_system_without_locks_is_reported_before_a_model_is_loaded(
    no_locks: dict[str, str], tmp_path: Path
) -> None:
    code = (
        "from test_run_folder import EXAMPLES, settings\nfrom pathlib import Path\n"
        "from job.runs.run_folder import RunFolder\n"
        f"run = RunFolder.open(settings(Path({str(tmp_path)!r})), EXAMPLES)\nprint('opened', flush=True)\n"
        "run.begin('cpu'); run.record_verdict(passed=True)\nassert (run.path / 'lease').exists(); run.release()"
    )
    environ = no_locks | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True)
    assert "has no locks (flock); the run is marked by a lease" in done.stderr
    assert json.loads((tmp_path / "one" / "manifest.json").read_text())["status"] == "passed"
    assert not (tmp_path / "one" / "lease").exists()


def test_a_lock_that_is_released_soon_is_waited_for(tmp_path: Path) -> None:
    """Processes that lost the one that started them save their last step, while the next attempt may start already."""
    first = ownership.acquire(tmp_path)
    release = threading.Timer(0.3, first.release)
    release.start()
    second = ownership.acquire(tmp_path)
    release.join()
    second.release()
