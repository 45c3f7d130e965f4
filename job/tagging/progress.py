"""Progress of tagging: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from typing import Any

from tqdm import tqdm

log = logging.getLogger(__name__)

LOG_SECONDS = 30.0
"""Between two lines where there is no terminal."""


class Progress:
    """Rows that this process has tagged, of those that it has to."""

    def __init__(self) -> None:
        self.rows = 0
        self._parts = self.parts_done = 0
        self._total: int | None = None
        self._started = self._logged = time.monotonic()
        self._bar: Any = None

    def start(self, parts: int, rows: int | None) -> None:
        """Begin with so many parts to do, and their rows if these are known."""
        self._parts, self._total = parts, rows
        self._started = self._logged = time.monotonic()
        if sys.stderr.isatty():
            self._bar = tqdm(total=rows, unit=" rows", desc="tag", disable=False)

    def add_rows(self, rows: int) -> None:
        """Count rows that have their answers."""
        self.rows += rows
        if self._bar is not None:
            self._bar.update(rows)
        elif time.monotonic() - self._logged >= LOG_SECONDS:
            self._logged = time.monotonic()
            log.info("tag: %s", self)

    def add_part(self) -> None:
        """Count a part that is sealed."""
        self.parts_done += 1
        if self._bar is not None and self._total is None:
            self._bar.set_postfix_str(f"part {self.parts_done} of {self._parts}")

    def close(self) -> None:
        """End the bar."""
        if self._bar is not None:
            self._bar.close()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._started

    @property
    def rate(self) -> float:
        """Rows a second."""
        return self.rows / max(self.seconds, 1e-9)

    def __str__(self) -> str:
        """Return rows, parts, rate and the time left."""
        of = f" of {self._total:,}" if self._total else ""
        left = None
        if self._total and self.rows:
            left = self.seconds * (self._total - self.rows) / self.rows
        elif self.parts_done:
            left = self.seconds * (self._parts - self.parts_done) / self.parts_done
        until = "" if left is None else f", {duration(max(0.0, left))} left"
        return f"{self.rows:,}{of} rows, {self.parts_done} of {self._parts} parts, {self.rate:,.1f} rows/s{until}"


def duration(seconds: float) -> str:
    """Return a time as `2 h 5 min`, `5 min` or `12 s`."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 90 else f"{minutes} min"
