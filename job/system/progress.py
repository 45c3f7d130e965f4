"""Progress of work whose size is known: a bar on a terminal, elsewhere a line at most every 30 seconds."""

from __future__ import annotations

import logging
import sys
import time
from types import TracebackType
from typing import Any, Self

from job.system import events

log = logging.getLogger(__name__)

LOG_SECONDS = 30.0
"""Between two lines where there is no terminal."""
BAR_SECONDS = 2.0
"""What takes less time has no bar."""


def shows_bars() -> bool:
    """Return whether standard error is a terminal that may have progress bars."""
    return not events.is_json() and sys.stderr is not None and sys.stderr.isatty()


class Progress:
    """How much of some work is done, at what rate, and how long the rest takes.

    `unit` is what is counted, such as `texts`; bytes are `B`. An unknown `total` is None.
    """

    def __init__(
        self, what: str, total: int | None, unit: str, *, initial: int = 0, bar_after: float = BAR_SECONDS
    ) -> None:
        self.what, self.total, self.unit = what, total, unit
        self.done = self._initial = initial
        self._started = self._logged = time.monotonic()
        self._bar: Any = None
        if shows_bars():
            from tqdm import tqdm

            self._bar = tqdm(
                total=total,
                initial=initial,
                desc=what,
                unit=unit if unit == "B" else f" {unit}",
                unit_scale=unit == "B",
                unit_divisor=1000,
                dynamic_ncols=True,
                delay=bar_after,
                disable=False,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def add(self, count: int = 1) -> None:
        """Count what is done."""
        self.done += count
        if self._bar is not None:
            self._bar.total = self.total
            self._bar.update(count)
        elif (now := time.monotonic()) - self._logged >= LOG_SECONDS:
            self._logged = now
            self.log()

    def log(self) -> None:
        """Log what is done, the rate and the time left."""
        fields = {"what": self.what, "done": self.done, "total": self.total, "unit": self.unit, "rate": self.rate}
        extra = events.event("progress", **fields, seconds_left=self.seconds_left)
        log.info("%s: %s", self.what, self, extra=extra)

    def write(self, line: str) -> bool:
        """Show a line above the bar; return False if there is no bar."""
        if self._bar is not None:
            self._bar.write(line, file=sys.stderr)
        return self._bar is not None

    def close(self) -> None:
        """End the bar."""
        if self._bar is not None:
            self._bar.close()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._started

    @property
    def rate(self) -> float:
        """What is done in a second."""
        return (self.done - self._initial) / max(self.seconds, 1e-9)

    @property
    def seconds_left(self) -> float | None:
        """The seconds until all is done, at the rate so far; None if that is not known."""
        if self.total is None or self.done <= self._initial:
            return None
        return max(0.0, (self.total - self.done) / self.rate)

    def __str__(self) -> str:
        """Return what is done, the rate and the time left."""
        scale, unit = (1e6, "MB") if self.unit == "B" else (1, self.unit)
        digits = 0 if scale == 1 else 1
        of = "" if self.total is None else f" of {self.total / scale:,.{digits}f}"
        left = "" if self.seconds_left is None else f", {duration(self.seconds_left)} left"
        return f"{self.done / scale:,.{digits}f}{of} {unit}, {self.rate / scale:,.1f} {unit}/s{left}"


def duration(seconds: float) -> str:
    """Return a time as `2 h 5 min`, `5 min` or `12 s`."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 90 else f"{minutes} min"
