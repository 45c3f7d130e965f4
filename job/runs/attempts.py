"""The attempts of a run in its manifest: when each began, how it ended, how long it took."""

from __future__ import annotations

import datetime
import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from job.errors import CRASHED, DONE, GATE_REJECTED, INTERRUPTED, INVALID_INPUT, PUBLISH_FAILED, JobError
from job.runs import shutdown
from job.runs.run_folder import RunFolder
from job.system.events import event

log = logging.getLogger(__name__)

STATUS = {
    DONE: "complete",
    CRASHED: "failed",
    INVALID_INPUT: "failed",
    GATE_REJECTED: "refused",
    PUBLISH_FAILED: "not published",
    INTERRUPTED: "interrupted",
}
"""How an attempt ended, by its exit code; `killed` is one that could not record its end."""


@contextmanager
def recorded(run: RunFolder) -> Iterator[None]:
    """Record how the attempt ends that this process, or one that it starts, begins during this context."""
    earlier = len(attempts(run))
    try:
        yield
    except BaseException as stop:
        _end(run, earlier, _exit_code(stop))
        raise
    _end(run, earlier, DONE)


def begin(run: RunFolder, started: str, **facts: Any) -> None:
    """Add an attempt that began at `started`, with facts such as the device; an earlier open one was killed."""
    entries = [*attempts(run)]
    if entries and entries[-1]["ended"] is None:
        entries[-1] = _closed(entries[-1], _last_sign_of_life(run.path), "killed", None)
    entry = {"started": started, "ended": None, "seconds": None, "status": "running", "exit_code": None, **facts}
    run.update(attempts=[*entries, entry])
    run.begun()


def attempts(run: RunFolder) -> list[dict[str, Any]]:
    """Return the attempts of a run; empty for one of a version that did not record them."""
    found: list[dict[str, Any]] = run.manifest.get("attempts", [])
    return found


def used_seconds(run: RunFolder) -> float:
    """Return how long the attempts that have ended took together; one that was killed counts up to its last file."""
    seconds = 0.0
    for entry in attempts(run):
        ended = entry if entry["ended"] is not None else _closed(entry, _last_sign_of_life(run.path), "killed", None)
        seconds += ended["seconds"]
    return seconds


def running_seconds(path: Path, *, after: int) -> float | None:
    """Return how long the attempt that follows the first `after` ones has been running; None if it has not begun."""
    try:
        entries = json.loads((path / "manifest.json").read_text(encoding="utf-8")).get("attempts", [])
    except (OSError, ValueError):
        return None
    return time.time() - _timestamp(entries[after]) if len(entries) > after else None


def _timestamp(entry: dict[str, Any]) -> float:
    return datetime.datetime.fromisoformat(entry["started"]).timestamp()


def _end(run: RunFolder, earlier: int, code: int) -> None:
    status = STATUS.get(code, "failed")
    extra = event("run_ended", run_id=run.path.name, exit_code=code, status=status)
    log.debug("run: %s, code %d", status, code, extra=extra)
    if not run.started:
        return
    with suppress(OSError, JobError):  # a failure to write must not hide how the attempt ended
        run.lock()
        entries = attempts(run)
        if len(entries) > earlier and entries[-1]["ended"] is None:
            ended = _closed(entries[-1], time.time(), status, code)
            run.update(attempts=[*entries[:-1], ended])


def _closed(entry: dict[str, Any], ended: float, status: str, code: int | None) -> dict[str, Any]:
    started = _timestamp(entry)
    when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(ended))
    return {**entry, "ended": when, "seconds": round(max(0.0, ended - started), 1), "status": status, "exit_code": code}


def _last_sign_of_life(path: Path) -> float:
    """Return when the newest file of a run was written."""
    names = ("manifest.json", "log.jsonl", "checkpoints", "checkpoints/*", "predictions.jsonl", "report.json")
    return max((file.stat().st_mtime for name in names for file in path.glob(name)), default=0.0)


def _exit_code(stop: BaseException) -> int:
    if shutdown.received() is not None or isinstance(stop, KeyboardInterrupt):
        return INTERRUPTED
    return stop.exit_code if isinstance(stop, JobError) else CRASHED
