"""What a Modal container does with what the caller sent: the job, tagging, and how a run stands."""

from __future__ import annotations

import functools
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from job import model_card, pipeline, report
from job.config import environment
from job.errors import JobError
from job.hub import access
from job.runs import markup
from job.runs.atomic import atomic_write
from job.runs.run_folder import RunFolder, read_manifest
from job.system import logging_setup
from job.types import Summary

if TYPE_CHECKING:
    from job.sample import Tagger

log = logging.getLogger(__name__)

CALL_STATE_DIR = ".calls"
"""Beside the runs: for each of Modal's calls the run that it is about, and the seconds its attempts have taken."""


def run_command(command: str, given: Mapping[str, str], *, call: str, commit: Callable[[], None]) -> dict[str, Any]:
    """Do the job's `run` or `retrain` with the variables that the caller was given; returns how it ended, as JSON.

    An end that has an exit code of its own is returned with it: an exception would be tried again.
    Preemption (KeyboardInterrupt) and the end of the time (Modal's InputCancellation) go through: when
    they leave here what is saved is committed, and the next attempt of the same call goes on with the
    same run, whatever the Hub has by then.
    """
    logging_setup.configure()
    environment.replace_environment(given)
    try:
        chosen = environment.load()
    except JobError as error:  # as it cannot be, for the caller has looked; an exception would be tried again
        return {"exit_code": error.exit_code, "message": str(error), "gpu_seconds": 0.0}
    attempt = CallAttempt(chosen.run.dir / CALL_STATE_DIR / call, commit)
    try:
        outcome = attempt.run_command(command)
    except BaseException:
        attempt.commit_if_possible()
        raise
    commit()  # what is not on the volume is not done
    return outcome


class CallAttempt:
    """One of the attempts that Modal makes at a call."""

    def __init__(self, note: Path, commit: Callable[[], None]) -> None:
        self._note, self._commit, self._started = note, commit, time.monotonic()
        before = json.loads(note.read_text(encoding="utf-8")) if note.is_file() else {}
        self._run_id: str | None = before.get("run_id")
        self._seconds_before: float = before.get("seconds", 0.0)

    def run_command(self, command: str) -> dict[str, Any]:
        chosen = environment.load()
        if self._run_id is not None:
            chosen = chosen.model_copy(update={"run": chosen.run.model_copy(update={"id": self._run_id})})
        try:
            ended = {"run": pipeline.run, "retrain": pipeline.retrain}[command](chosen, self.notify_saved)
        except JobError as error:
            message, code = str(error), error.exit_code
        else:
            message, code = str(ended), 0
            self._run_id = ended.folder.name if isinstance(ended, Summary) else self._run_id
        about = {} if self._run_id is None else describe(chosen.run.dir / self._run_id)
        return {"exit_code": code, "message": message, "gpu_seconds": round(self._seconds(), 1), **about}

    def notify_saved(self, run: RunFolder) -> None:
        """Note which run this is, and let the volume keep what there is of it."""
        self._run_id = run.path.name
        atomic_write(self._note, json.dumps({"run_id": self._run_id, "seconds": self._seconds()}))
        self.commit_if_possible()

    def commit_if_possible(self) -> None:
        """Commit the volume; that it cannot be done is said, and costs what an interruption would lose."""
        try:
            self._commit()
        except Exception as error:
            log.warning("modal: the volume keeps nothing of this yet (%s)", " ".join(str(error).split()))

    def _seconds(self) -> float:
        return self._seconds_before + time.monotonic() - self._started


def describe(run: Path) -> dict[str, Any]:
    """What the files of a run say of it, as JSON."""
    manifest = read_manifest(run)
    found = {"run_id": run.name, "status": manifest["status"], "device": manifest.get("device")}
    found |= {"published": manifest.get("published"), "seconds": manifest["timings"]}
    if (run / "metrics.json").is_file():
        folder = RunFolder(run, manifest)
        verdict = report.verdict(folder)
        scores = report.scores(folder)
        table = markup.markdown_table(model_card.score_table(scores))
        found |= {"scores": {name: asdict(score) for name, score in scores.items()}, "table": table}
        found |= {"gate": None if verdict is None else asdict(verdict)}
    return found


def tag(given: Mapping[str, str], texts: Sequence[str]) -> dict[str, Any]:
    """The answers for some texts, in order, as JSON; the model stays loaded for the next call in this container.

    Until the repo has another adapter.
    """
    logging_setup.configure()
    environment.replace_environment(given)
    try:
        chosen = environment.load().hub
        head = None if chosen.repo is None else access.resolve_revision("model", chosen.repo, chosen.revision).commit
        answers = _tagger(tuple(sorted(given.items())), head).tag(texts)
    except JobError as error:
        return {"exit_code": error.exit_code, "message": str(error), "answers": []}
    return {"exit_code": 0, "message": "", "answers": [asdict(answer) for answer in answers]}


@functools.lru_cache(maxsize=1)
def _tagger(given: tuple[tuple[str, str], ...], commit: str | None) -> Tagger:
    chosen = environment.load()
    at_commit = chosen.hub.model_copy(update={"revision": commit})
    return pipeline.tagger(chosen.model_copy(update={"hub": at_commit}), "BASE", "DATA")
