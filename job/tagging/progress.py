"""Progress of tagging: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import logging
import time
from typing import Any

from tqdm import tqdm

from job.system.events import event
from job.system.progress import LOG_SECONDS, duration, shows_bars

log = logging.getLogger(__name__)


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
        if shows_bars():
            self._bar = tqdm(total=rows, unit=" rows", desc="tag", disable=False)

    def add_rows(self, rows: int) -> None:
        """Count rows that have their answers."""
        self.rows += rows
        if self._bar is not None:
            self._bar.update(rows)
        elif time.monotonic() - self._logged >= LOG_SECONDS:
            self._logged = time.monotonic()
            fields = {"done": self.rows, "total": self._total, "unit": "rows", "rate": self.rate}
            log.info("tag: %s", self, extra=event("progress", what="tag", **fields, seconds_left=self._seconds_left))

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

    @property
    def _seconds_left(self) -> float | None:
        if self._total and self.rows:
            return max(0.0, self.seconds * (self._total - self.rows) / self.rows)
        if self.parts_done:
            return max(0.0, self.seconds * (self._parts - self.parts_done) / self.parts_done)
        return None

    def __str__(self) -> str:
        """Return rows, parts, rate and the time left."""
        of = f" of {self._total:,}" if self._total else ""
        until = "" if self._seconds_left is None else f", {duration(self._seconds_left)} left"
        return f"{self.rows:,}{of} rows, {self.parts_done} of {self._parts} parts, {self.rate:,.1f} rows/s{until}"
