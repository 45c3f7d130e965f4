"""Checks that yield rows of a table: each with its own time limit, and none that keeps the others from running."""

from __future__ import annotations

import importlib.util
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

STATUSES = {True: "pass", False: "FAIL", None: "figure"}


@dataclass(frozen=True)
class Row:
    """One line of the table: what was looked at, whether it is right, and the figure."""

    what: str
    passed: bool | None
    """None for a figure that nothing is required of."""
    figure: str
    data: dict[str, Any] = field(default_factory=dict)
    """The numbers behind the figure, for the record."""


Rows = Iterator[Row]


@dataclass(frozen=True)
class Check:
    """A check by name: a function from the work to rows."""

    name: str
    run: Callable[[Any], Rows]
    needs: tuple[str, ...] = ()
    """Packages without which it is skipped."""
    seconds: int = 60
    """Limit of its time; what it has found until then is kept."""


class OutOfTimeError(Exception):
    """A check took longer than its limit."""


def run_checks(
    checks: Sequence[Check], work: Any, *, seconds: float, report: Callable[[dict[str, Any]], None]
) -> list[dict[str, Any]]:
    """Run the checks one after another, and call `report` with each record as soon as it is there.

    A record has `check`, `what`, `status` (pass, FAIL, figure, skipped), `figure`, `seconds` and `data`. A check that
    raises an error fails, with the error as its figure. A check that may end after `seconds` is skipped.
    """
    records: list[dict[str, Any]] = []
    started = time.monotonic()

    def add(check: Check, row: Row, status: str, took: float) -> None:
        record = {"check": check.name, "what": row.what, "status": status, "figure": row.figure}
        records.append({**record, "seconds": round(took, 2), "data": row.data})
        report(records[-1])

    for check in checks:
        left = seconds - (time.monotonic() - started)
        if why := _why_skipped(check, left):
            add(check, Row("", None, why), "skipped", 0.0)
            continue
        last = time.monotonic()
        try:
            with time_limit(check.seconds):
                for row in check.run(work):
                    now = time.monotonic()
                    add(check, row, STATUSES[row.passed], now - last)
                    last = now
        except Exception as error:
            traceback.print_exc(file=sys.stderr)
            text = " ".join(str(error).split())[:300]
            add(check, Row("", False, f"{type(error).__name__}: {text}"), "FAIL", time.monotonic() - last)
        work.release()
    return records


def _why_skipped(check: Check, left: float) -> str:
    missing = [name for name in check.needs if not installed(name)]
    if missing:
        return f"{', '.join(missing)} not installed"
    return "" if left >= check.seconds else f"{max(0.0, left):.0f} s left, and it may take {check.seconds} s"


def installed(package: str) -> bool:
    """Return whether a package can be imported, without importing it."""
    return importlib.util.find_spec(package) is not None


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raise OutOfTimeError in the main thread after so many seconds."""

    def expire(number: int, frame: object) -> None:
        raise OutOfTimeError(f"took longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, expire)
    signal.alarm(max(1, seconds))
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def line(record: dict[str, Any]) -> str:
    """Format a record as a row of a Markdown table."""
    what = f"{record['check']}: {record['what']}" if record["what"] else record["check"]
    return f"| {what} | {record['status']} | {record['figure'].replace('|', '/')} | {record['seconds']:.1f} |"


HEADER = "| check | result | figure | s |\n|---|---|---|---|"
