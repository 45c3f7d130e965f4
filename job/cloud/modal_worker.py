"""The container's side of Modal: run the job, tag texts, and describe a run."""

from __future__ import annotations

import functools
import json
import logging
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from job import pipeline, tag
from job.cloud.outcome import describe
from job.config import environment
from job.errors import DONE, JobError
from job.hub import access
from job.runs.atomic import atomic_write
from job.runs.run_folder import RunFolder
from job.system import import_hooks, logging_setup
from job.types import Summary

if TYPE_CHECKING:
    from job.inference import TextsTagger
    from job.settings import Settings

log = logging.getLogger(__name__)

CALL_STATE_DIR = ".calls"
"""Folder next to the runs with a file for each Modal call: its run, and the seconds that its attempts have taken."""


def run_command(command: str, env: Mapping[str, str], *, call: str, commit: Callable[[], None]) -> dict[str, Any]:
    """Run `run` or `retrain` with the caller's variables and return the outcome as JSON types.

    A JobError is part of the outcome, with its exit code: Modal would retry an exception. Preemption
    (KeyboardInterrupt) and the end of the time (Modal's InputCancellation) are raised, after the volume is committed;
    the next attempt of the same call then resumes the same run, even if the Hub has newer revisions by then.
    """
    environment.replace_environment(env)
    logging_setup.configure(environment.log_style())
    import_hooks.install()
    try:
        settings = environment.load()
    except JobError as error:  # not expected: the launcher has loaded the same settings
        return {"exit_code": error.exit_code, "message": str(error), "gpu_seconds": 0.0}
    attempt = CallAttempt(settings.run.dir / CALL_STATE_DIR / call, commit)
    try:
        outcome = attempt.run_command(command)
    except BaseException:
        attempt.commit_if_possible()
        raise
    commit()  # must succeed: what is not on the volume is lost
    return outcome


class CallAttempt:
    """One of the attempts that Modal makes for a call, with the state that the attempts share."""

    def __init__(self, state_file: Path, commit: Callable[[], None]) -> None:
        self._state_file, self._commit, self._started = state_file, commit, time.monotonic()
        state = json.loads(state_file.read_text(encoding="utf-8")) if state_file.is_file() else {}
        self._run_id: str | None = state.get("run_id")
        self._seconds_before: float = state.get("seconds", 0.0)

    def run_command(self, command: str) -> dict[str, Any]:
        """Run `run` or `retrain` and return the outcome; resume the run of an earlier attempt."""
        settings = environment.load()
        if self._run_id is not None:
            settings = settings.model_copy(update={"run": settings.run.model_copy(update={"id": self._run_id})})
        try:
            result = {"run": pipeline.run, "retrain": pipeline.retrain}[command](settings, self.notify_saved)
        except JobError as error:
            message, code = str(error), error.exit_code
        else:
            message, code = str(result), DONE
            self._run_id = result.folder.name if isinstance(result, Summary) else self._run_id
        description = {} if self._run_id is None else describe(settings.run.dir / self._run_id)
        return {"exit_code": code, "message": message, "gpu_seconds": round(self._seconds(), 1), **description}

    def notify_saved(self, run: RunFolder) -> None:
        """Record the run and the seconds of this call, and commit the volume."""
        self._run_id = run.path.name
        atomic_write(self._state_file, json.dumps({"run_id": self._run_id, "seconds": self._seconds()}))
        self.commit_if_possible()

    def commit_if_possible(self) -> None:
        """Commit the volume; if that fails, log a warning, because only an interruption would lose progress."""
        try:
            self._commit()
        except Exception as error:
            log.warning("modal: the volume is not committed (%s)", " ".join(str(error).split()))

    def _seconds(self) -> float:
        return self._seconds_before + time.monotonic() - self._started


def tag_parts(
    env: Mapping[str, str], shard: str, *, runs: str, commit: Callable[[], None], reload: Callable[[], None]
) -> dict[str, Any]:
    """Tag a share of the parts of TAGGER_TAG_INPUT, then help with others, and return the outcome as JSON types.

    Parts and seals are on the volume, which callers know as `runs`, or in object storage. Preemption and the end of
    the time are raised after the volume is committed; the next attempt of the same call does what is not sealed.
    """
    environment.replace_environment({**env, "TAGGER_TAG_SHARD": shard})
    logging_setup.configure(environment.log_style())
    volume, started = _SharedVolume(commit, reload), time.monotonic()
    message, code = "", DONE
    try:
        settings, adapter = pipeline.find_adapter(_on_volume(environment.load(), runs), *tag.TRAINED_WITH)
        message = "\n".join(tag.tag(settings, adapter, pipeline.load_adapter, sync=volume.sync))
    except JobError as error:
        message, code = str(error), error.exit_code
    except BaseException:
        volume.sync(now=True)
        raise
    commit()  # must succeed: what is not on the volume is lost
    from job.system.device import ComputeSpec

    device = str(ComputeSpec.resolve("auto", "auto"))
    seconds = round(time.monotonic() - started, 1)
    return {"exit_code": code, "message": message, "gpu_seconds": seconds, "device": device}


def _on_volume(settings: Settings, runs: str) -> Settings:
    """Return the settings with paths on the volume of runs as this container has it mounted."""

    def path(name: str | None) -> str | None:
        return None if name is None else re.sub(f"^{runs}/", f"{settings.run.dir}/", name)

    moved = {"input": path(settings.tag.input), "output": path(settings.tag.output)}
    return settings.model_copy(update={"tag": settings.tag.model_copy(update=moved)})


class _SharedVolume:
    """A volume that several containers write to: they see each other's files after a commit and a reload."""

    SECONDS = 20.0
    """Between two exchanges that could wait."""

    def __init__(self, commit: Callable[[], None], reload: Callable[[], None]) -> None:
        self._commit, self._reload = commit, reload
        self._last = time.monotonic()

    def sync(self, *, now: bool) -> None:
        """Commit and reload; if that fails, log a warning: at worst, a part is done twice."""
        if not now and time.monotonic() - self._last < self.SECONDS:
            return
        self._last = time.monotonic()
        try:
            self._commit()
            self._reload()
        except Exception as error:
            log.warning("modal: the volume is not synchronized (%s)", " ".join(str(error).split()))


def tag_texts(env: Mapping[str, str], texts: Sequence[str]) -> dict[str, Any]:
    """Return the outcome with the answers for some texts, in order, as JSON types.

    The model stays loaded for the next call in this container, until the repo has another adapter.
    """
    environment.replace_environment(env)
    logging_setup.configure(environment.log_style())
    try:
        hub = environment.load().hub
        head = None if hub.repo is None else access.resolve_revision("model", hub.repo, hub.revision).commit
        answers = _tagger(tuple(sorted(env.items())), head).tag(texts)
    except JobError as error:
        return {"exit_code": error.exit_code, "message": str(error), "answers": []}
    return {"exit_code": DONE, "message": "", "answers": [asdict(answer) for answer in answers]}


@functools.lru_cache(maxsize=1)
def _tagger(env: tuple[tuple[str, str], ...], commit: str | None) -> TextsTagger:
    """Load the adapter at a commit of the repo, or that of a run; `env` is only a part of the cache's key."""
    settings = environment.load()
    at_commit = settings.hub.model_copy(update={"revision": commit})
    settings = settings.model_copy(update={"hub": at_commit})
    return pipeline.load_tagger_as_trained(settings, "BASE", "DATA", texts=1)  # in this process, where it stays loaded
