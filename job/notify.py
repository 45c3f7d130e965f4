"""Notify a webhook how a run has ended (TAGGER_RUN_NOTIFY)."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from job import report, results
from job.config.redaction import redact, redact_json
from job.distributed.team import Team
from job.errors import CRASHED, DONE, EXIT_CODES, INTERRUPTED, InvalidInputError, describe_failure
from job.runs import attempts, shutdown
from job.runs.attempts import STATUS
from job.runs.run_folder import RunFolder
from job.settings import Settings
from job.system.progress import duration

log = logging.getLogger(__name__)

SECONDS = 10.0
"""The longest time that the end of the job waits for the webhook's answer."""
INTERRUPTED_SECONDS = 2.0
"""The same after a signal: the process is ended 8 s after that, whatever it does."""


@dataclass
class Ending:
    """What there is to tell at the end, as far as the job has come."""

    run: RunFolder | None = None
    result: object = None
    """What the command prints, if it succeeds."""


@contextmanager
def notified(settings: Settings) -> Iterator[Ending]:
    """Send one JSON object to TAGGER_RUN_NOTIFY when this context ends, in whatever way; without effect on the end.

    Only the process that leads the run sends it.
    """
    ending = Ending()
    if settings.run.notify is None or not _leads():
        yield ending
        return
    url = settings.run.notify.get_secret_value()
    try:
        yield ending
    except BaseException as stop:
        message, code = _describe(stop)
        _post(url, ending, message, code)
        raise
    _post(url, ending, str(ending.result), DONE)


def _leads() -> bool:
    try:
        return Team.find().leads
    except InvalidInputError:  # what is wrong with the launcher's variables is this end's message
        return True


def _describe(stop: BaseException) -> tuple[str, int]:
    """Return the message and the exit code of the job, for what ends it."""
    if shutdown.received() is not None or not isinstance(stop, Exception):
        by = f" by {shutdown.received()}" if shutdown.received() else ""
        return f"interrupted{by}; the same command resumes from what is saved", INTERRUPTED
    return describe_failure(stop) or (f"{type(stop).__name__}: {stop}", CRASHED)


def _post(url: str, ending: Ending, message: str, code: int) -> None:
    """Send what is known; whatever becomes of it, the job ends as it would have ended."""
    outcome: list[str] = []

    def send() -> None:
        try:
            outcome.append(_exchange(url, body(ending.run, message, code)))
        except Exception as error:
            outcome.append(type(error).__name__)

    seconds = INTERRUPTED_SECONDS if code == INTERRUPTED else SECONDS
    # an HTTP client's time-out is one for each read, which a server that sends a byte at a time never reaches
    thread = threading.Thread(target=send, daemon=True)
    thread.start()
    thread.join(seconds)
    problem = outcome[0] if outcome else f"no answer within {seconds:.0f} s"
    if problem:
        log.warning("run: TAGGER_RUN_NOTIFY was not told how the run ended (%s)", problem)


def _exchange(url: str, content: dict[str, Any]) -> str:
    """Return what was wrong with the webhook's answer; the empty text if nothing was."""
    import httpx2

    text = json.dumps(content)  # in ASCII, with numbers that every parser reads: scores are finite
    headers = {"Content-Type": "application/json"}
    # not read: the content of the answer
    with httpx2.stream("POST", url, content=text, headers=headers, timeout=SECONDS) as response:
        return "" if response.is_success else f"HTTP status {response.status_code}"


def body(run: RunFolder | None, message: str, code: int) -> dict[str, Any]:
    """Return the JSON object that is sent: `text` for people (and Slack), the other entries for programs."""
    entry = EXIT_CODES[code]
    found: dict[str, Any] = {
        "schema_version": 1,
        "status": STATUS[code],
        "exit_code": code,
        "meaning": entry.meaning,
        "what_to_do": entry.action,
        "message": message,
        "run_id": None if run is None else run.path.name,
        **dict.fromkeys(("verdict", "scores", "price", "seconds", "commit")),
    }
    if run is not None and run.started:
        found |= _of_run(run)
    found = redact_json(found)
    return {"text": redact(_text(found)), **found}


def _of_run(run: RunFolder) -> dict[str, Any]:
    """Return verdict, scores, price and commit, as far as the run has them."""
    found: dict[str, Any] = {"price": report.cost(run), "seconds": round(attempts.used_seconds(run), 1)}
    published = run.manifest.get("published")
    found["commit"] = None if published is None else published["url"]
    if (run.path / "metrics.json").is_file():
        verdict = results.verdict(run)
        found["verdict"] = verdict and {"verdict": verdict.verdict, "reason": verdict.reason}
        found["scores"] = {
            name: {"micro_f1": score.f1, "interval": score.intervals["f1"], "examples": score.n}
            for name, score in results.scores(run).items()
        }
    return found


def _text(found: dict[str, Any]) -> str:
    """Return the same for people, a few lines."""
    name = f" {found['run_id']}" if found["run_id"] else ""
    lines = [f"tagger-job{name}: {found['meaning']} (exit code {found['exit_code']})", found["message"]]
    if adapter := (found["scores"] or {}).get("adapter"):
        low, high = adapter["interval"]
        base = found["scores"].get("base")
        beside = f"; base model {base['micro_f1']:.3f}" if base else ""
        lines.append(f"micro-F1 {adapter['micro_f1']:.3f} ({low:.3f} to {high:.3f}){beside}")
    if found["verdict"]:
        lines.append(f"gate: {found['verdict']['verdict']}: {found['verdict']['reason']}")
    if found["seconds"]:
        price = f", ${found['price']['dollars']:.2f}" if found["price"] else ""
        lines.append(f"took {duration(found['seconds'])}{price}")
    if found["commit"] and found["commit"] not in found["message"]:
        lines.append(found["commit"])
    if found["exit_code"] != DONE:
        lines.append(f"what to do: {found['what_to_do']}")
    return "\n".join(lines)
