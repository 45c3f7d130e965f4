"""Ownership of a run: a lock on a file, or where the file system has no locks, a lease that its owner renews."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import platform
import secrets
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path

from job.errors import InvalidInputError, JobError
from job.runs import shutdown

log = logging.getLogger(__name__)

LOCK, LEASE = "lock", "lease"
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)
"""Errors of a file system without locks: NFS without a lock server, and volumes in user space."""
WAIT_SECONDS = 10.0
"""How long a locked run is waited for: processes that lost the one that started them save their last step first."""
RENEW_SECONDS = 10.0
LEASE_SECONDS = 60.0
"""An owner who has not renewed a lease for this long has lost it. Others measure it with their own clock, as the time
in which they see no change, so clocks that differ do no harm."""


class Owner:
    """The right of this process to write to a run, until `release`."""

    def release(self) -> None:
        raise NotImplementedError

    def check(self) -> None:
        """Raise JobError if the right was lost."""


def has_locks(folder: Path) -> bool:
    """Return whether files in an existing folder can be locked."""
    with tempfile.TemporaryFile(dir=folder) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            return False
    return True


def acquire(run: Path, *, waits: bool = True) -> Owner:
    """Become the owner of a run's folder; raises InvalidInputError if another process still is after WAIT_SECONDS.

    With `waits=False`, a lock is not waited for.

    Without locks, the lease of an owner that has ended without releasing it is taken over: at once if it was a process
    of this machine, else after LEASE_SECONDS.
    """
    lock = _open_lock(run / LOCK)
    try:
        _wait_for_lock(lock, run, WAIT_SECONDS if waits else 0.0)
    except BlockingIOError:
        os.close(lock)
        raise refused(run) from None
    except OSError as error:
        os.close(lock)
        if error.errno not in NO_LOCKS:
            raise
        return Lease(run)
    if (run / LEASE).exists():  # of a machine that has no locks on the same files
        try:
            Lease(run).release()
        except BaseException:
            os.close(lock)
            raise
    return _Lock(lock)


def _wait_for_lock(lock: int, run: Path, seconds: float) -> None:
    """Lock a file; raises BlockingIOError if another process has it after `seconds`, else an OSError at once."""
    deadline, is_logged = time.monotonic() + seconds, False
    while True:
        try:
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise
        if not is_logged:
            log.info("run: another process has %s; waiting up to %.0f s for it to end", run, seconds)
            is_logged = True
        time.sleep(0.1)
        shutdown.check()


class _Lock(Owner):
    def __init__(self, file: int) -> None:
        self._file: int | None = file

    def release(self) -> None:
        if self._file is not None:
            os.close(self._file)
        self._file = None

    def __del__(self) -> None:
        self.release()


def _open_lock(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except PermissionError:  # another user's file can still be locked
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


class Lease(Owner):
    """A file that names its owner and that a thread rewrites every RENEW_SECONDS."""

    def __init__(self, run: Path) -> None:
        self._run, self._path = run, run / LEASE
        self._token = secrets.token_hex(8)
        self._renewals = 0
        self._ended = threading.Event()
        self._lost = False
        while not self._create():
            self._take_over()
        self._thread = threading.Thread(target=self._renew_until_released, daemon=True)
        self._thread.start()

    def check(self) -> None:
        with suppress(OSError):  # a file system that does not answer is reported when the lease is renewed
            # read it: after a pause of the whole process, its thread may not have run yet
            self._lost = self._lost or not self._is_ours()
        if self._lost:
            raise JobError(
                f"another process has taken over {self._run}, because this one had not renewed its lease for "
                f"{LEASE_SECONDS:g} s; the other one continues the run"
            )

    def release(self) -> None:
        if self._ended.is_set():
            return
        self._ended.set()
        self._thread.join()
        os.close(self._file)
        with suppress(OSError):
            if self._is_ours():
                self._path.unlink()

    def _create(self) -> bool:
        try:
            self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        except FileExistsError:
            return False
        self._write()
        return True

    def _write(self) -> None:
        self._renewals += 1
        owner = {
            "token": self._token,
            "host": platform.node(),
            "pid": os.getpid(),
            "process": process_identity(os.getpid()),
        }
        os.pwrite(self._file, json.dumps(owner | {"renewals": self._renewals}).encode() + b"\n", 0)
        os.fsync(self._file)

    def _renew_until_released(self) -> None:
        while not self._ended.wait(RENEW_SECONDS):
            try:
                if not self._is_ours():
                    self._lost = True
                    return
                self._write()
            except OSError as error:
                log.warning("run: the lease of %s is not renewed (%s)", self._run, error.strerror or error)

    def _is_ours(self) -> bool:
        return _owner(self._read()).get("token") == self._token

    def _read(self) -> bytes | None:
        try:
            return self._path.read_bytes()
        except FileNotFoundError:
            return None

    def _take_over(self) -> None:
        """Remove the lease of an owner that has ended; raises InvalidInputError when it is renewed meanwhile."""
        seen = self._read()
        owner = _owner(seen)
        if not has_ended(owner):
            log.info(
                "run: %s was left by process %s on %s; waiting up to %.0f s to see whether that still works on it",
                *(self._run, owner.get("pid", "?"), owner.get("host", "another machine"), LEASE_SECONDS),
            )
            self._watch(seen)
        aside = self._path.with_name(f"{LEASE}.{self._token}.tmp")
        with suppress(FileNotFoundError):  # released, or another process is faster
            self._path.rename(aside)
            if aside.read_bytes() != seen:  # another process was faster, and this is its lease
                with suppress(OSError):
                    self._path.hardlink_to(aside)  # never over a lease that a third one has created
                aside.unlink()
                raise refused(self._run, _owner(self._read()))
            aside.unlink()

    def _watch(self, seen: bytes | None) -> None:
        deadline = time.monotonic() + LEASE_SECONDS
        while time.monotonic() < deadline:
            time.sleep(min(1.0, LEASE_SECONDS / 10))
            shutdown.check()
            now = self._read()
            if now is None:
                return
            if now != seen:
                raise refused(self._run, _owner(now))


def _owner(content: bytes | None) -> dict[str, object]:
    try:
        owner = json.loads(content or b"")
    except ValueError:
        return {}
    return owner if isinstance(owner, dict) else {}


def process_identity(pid: int) -> str | None:
    """Return what identifies a process of this machine: boot, namespace, number and start; None if there is none."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        # the name of the program, in parentheses, may have spaces
        start = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[19]
        return f"{boot} {Path('/proc/self/ns/pid').readlink()} {pid} {start}"
    except (OSError, LookupError):
        return None


def has_ended(owner: dict[str, object]) -> bool:
    """Return whether the owner of a lease was a process of this machine that has ended; False if this is not known."""
    process, pid, own = owner.get("process"), owner.get("pid"), process_identity(os.getpid())
    if not isinstance(process, str) or not isinstance(pid, int) or own is None:
        return False
    same_machine = process.split()[:2] == own.split()[:2]
    return same_machine and process_identity(pid) != process


class OwnedError(InvalidInputError):
    """Another process owns the run."""


def refused(run: Path | str, owner: dict[str, object] | None = None) -> OwnedError:
    """Return the refusal of a run that another process owns, with the process where a lease names it."""
    who = f" (process {owner['pid']} on {owner['host']})" if owner and {"pid", "host"} <= owner.keys() else ""
    return OwnedError(f"another process is working on {run}{who}; wait for it, or set TAGGER_RUN_ID to another name")
