"""The folder of a run: its files, its manifest, which parts are done, and which process owns it."""

from __future__ import annotations

import json
import logging
import os
import platform
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

from job import __version__
from job.config.earlier_versions import current_settings, differences, unknown_settings
from job.config.validators import allowed_name
from job.errors import InvalidInputError
from job.runs import ownership, provenance, schema, shutdown, stored_run
from job.runs.atomic import atomic_directory, atomic_write, is_tmp_path, json_lines
from job.runs.checksums import checksum_files, find_mismatch
from job.settings import Run, Settings
from job.system.events import event, in_chapter
from job.types import Published, SplitData

log = logging.getLogger(__name__)

MODEL_CARD = "adapter/README.md"
"""Has no recorded checksum: a model card may be edited before it is pushed."""
RESULTS = ("adapter", "metrics.json", "log.jsonl", "predictions.jsonl", "tags.jsonl", "samples.jsonl")
"""Files and folders that are complete before the gate; their checksums are then recorded."""
TUNE = "tune-"
"""The data's fingerprint in the manifest of a tune begins with this."""
TRACKING = "tracking"
"""Folder with what each tracker has been sent (TAGGER_RUN_TRACK)."""
TRACKING_HERE = f"{TRACKING}/local"
"""Folder with what trackers keep on this machine; it exists if the run is tracked."""
SPEED = f"{TRACKING_HERE}/speed.jsonl"
TRACKED_VERSIONS = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "huggingface_hub")


class MemoryMeter(Protocol):
    """What measures peak memory: a `ComputeSpec`."""

    def reset_peak_memory(self) -> None:
        """Let `peak_memory` count from now on."""

    def peak_memory(self) -> dict[str, float]:
        """Return the peak memory in GiB, by what has it."""


class Store(Protocol):
    """What keeps a copy of a run in object storage."""

    def check(self) -> None:
        """Raise JobError if another process has taken the run over."""

    def saved(self) -> None:
        """Take note that newer progress is on disk."""


class RunFolder:
    """The folder of one run and its manifest."""

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path = path
        self.manifest = manifest
        self.on_saved: Callable[[RunFolder], None] | None = None
        """Called after each checkpoint and each change of the manifest, to commit the volume that holds the run."""
        self.store: Store | None = None
        """The copy of the run in TAGGER_RUN_STORE, while this process owns it."""
        self.in_store = False
        """Whether the manifest is that of a copy, which is not on this disk yet."""
        self._inputs: tuple[Settings, SplitData] | None = None
        """What the run was opened with."""
        self.on_begun: Callable[[], None] | None = None
        """Called when this process has begun an attempt of the run, or the processes that it starts are about to."""
        self.memory: MemoryMeter | None = None
        """Measures the peak memory of each chapter, if it is set."""
        self._locked = False
        self._owner: ownership.Owner | None = None

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def started(self) -> bool:
        return self.in_store or (self.path / "manifest.json").is_file()

    @property
    def trained(self) -> bool:
        """Whether everything before the gate is done and unchanged."""
        return self.is_intact(*RESULTS)

    @property
    def complete(self) -> bool:
        return bool(self.manifest["status"] == "complete") and "published" in self.manifest and self.trained

    @property
    def published(self) -> bool:
        return self.manifest.get("published") is not None

    @classmethod
    def open(cls, settings: Settings, examples: SplitData) -> RunFolder:
        """Open the run of these settings and data, new or started; nothing is written before `begin`.

        Raises InvalidInputError when the folder cannot be written, holds other files, or a run with other
        settings or data.
        """
        run = cls._find(settings, examples)
        run._inputs = (settings, examples)
        if run.started:
            run.check_inputs()
        return run

    def check_inputs(self) -> None:
        """Raise InvalidInputError if the manifest is of other settings or data than those the run was opened with."""
        if self._inputs is not None:
            self._check_same_inputs(*self._inputs)

    @classmethod
    def _find(cls, settings: Settings, examples: SplitData) -> RunFolder:
        run_id = settings.run.id or default_run_id(settings, examples)
        path = settings.run.dir / run_id
        if settings.run.id is None and not (path / "manifest.json").is_file():
            path = _run_of_earlier_version(settings, examples) or path
        _check_folder(path)
        if (path / "manifest.json").is_file():
            return cls(path, read_manifest(path))
        if path.is_dir() and not _is_unused(path):
            raise InvalidInputError(
                f"{path} holds files but no run (no manifest.json); set TAGGER_RUN_ID to another name"
            )
        if (manifest := _stored_manifest(settings.run, path)) is not None:
            run = cls(path, manifest)
            run.in_store = True
            return run
        return cls(path, _new_manifest(run_id, settings, examples))

    def _check_same_inputs(self, settings: Settings, examples: SplitData) -> None:
        old, new = self.manifest["settings"], settings.values()
        is_tune = str(self.manifest["dataset"]["fingerprint"]).startswith(TUNE)
        if is_tune != examples.fingerprint.startswith(TUNE):
            raise InvalidInputError(
                f"{self.path} is the folder of {'a tune' if is_tune else 'a run'}; set TAGGER_RUN_ID to another name"
            )
        version = schema.written_by(self.manifest)
        if unknown := unknown_settings(old):
            name, value = next(iter(unknown.items()))
            raise InvalidInputError(
                f"the run {self.path} was begun by {version} of the job with {name}={value!r}, which version "
                f"{__version__} does not have; finish it with that version, or set TAGGER_RUN_ID to another name"
            )
        changes = [
            f"{name} was {old[name]!r} and is {new[name]!r}" for name in differences(old, settings.result_values())
        ]
        if not changes and self.manifest["dataset"]["fingerprint"] != examples.fingerprint:
            tags = settings.sample.vocabulary
            files = settings.data.dataset if tags in (None, "open", "seen") else f"{settings.data.dataset} or {tags}"
            changes = [f"the contents of {files} have changed"]
            if version != f"version {__version__}":
                changes = [f"{changes[0]}, or are read differently than by {version} of the job, which began it"]
        if changes:
            raise InvalidInputError(
                f"the run {self.path} was made with other settings or data: {'; '.join(changes)}. "
                "Change them back, or set TAGGER_RUN_ID to another name"
            )
        if self.manifest["status"] in ("running", "interrupted"):
            schema.check_checkpoints(self.checkpoints, version)

    def begin(self, device: str, weights: dict[str, Any] | None = None) -> None:
        """Create and lock the folder, once all inputs are checked, and record that the run is running.

        `weights` says how the base model's weights are stored on the device.
        """
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        self.lock()
        for leftover in (*self.path.glob("*.tmp"), *self.checkpoints.glob("*.tmp")):  # of a process that was killed
            if not leftover.name.startswith(stored_run.MARKER):  # the store's thread writes it at this moment
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        self.update(status="running", device=device, **({} if weights is None else {"base_weights": weights}))

    def lock(self) -> None:
        """Lock the run until `release` or the end of the process; raises InvalidInputError when another one has it."""
        if self._locked:
            return
        if self.on_saved is None:  # other machines do not see a volume's locks, and an open file blocks its reload
            self._owner = ownership.acquire(self.path)
        self._locked = True
        if self.started:
            self.manifest = read_manifest(self.path)  # the previous owner may have changed it since it was read

    def release(self) -> None:
        """Let other processes work on the run."""
        if self._owner is not None:
            self._owner.release()
        self._owner, self._locked = None, False

    @contextmanager
    def released_afterwards(self) -> Iterator[None]:
        """Release the run at the end of this context, and not when an error's traceback is garbage-collected."""
        try:
            yield
        finally:
            self.release()

    def _check_owner(self) -> None:
        if self._owner is not None:
            self._owner.check()
        if self.store is not None:
            self.store.check()

    def record_checksums(self, *names: str) -> None:
        """Record the checksums of files and folders that are done; while intact, they are not computed again."""
        files = [file for name in names for file in self._files(name) if file != self.path / MODEL_CARD]
        self.update(checksums=self.manifest.get("checksums", {}) | checksum_files(self.path, files))

    def is_intact(self, *names: str) -> bool:
        """Return whether all of these files and folders have recorded checksums, and match them."""
        for name in names:
            recorded = {
                file: entry
                for file, entry in self.manifest.get("checksums", {}).items()
                if file == name or file.startswith(f"{name}/")
            }
            if not recorded:
                return False
            try:
                mismatch = find_mismatch(self.path, recorded)
            except PermissionError as error:
                raise schema.unreadable(Path(error.filename or self.path), error) from error
            if mismatch is not None:
                log.warning("run: %s; it is recreated", mismatch)
                return False
        return True

    def _files(self, name: str) -> list[Path]:
        path = self.path / name
        return [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]

    def record_verdict(self, *, passed: bool) -> None:
        """Record whether the adapter passed the gate."""
        self.update(status="passed" if passed else "refused")

    @property
    def publishable(self) -> bool:
        return self.manifest["status"] in ("passed", "complete")

    def finish(self, published: Published | None) -> None:
        """Record that the run is complete, and where its adapter was published, if it was."""
        entry = None if published is None else asdict(published)
        self.update(status="complete", finished=utc_now(), published=entry)

    def update(self, **entries: Any) -> None:
        """Set entries of the manifest and write it; raises JobError if another process has taken the run over."""
        self._check_owner()
        self.manifest.update(entries)
        self.write("manifest.json", self.manifest_text())
        self.notify_saved()

    def manifest_text(self) -> str:
        """Return the content of manifest.json."""
        return json.dumps(provenance.sealed(self.manifest), indent=2, ensure_ascii=False) + "\n"

    def begun(self) -> None:
        """Notify the caller that an attempt begins."""
        if self.on_begun is not None:
            self.on_begun()

    def progress_watcher(self) -> Callable[[], None] | None:
        """Return a function that notifies if another process has saved newer progress since its last call.

        Returns None if nobody wants to know.
        """
        if self.on_saved is None and self.store is None:
            return None
        seen = self._progress()

        def look() -> None:
            nonlocal seen
            if (found := self._progress()) != seen:
                seen = found
                self.notify_saved()

        return look

    def _progress(self) -> tuple[object, ...]:
        manifest = self.path / "manifest.json"
        changed = manifest.stat().st_mtime_ns if manifest.is_file() else None
        return (changed, *sorted(path.name for path in self.checkpoints.glob("checkpoint-*")))

    def notify_saved(self) -> None:
        """Notify caller and store of newer progress on disk; raises JobError if another process has taken it over."""
        self._check_owner()
        if self.store is not None:
            self.store.saved()
        if self.on_saved is not None:
            self.on_saved(self)

    @contextmanager
    def chapter(self, name: str) -> Iterator[None]:
        """Measure the seconds of a chapter, summed over all attempts, and its peak memory; `update` writes them.

        Raises KeyboardInterrupt at the start when a signal was received before.
        """
        shutdown.check()
        if self.memory is not None:
            self.memory.reset_peak_memory()
        started = time.monotonic()
        log.debug("%s: begins", name, extra=event("chapter_started", chapter=name))
        try:
            with in_chapter(name):
                yield
        except BaseException as stop:
            self._add_time(name, started)
            _log_end(name, started, completed=False)
            if not isinstance(stop, Exception) and self._locked and self.manifest["status"] == "running":
                with suppress(OSError):  # a failure to write must not hide the interruption
                    self.update(status="interrupted")
            raise
        self._add_time(name, started)
        _log_end(name, started, completed=True)

    def _add_time(self, chapter: str, started: float) -> None:
        timings = self.manifest["timings"]
        timings[chapter] = round(timings.get(chapter, 0.0) + time.monotonic() - started, 2)
        if self.memory is not None:
            peaks = self.manifest.setdefault("peak_memory_by_chapter", {})
            found = self.memory.peak_memory()
            peaks[chapter] = _largest(peaks.get(chapter, {}), found)
            self.manifest["peak_memory"] = _largest(self.manifest.get("peak_memory", {}), found)

    def write(self, name: str, text: str) -> None:
        """Write a file of the run atomically."""
        atomic_write(self.path / name, text)

    def write_lines(self, name: str, entries: Iterable[object]) -> None:
        """Write a file of the run atomically, as JSON lines."""
        self.write(name, json_lines(entries))

    def record_speed(self, step: int, **figures: float) -> None:
        """Record speed and memory at an entry of log.jsonl for the trackers; log.jsonl is the same in every attempt."""
        if not (self.path / TRACKING_HERE).is_dir():
            return
        memory = {} if self.memory is None else self.memory.peak_memory()
        line = json.dumps({"step": step, **figures, **memory}) + "\n"
        with suppress(OSError), (self.path / SPEED).open("a", encoding="utf-8") as file:
            file.write(line)

    def read_lines(self, name: str) -> list[dict[str, Any]]:
        """Read a file of JSON lines of the run."""
        with (self.path / name).open(encoding="utf-8") as file:  # splitlines() would also split at U+2028
            return [json.loads(line) for line in file]

    @contextmanager
    def folder(self, name: str) -> Iterator[Path]:
        """Yield a temporary folder that becomes `name` in the run if the block ends without an error."""
        with atomic_directory(self.path / name) as folder:
            yield folder


def _log_end(chapter: str, started: float, *, completed: bool) -> None:
    seconds = round(time.monotonic() - started, 2)
    extra = event("chapter_ended", chapter=chapter, seconds=seconds, completed=completed)
    log.debug("%s: %s after %g s", chapter, "done" if completed else "ended", seconds, extra=extra)


def _largest(*measured: Mapping[str, float]) -> dict[str, float]:
    """Return the largest of several measurements, by name."""
    return {name: max(values.get(name, 0.0) for values in measured) for name in {n: 0 for v in measured for n in v}}


def default_run_id(settings: Settings, examples: SplitData) -> str:
    """Return the base model's name with a digest of settings and data: the same command finds the same run."""
    return f"{allowed_name(Path(settings.base.model).stem, 100)}-{settings.digest(examples.fingerprint)}"


def _run_of_earlier_version(settings: Settings, examples: SplitData) -> Path | None:
    """Find a run of these settings and data under the name that an earlier version gave it.

    The digest in a default name changes when a version adds or renames a setting.
    """
    names = re.compile(re.escape(Path(settings.base.model).stem) + "-[0-9a-f]{8}")
    for path in run_folders(settings.run.dir):
        if not names.fullmatch(path.name):
            continue
        with suppress(InvalidInputError, OSError):
            found = read_manifest(path)
            same = not unknown_settings(found["settings"])
            same = same and not any(differences(found["settings"], settings.result_values()))
            if same and found["dataset"]["fingerprint"] == examples.fingerprint:
                log.info("run: %s of the job began it as %s", schema.written_by(found), path.name)
                return path
    return None


def with_recorded_revisions(settings: Settings) -> Settings:
    """Set the revisions that are not configured to those with which the run TAGGER_RUN_ID started.

    So a run resumes with the same base model and data when the Hub has newer ones.
    """
    if settings.run.id is None:
        return settings
    path = settings.run.dir / settings.run.id
    is_here = (path / "manifest.json").is_file()
    manifest = read_manifest(path) if is_here else _stored_manifest(settings.run, path)
    if manifest is None:
        return settings
    old = manifest["settings"]
    same_model = old.get("TAGGER_BASE_MODEL") == settings.base.model
    same_dataset = old.get("TAGGER_DATA_DATASET") == settings.data.dataset
    return settings.with_revisions(
        base=settings.base.revision or (old.get("TAGGER_BASE_REVISION") if same_model else None),
        data=settings.data.revision or (old.get("TAGGER_DATA_REVISION") if same_dataset else None),
    )


def read_manifest(path: Path) -> dict[str, Any]:
    """Read the manifest of a run's folder; its settings have the names and values of today.

    Raises InvalidInputError when it cannot be read, is no manifest, or was written by a later version.
    """
    try:
        return parse_manifest(path, (path / "manifest.json").read_bytes())
    except PermissionError as error:
        raise schema.unreadable(path / "manifest.json", error) from error


def parse_manifest(path: Path, content: bytes) -> dict[str, Any]:
    """Return the manifest of a run's folder from the content of its file, as `read_manifest` does."""
    try:
        manifest: dict[str, Any] = json.loads(content)
        schema.check_manifest(path, manifest)
        valid = isinstance(manifest["settings"], dict) and isinstance(manifest["timings"], dict)
        valid = valid and {"status", "dataset", "versions"} <= manifest.keys() and manifest["dataset"]["fingerprint"]
        if manifest["schema_version"] != schema.MANIFEST or not valid:
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InvalidInputError(
            f"{path}/manifest.json is not a manifest of this version of the job; set TAGGER_RUN_ID to another name"
        ) from error
    return manifest | {"settings": current_settings(manifest["settings"])}


def _stored_manifest(settings: Run, path: Path) -> dict[str, Any] | None:
    """Return the manifest of a run's copy in TAGGER_RUN_STORE; None if there is no store or no copy."""
    content = stored_run.read_file(settings, path.name, "manifest.json")
    return None if content is None else parse_manifest(path, content)


def _check_folder(path: Path) -> None:
    """Raise InvalidInputError unless a run can be written to this folder; log if the folder has no locks."""
    check_writable(path)
    if (path / "checkpoints").exists():
        check_writable(path / "checkpoints")
    if not ownership.has_locks(_existing(path)):
        log.warning(
            "run: the file system of %s has no locks (flock); the run is marked by a lease, a file that its process "
            "renews every %.0f s",
            *(path, ownership.RENEW_SECONDS),
        )


def _is_unused(path: Path) -> bool:
    """Return whether a folder has only what a process leaves that ended before it had recorded a run."""
    known = (ownership.LOCK, ownership.LEASE, stored_run.MARKER, "checkpoints", TRACKING)
    entries = [*path.iterdir(), *(path / "checkpoints").glob("*")]
    return all(entry.suffix == ".tmp" or (entry.parent == path and entry.name in known) for entry in entries)


def _existing(path: Path) -> Path:
    """Return a path, or the nearest of its parents that exists."""
    ancestor = path.absolute()
    while not os.path.lexists(ancestor):
        ancestor = ancestor.parent
    return ancestor


def check_writable(path: Path, what: str = "the run folder", remedy: str = "TAGGER_RUN_DIR to a folder") -> None:
    """Raise InvalidInputError unless a folder can be created at or in this path; leaves no file behind."""
    try:
        with tempfile.TemporaryDirectory(dir=_existing(path)):
            pass
    except OSError as error:
        raise InvalidInputError(
            f"{what} {path} cannot be written: {error.strerror or error}; set {remedy} that can"
        ) from error


def _new_manifest(run_id: str, settings: Settings, examples: SplitData) -> dict[str, Any]:
    return {
        "schema_version": schema.MANIFEST,
        "run_id": run_id,
        "status": "running",
        "started": utc_now(),
        "settings": settings.values(),
        "seed": settings.train.seed,
        "dataset": {
            "fingerprint": examples.fingerprint,
            "train": len(examples.train),
            "calibration": len(examples.calibration),
            "held_out": len(examples.held_out),
            "near_duplicates": examples.report.near_duplicates,
            "merged": examples.report.merged,
            "skipped": examples.report.skipped_rows,
        },
        "versions": {
            "tagger-job": __version__,
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in TRACKED_VERSIONS},
        },
        "sources": settings.sources,
        "packages": provenance.packages(),
        "code": provenance.code(),
        "timings": {},
    }


def utc_now() -> str:
    """Return the time in UTC, in ISO 8601."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def run_folders(directory: Path) -> list[Path]:
    """Return the folders of runs, without those that a process left unfinished."""
    return sorted(file.parent for file in directory.glob("*/manifest.json") if not is_tmp_path(file.parent))


def find_run(settings: Run) -> RunFolder:
    """Find the run TAGGER_RUN_ID, or by default the one with the newest adapter.

    A run that only TAGGER_RUN_STORE has is brought to this disk. Raises InvalidInputError when no such run has an
    adapter.
    """
    stored_run.fetch(settings)
    runs = [settings.dir / settings.id] if settings.id else run_folders(settings.dir)
    adapters = [run / "adapter" for run in runs if (run / "adapter" / "adapter_config.json").is_file()]
    if not adapters:
        where = f"in {settings.dir / settings.id}" if settings.id else f"under {settings.dir}"
        raise InvalidInputError(
            f"there is no trained adapter {where}; run the job first, or set TAGGER_HUB_REPO or TAGGER_RUN_ID"
        )
    path = max(adapters, key=lambda adapter: adapter.stat().st_mtime).parent
    return RunFolder(path, read_manifest(path))
