"""What the job reports while it works: lines for people, or JSON lines with stable names (TAGGER_RUN_LOG=json)."""

from __future__ import annotations

import datetime
import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

EVENTS = {
    "log": "any other line; `level` says how serious it is, and `logger` where it is from",
    "run_started": "`run_id`, `path`, and `resumed`: whether an earlier attempt began it",
    "chapter_started": "`chapter`",
    "chapter_ended": "`chapter`, `seconds`, and `completed`: false if an error or a signal ended it",
    "progress": "every 30 s: `what`, `done`, `total`, `unit`, `rate` (a second), `seconds_left`",
    "train_step": "every TAGGER_TRAIN_LOGGING_STEPS steps: `step`, `max_steps`, `loss`, `learning_rate`, `grad_norm`, "
    "`epoch`, `seconds_per_step`, `tokens_per_second`, `seconds_left`",
    "checkpoint_saved": "`step`",
    "threshold": "`threshold`, and `micro_f1` on the `examples` that were set aside",
    "scores": "`tagger` (base or adapter), `micro_f1`, `low` and `high` of its 95% interval, `precision`, `recall`, "
    "`macro_f1`, `examples`",
    "gate": "`verdict`, `reason`",
    "retry": "a request that failed is repeated: `what`, `error`, `seconds` until then",
    "published": "`repo`, `revision`, `url`",
    "tag_started": "`parts` to do of `parts_total`, `output`",
    "run_ended": "`run_id`, `exit_code`, `status`",
    "error": "why the job ends, a sentence in `message`; `exit_code`",
    "crash": "a defect: `traceback`",
}
"""What each event is, and its fields in addition to `time`, `level`, `event`, `message` and `chapter`."""


class _State:
    json = False
    chapter: str | None = None


_state = _State()


def use_json(on: bool) -> None:
    """Choose between JSON lines and lines for people."""
    _state.json = on


def is_json() -> bool:
    """Return whether the job writes JSON lines."""
    return _state.json


def event(name: str, **fields: Any) -> dict[str, Any]:
    """Return what names a log line as an event: `log.info("…", extra=event("gate", verdict=…))`."""
    assert name in EVENTS, name
    return {"event": name, "fields": fields}


@contextmanager
def in_chapter(name: str) -> Iterator[None]:
    """Name the chapter that the job is in, for the lines within this context."""
    before, _state.chapter = _state.chapter, name
    try:
        yield
    finally:
        _state.chapter = before


def chapter() -> str | None:
    """Return the chapter that the job is in."""
    return _state.chapter


def json_line(name: str, level: str, message: str, **fields: Any) -> str:
    """Return an event as a line of JSON in ASCII; numbers that are not finite are null."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    where = {} if _state.chapter is None else {"chapter": _state.chapter}
    entry = {"time": now, "level": level, "event": name, **where, "message": message, **fields}
    return json.dumps({key: _finite(value) for key, value in entry.items()}, default=str)


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write(name: str, level: str, message: str, **fields: Any) -> None:
    """Write an event to standard error as a JSON line, where no logger is at hand."""
    if sys.stderr is not None:
        sys.stderr.write(json_line(name, level, message, **fields) + "\n")
