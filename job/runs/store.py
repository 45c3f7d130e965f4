"""TAGGER_RUN_STORE: keep a copy of a run in object storage, so that it resumes on a machine without its disk."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import stat
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from job import __version__
from job.errors import InvalidInputError, JobError, PublishError
from job.runs import ownership, shutdown
from job.runs.checksums import Checksums
from job.runs.objects import StoreError
from job.runs.run_folder import TRACKING, RunFolder, read_manifest
from job.runs.sealed_files import NotRegularError, NotSealedError, open_regular
from job.runs.store_lease import StoreLease
from job.runs.stored_run import (
    MARKER,
    SEAL_VERSION,
    Seal,
    StoredRun,
    data_name,
    generation_of,
    mark,
    marked,
    open_stored,
    requests,
)
from job.settings import Run

log = logging.getLogger(__name__)

NOT_STORED = (ownership.LOCK, ownership.LEASE, MARKER)
MERGED = "merged"
"""Not stored: it is as large as the base model, and is made again from the adapter."""
KEPT_SEALS = 2
CONNECTIONS = 8
FINAL_ATTEMPTS = 3
"""How often the last state is sent; each request is also repeated by itself."""
FINAL_PAUSE_SECONDS = 10.0
FINAL_SECONDS = 240.0
"""After which the end of the job gives a store up that has completed no file."""


@contextmanager
def stored(settings: Run, run: RunFolder) -> Iterator[None]:
    """Own a run in TAGGER_RUN_STORE during this context: bring its newest state down, then send up what is saved.

    Raises InvalidInputError if the store cannot be used or another process owns the run. A store that fails later
    costs progress only; raises PublishError at the end if the complete run could not be stored.
    """
    copy = open_stored(settings, run.path.name)
    if copy is None:
        yield
        return
    with ExitStack() as stack:
        with requests(settings):
            lease = StoreLease(copy)
            stack.callback(lease.release)
            is_restored = _bring_down(copy, run)
            upload = _Upload(copy, lease, run.path)
        if run.started and not is_restored:
            upload.saved()  # what an earlier attempt could not send
        run.store = upload
        try:
            yield
        except BaseException:
            if (problem := upload.finish(attempts=1)) is not None:
                log.warning(
                    "run: the last state of %s is not stored in %s: %s. Run the same command again on this machine: it "
                    "stores it",
                    *(run.path, copy.name, problem),
                )
            raise
        finally:
            run.store = None
        try:
            problem = upload.finish()
        except KeyboardInterrupt:  # the rest of the grace is for what is being sent
            upload.finish(attempts=1)
            raise
        if problem is not None:
            lease.check()
            raise PublishError(
                f"{run.path} is complete on this disk, but could not be stored in {copy.name}: {problem}. Run the same "
                "command again on this machine: it stores it, and repeats nothing"
            )


def _bring_down(copy: StoredRun, run: RunFolder) -> bool:
    """Restore a run unless its folder has that state or a later one; return whether it was restored.

    Raises InvalidInputError if the folder has another run.
    """
    if (run.path / "manifest.json").is_file() and marked(run.path, copy.name) is None and copy.seals():
        raise InvalidInputError(
            f"the run {run.path.name} is in {run.path.parent} and in TAGGER_RUN_STORE, and the one here was not made "
            "with this store; set TAGGER_RUN_ID to another name, or remove one of them"
        )
    if not copy.bring(run.path):
        return False
    run.in_store = False
    run.manifest = read_manifest(run.path)
    run.check_inputs()  # another process may have stored it after this one compared
    return True


class _Upload:
    """Sends the newest state of a run's folder in the background."""

    def __init__(self, copy: StoredRun, lease: StoreLease, path: Path) -> None:
        self._copy, self._lease, self._path = copy, lease, path
        self._number = 0
        self._sent: set[str] = set()
        """Objects of this generation that are complete."""
        self._seals: list[tuple[Seal, set[str]]] = []
        """The seals of this generation that are kept, each with the objects that it needs."""
        self._newest = _contents(copy.newest_files() or {})
        """The newest stored state: one that has the same files is not stored again."""
        self._digests: dict[tuple[int, ...], str] = {}
        """By what identifies the content of a file: device, inode, size and time."""
        self._waiting: _State | None = None
        self._problem: str | None = None
        self._attempts, self._progress = FINAL_ATTEMPTS, 0.0
        self._changed, self._ended = threading.Condition(), False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise JobError if another process has taken the run over."""
        self._lease.check()

    def saved(self) -> None:
        """Send the state that the folder has now, in place of one that still waits."""
        state = _State(self._path)
        with self._changed:
            if self._waiting is not None:
                self._waiting.close()
            self._waiting = state
            self._changed.notify()

    def finish(self, attempts: int = FINAL_ATTEMPTS) -> str | None:
        """Send the state that the folder has at the end; return why it could not be stored, None if it is."""
        self._attempts, self._progress = attempts, time.monotonic()
        if not self._ended and self._path.is_dir():
            self.saved()  # the trackers write after the last progress
        with self._changed:
            self._ended = True
            self._changed.notify()
        while self._thread.is_alive():
            left = self._progress + FINAL_SECONDS - time.monotonic()
            if left <= 0:
                shutdown.leave_threads_behind()
                return self._problem or f"no file was stored for {FINAL_SECONDS:g} s"
            self._thread.join(left)
        return self._problem

    def _run(self) -> None:
        while (state := self._next()) is not None:
            self._send(state)
        for _ in range(1, self._attempts):
            if self._problem is None or self._lease.lost:
                return
            time.sleep(FINAL_PAUSE_SECONDS)
            self._send(_State(self._path))

    def _next(self) -> _State | None:
        """Return the state to send next, when there is one; None at the end."""
        with self._changed:
            while self._waiting is None and not self._ended:
                self._changed.wait()
            state, self._waiting = self._waiting, None
            return state

    def _send(self, state: _State) -> None:
        """Send a state, data first and its seal last; a failure is logged once, until it works again."""
        try:
            with state:
                self._write(state)
        except JobError as error:  # another process has taken the run over; the job ends at its next step
            self._problem = str(error)
        except Exception as error:  # of the store, the disk, or a defect of this: none is a reason to end the job
            if self._problem is None:
                log.warning(
                    "run: progress is not stored in %s (%s); the job continues and stores it with the next progress",
                    *(self._copy.name, error),
                )
            self._problem = str(error)
        else:
            if self._problem is not None:
                log.info("run: progress is stored in %s again", self._copy.name)
            self._problem = None

    def _write(self, state: _State) -> None:
        if state.problem is not None:
            raise state.problem
        generation = self._lease.generation
        files: Checksums = {name: state.checksum(name, self._digests) for name in state.files}
        if not files or _contents(files) == self._newest:  # a folder that was deleted replaces nothing
            return
        needed = {data_name(generation, entry): name for name, entry in files.items()}
        missing = [name for name in needed if name not in self._sent]
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            for name in pool.map(lambda name: self._put(name, state.open(needed[name])), missing):
                self._sent.add(name)
        self._lease.check_store()
        self._number += 1
        seal = Seal(generation, self._number)
        content = {"schema_version": SEAL_VERSION, "job_version": __version__, "files": files}
        mark(self._path, self._copy.name, seal, own=True)  # first: the answer to the next request may be lost
        self._copy.put(seal.name, json.dumps(content, indent=1).encode())
        self._newest = _contents(files)
        self._seals.append((seal, set(needed)))
        try:
            self._prune()
        except StoreError as error:  # what is left costs space only
            log.debug("run: older states in %s are not deleted (%s)", self._copy.name, error)

    def _put(self, name: str, file: IO[bytes]) -> str:
        self._copy.put(name, file)
        self._progress = time.monotonic()
        return name

    def _prune(self) -> None:
        """Delete what only older states need, and those of former owners; the last one stays until there are two."""
        if len(self._seals) <= KEPT_SEALS:
            own, former = self._lease.generation, [seal.generation for seal in self._copy.seals()]
            oldest = max((number for number in former if number < own), default=own) if len(self._seals) == 1 else own
            names = self._copy.names()
            self._copy.delete([name for name in names if (found := generation_of(name)) is not None and found < oldest])
            return
        (old, objects), *self._seals = self._seals
        unused = objects.difference(*(needed for _, needed in self._seals))
        self._sent -= unused
        self._copy.delete([old.name])  # first, so that no seal ever lacks its files
        self._copy.delete(sorted(unused))


def _contents(files: Checksums) -> dict[str, object]:
    """Return the checksum of each file."""
    return {name: entry["sha256"] for name, entry in files.items()}


def _raise_unless_absent(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error


class _State:
    """The files of a run at one moment, held open: what replaces or deletes them does not change these."""

    def __init__(self, path: Path) -> None:
        self.files: dict[str, Any] = {}
        self.problem: Exception | None = None
        """Why not all files could be opened: what is saved then is not stored, and the job continues."""
        try:
            self._open_all(path)
        except (OSError, NotSealedError) as error:
            self.close()
            self.problem = error

    def _open_all(self, path: Path) -> None:
        for folder, folders, names in os.walk(path, onerror=_raise_unless_absent):
            folders[:] = [name for name in folders if not name.endswith(".tmp") and name != MERGED]
            if Path(folder) == path / TRACKING:
                folders.clear()  # libraries write to files there at any time
            for name in names:
                relative = Path(folder, name).relative_to(path).as_posix()
                if relative in NOT_STORED or name.endswith(".tmp"):
                    continue
                with suppress(NotRegularError):  # deleted since it was listed, or a link
                    self.files[relative] = open_regular(path, relative)

    def __enter__(self) -> _State:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def open(self, name: str) -> IO[bytes]:
        file: IO[bytes] = self.files[name]
        file.seek(0)
        return file

    def checksum(self, name: str, known: dict[tuple[int, ...], str]) -> dict[str, int | str]:
        """Return size and SHA-256 of a file, from `known` if its content was read before."""
        file = self.open(name)
        found = os.fstat(file.fileno())
        assert stat.S_ISREG(found.st_mode)
        key = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
        if key not in known:
            known[key] = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
        return {"bytes": found.st_size, "sha256": known[key], "modified_ns": found.st_mtime_ns}

    def close(self) -> None:
        for file in self.files.values():
            file.close()
