"""The copy of a run in object storage: data first, then a seal that lists it; the newest one that verifies counts.

Objects of a run, below TAGGER_RUN_STORE and the run's name:

    lease/000002.json           who owns the run; each owner has the next number, its generation
    000002/files/<SHA-256>      contents of files
    000002/seals/000007.json    the names of all files at one moment, with sizes and checksums

An owner writes below its own number only. So one that has lost the run without noticing it overwrites and deletes
nothing of its successor.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, TypeVar

from job.errors import InvalidInputError
from job.runs import atomic, ownership
from job.runs.checksums import Checksums, file_digest
from job.runs.objects import Objects, StoreError, open_objects
from job.settings import Run

log = logging.getLogger(__name__)

T = TypeVar("T")
SEAL_VERSION = 1
MARKER = ".stored.json"
"""In the folder of a run: which seal of which store it was last equal to."""
SEAL_NAME = re.compile(r"(\d{6})/seals/(\d{6})\.json")
OBJECT_NAME = re.compile(r"lease/(\d{6})\.json|(\d{6})/(?:seals/\d{6}\.json|files/[0-9a-f]{64})")
"""What the job writes below the name of a run; other objects are not its own."""
SHA256 = re.compile("[0-9a-f]{64}")
ADAPTER = "adapter/adapter_config.json"
LISTINGS = 5
"""How often the states of a run are listed, if its owner deletes them while they are read."""
CHECKPOINT = re.compile(r"checkpoints/checkpoint-(\d+)/")


@dataclass(frozen=True, order=True)
class Seal:
    """The number of a stored state: later ones are larger."""

    generation: int
    number: int

    @property
    def name(self) -> str:
        return f"{self.generation:06d}/seals/{self.number:06d}.json"


class StoredRun:
    """The objects of one run."""

    def __init__(self, objects: Objects, run_id: str) -> None:
        self.objects = objects
        self.run_id = run_id
        self._prefix = f"{run_id}/"
        self.name = f"{objects.url}/{run_id}"

    def put(self, name: str, content: bytes | IO[bytes]) -> None:
        self.objects.put(self._prefix + name, content)

    def put_if_absent(self, name: str, content: bytes) -> bool:
        return self.objects.put_if_absent(self._prefix + name, content)

    def get(self, name: str) -> bytes | None:
        return self.objects.get(self._prefix + name)

    def names(self, prefix: str = "") -> list[str]:
        return [name.removeprefix(self._prefix) for name in self.objects.list(self._prefix + prefix)]

    def delete(self, names: list[str]) -> None:
        self.objects.delete([self._prefix + name for name in names])

    def seals(self) -> list[Seal]:
        """Return the seals that there are, the newest first."""
        matches = filter(None, map(SEAL_NAME.fullmatch, self.names()))
        return sorted((Seal(int(match[1]), int(match[2])) for match in matches), reverse=True)

    def read(self, name: str) -> bytes | None:
        """Return the content of a file in the newest state that can be read; None if there is none."""

        def read_from(seal: Seal) -> bytes | None:
            if (entry := self._files(seal).get(name)) is None:
                return None
            content = self.get(data_name(seal.generation, entry))
            if content is None or hashlib.sha256(content).hexdigest() != entry["sha256"]:
                raise DamagedError(f"{name} is missing or has changed")
            return content

        return self._from_newest(read_from)[0]

    def restore(self, path: Path) -> Seal | None:
        """Replace a run's folder by the newest state that verifies; return its seal, None if nothing is stored.

        Files that are there already are not downloaded, and its lock stays the one that other processes wait for.
        Raises OSError, StoreError, and InvalidInputError if nothing
        that is stored can be used.
        """
        _refuse_other_files(path)
        seal, tried = self._from_newest(lambda seal: self._restore_from(seal, path))
        if seal is None and tried:
            raise InvalidInputError(
                f"none of the {tried} states in {self.name} can be used; remove it, or set TAGGER_RUN_ID to another "
                "name"
            )
        return seal

    def _restore_from(self, seal: Seal, path: Path) -> Seal:
        files = self._files(seal)
        with atomic.atomic_directory(path) as folder:
            for name, entry in files.items():
                self._bring(seal, entry, path / name, folder / name)
            _keep_times(folder, files)
            mark(folder, self.name, seal, own=False)
            _keep_lock(path, folder)
        step = max((int(match[1]) for name in files if (match := CHECKPOINT.match(name))), default=None)
        log.info("run: restored from %s%s", self.name, "" if step is None else f", with the checkpoint of step {step}")
        return seal

    def _from_newest(self, use: Callable[[Seal], T]) -> tuple[T | None, int]:
        """Return what `use` makes of the newest state for which it raises no DamagedError, and how many were tried.

        The owner may save and prune meanwhile, so that all states of a list are gone: then there are newer ones.
        """
        tried: set[Seal] = set()
        for _ in range(LISTINGS):
            seals = [seal for seal in self.seals() if seal not in tried]
            for seal in seals:
                tried.add(seal)
                try:
                    return use(seal), len(tried)
                except DamagedError as error:
                    self._report_damage(seal, error)
            if not seals:
                break
        return None, len(tried)

    def _report_damage(self, seal: Seal, error: DamagedError) -> None:
        if self.get(seal.name) is not None:  # its owner has not pruned it
            log.warning("run: %s in %s cannot be used: %s; trying the one before it", seal.name, self.name, error)

    def newest_files(self) -> Checksums | None:
        """Return the files of the newest state with their checksums; None if there is none that can be read."""
        for seal in self.seals()[:1]:
            with suppress(DamagedError):
                return self._files(seal)
        return None

    def is_newer_than(self, path: Path) -> bool:
        """Return whether the store has what a folder lacks; never for one that was not made with this store."""
        seals, here = self.seals(), marked(path, self.name)
        if here is None:
            return bool(seals) and not (path / "manifest.json").is_file()
        return bool(seals) and here.is_older_than(seals[0])

    def bring(self, path: Path, *, waits: bool = True) -> bool:
        """Restore a folder that is older than the store, and remove unfinished ones; return whether it was restored.

        Raises InvalidInputError if another process has locked the folder, and what `restore` does.
        """
        if not (self.is_newer_than(path) or atomic.tmp_paths_of(path)):
            return False
        _refuse_other_files(path)
        path.mkdir(parents=True, exist_ok=True)
        owner = ownership.acquire(path, waits=waits)
        try:
            for leftover in atomic.tmp_paths_of(path):
                shutil.rmtree(leftover, ignore_errors=True)
            return self.is_newer_than(path) and self.restore(path) is not None
        finally:
            owner.release()

    def _files(self, seal: Seal) -> Checksums:
        """Return the files of a state with their checksums; raises DamagedError if the seal cannot be read."""
        try:
            content = json.loads(self.get(seal.name) or b"")
            version, files = content["schema_version"], content["files"]
            if not all(_is_entry(name, entry) for name, entry in files.items()):
                raise ValueError
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DamagedError("its seal is no list of files") from error
        if version != SEAL_VERSION:
            raise InvalidInputError(
                f"{self.name} was written by another version of the job; use that one, or set TAGGER_RUN_ID to another "
                "name"
            )
        return dict(files)

    def _bring(self, seal: Seal, entry: dict[str, int | str], present: Path, to: Path) -> None:
        """Copy a file from the folder that is there, if it is the same, or from the store; raises DamagedError."""
        to.parent.mkdir(parents=True, exist_ok=True)
        if present.is_file() and not present.is_symlink() and _is_same(present, entry):
            shutil.copyfile(present, to)
            return
        with to.open("wb") as file:
            if not self.objects.download(f"{self._prefix}{data_name(seal.generation, entry)}", file):
                raise DamagedError(f"{to.name} is missing")
        if not _is_same(to, entry):
            raise DamagedError(f"{to.name} has changed since it was written")


class DamagedError(Exception):
    """A stored state is incomplete or has changed."""


def data_name(generation: int, entry: Mapping[str, int | str]) -> str:
    """Return the name of the object with the content of a file."""
    return f"{generation:06d}/files/{entry['sha256']}"


def generation_of(name: str) -> int | None:
    """Return which owner has written an object of a stored run; None if the job has not."""
    match = OBJECT_NAME.fullmatch(name)
    return None if match is None else int(match[1] or match[2])


def _refuse_other_files(path: Path) -> None:
    """Raise InvalidInputError if a folder has files and is no run, nor what is left of one that was never begun."""
    if not path.is_dir() or (path / "manifest.json").is_file():
        return
    known = (ownership.LOCK, ownership.LEASE, "checkpoints", "tracking", MARKER)
    if any(entry.name not in known and entry.suffix != ".tmp" for entry in path.iterdir()):
        raise InvalidInputError(f"{path} holds files but no run (no manifest.json); set TAGGER_RUN_ID to another name")


def _keep_lock(path: Path, folder: Path) -> None:
    """Let the folder that takes the place of another one have the same lock."""
    for name in (ownership.LOCK, ownership.LEASE):
        with suppress(OSError):  # absent; or a file system without links, where a waiting process keeps the old file
            (folder / name).hardlink_to(path / name)


def _is_entry(name: str, entry: Mapping[str, Any]) -> bool:
    """Return whether a seal's entry can be used, and its name stays in the folder of the run."""
    path = PurePosixPath(name)
    numbers = type(entry["bytes"]) is type(entry["modified_ns"]) is int
    return (
        numbers and SHA256.fullmatch(entry["sha256"]) is not None and not path.is_absolute() and ".." not in path.parts
    )


def _keep_times(folder: Path, files: Checksums) -> None:
    """Set when files and folders were written, which tells how long an attempt worked that was killed."""
    newest: dict[Path, int] = {}
    for name, entry in files.items():
        when = int(entry["modified_ns"])
        os.utime(folder / name, ns=(when, when))
        for parent in [folder / parent for parent in PurePosixPath(name).parents]:
            newest[parent] = max(when, newest.get(parent, 0))
    for parent, when in newest.items():
        os.utime(parent, ns=(when, when))


def _is_same(path: Path, entry: Mapping[str, int | str]) -> bool:
    return path.stat().st_size == entry["bytes"] and file_digest(path) == entry["sha256"]


def mark(folder: Path, store: str, seal: Seal, *, own: bool) -> None:
    """Record that a run's folder has the content of a stored state, and whether it is where that is from."""
    marker = {"store": store, "generation": seal.generation, "number": seal.number, "own": own}
    atomic.atomic_write(folder / MARKER, json.dumps(marker) + "\n")


@dataclass(frozen=True)
class Mark:
    """Which stored state a run's folder last was equal to."""

    seal: Seal
    own: bool
    """Whether the state is from this folder, which therefore has all later ones of this generation too."""

    def is_older_than(self, newest: Seal) -> bool:
        """Return whether a stored state may have what the folder does not have."""
        return self.seal < newest and not (self.own and self.seal.generation == newest.generation)


def marked(folder: Path, store: str) -> Mark | None:
    """Return what `mark` has recorded; None if a folder never was equal to a state in this store."""
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        seal = Seal(int(marker["generation"]), int(marker["number"]))
        return Mark(seal, bool(marker["own"])) if marker["store"] == store else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def open_stored(settings: Run, run_id: str) -> StoredRun | None:
    """Return a run in TAGGER_RUN_STORE; None if that is not set."""
    return None if settings.store is None else StoredRun(open_objects(settings.store), run_id)


def read_file(settings: Run, run_id: str, name: str) -> bytes | None:
    """Return a file of a run in TAGGER_RUN_STORE; None if there is no store, no such run, or no such file."""
    with requests(settings):
        copy = open_stored(settings, run_id)
        return None if copy is None else copy.read(name)


def fetch(settings: Run) -> None:
    """Bring the run TAGGER_RUN_ID to this disk if TAGGER_RUN_STORE has a later state of it, without owning it.

    Without TAGGER_RUN_ID, the newest run that has an adapter, unless there is one on this disk.
    """
    has_adapter = any(not atomic.is_tmp_path(file.parents[1]) for file in settings.dir.glob(f"*/{ADAPTER}"))
    if settings.store is None or (settings.id is None and has_adapter):
        return
    with requests(settings):
        objects = open_objects(settings.store)
        run_id = settings.id or _newest_with_adapter(objects)
        if run_id is None:
            return
        path, copy = settings.dir / run_id, StoredRun(objects, run_id)
        try:
            copy.bring(path, waits=False)
        except ownership.OwnedError:
            log.warning(
                "run: %s is used as it is: another process works in it, so that a newer state of it in %s is "
                "not brought here",
                path,
                copy.name,
            )


def _newest_with_adapter(objects: Objects) -> str | None:
    """Return the name of the run that was begun last, of those that have an adapter."""
    started = {}
    for run_id in stored_ids(objects):
        copy = StoredRun(objects, run_id)
        manifest = copy.read("manifest.json")
        if manifest is not None and copy.read(ADAPTER) is not None:
            started[run_id] = json.loads(manifest).get("started") or ""
    return max(started, key=lambda run_id: started[run_id], default=None)


def download_records(settings: Run, folder: Path, *, except_for: Collection[str]) -> Iterator[StoredRun]:
    """Write manifest and metrics of the runs in TAGGER_RUN_STORE below a folder, and yield each run."""
    if settings.store is None:
        return
    with requests(settings):
        objects = open_objects(settings.store)
        for run_id in stored_ids(objects):
            if run_id in except_for:
                continue
            copy, path = StoredRun(objects, run_id), folder / run_id
            path.mkdir()
            for name in ("manifest.json", "metrics.json"):
                if (content := copy.read(name)) is not None:
                    (path / name).write_bytes(content)
            yield copy


@contextmanager
def requests(settings: Run) -> Iterator[None]:
    """Turn a failure of TAGGER_RUN_STORE, when nothing has been spent yet, into a refusal."""
    try:
        yield
    except StoreError as error:
        raise InvalidInputError(
            f"TAGGER_RUN_STORE={settings.store} cannot be used: {error}. Check the URL, the network and the credentials"
        ) from error


def stored_ids(objects: Objects) -> list[str]:
    """Return the names of the runs in a store."""
    return sorted({name.partition("/")[0] for name in objects.list("") if SEAL_NAME.fullmatch(name.partition("/")[2])})
