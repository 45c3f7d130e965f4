"""What a signal does: the first one saves and ends with code 75, a second one ends at once."""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from job.errors import INTERRUPTED

SIGNALS = (signal.SIGTERM, signal.SIGINT)
GRACE_SECONDS = 8.0
"""From the first signal to the end, whatever is not saved by then: `docker stop` kills after 10."""
TOGETHER_SECONDS = 0.1
"""A terminal sends Ctrl-C to every process of the line, and make or uv pass theirs on: that is one signal, not two."""


class _State:
    received: signal.Signals | None = None
    deferring = False


_state = _State()


@contextmanager
def handled(then: signal.Handlers | None = None) -> Iterator[None]:
    """Within, SIGTERM and SIGINT raise KeyboardInterrupt in the main thread, once, and end the process if it lingers.

    A thread of its own reads what arrives, for Python's handlers wait while the main thread computes or
    waits for a download. Handlers of other signals are left alone: Modal's timeout comes by SIGUSR1.
    Afterwards the two have the handler `then`, or the one they had before.
    """
    _state.received, _state.deferring = None, False
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    threading.Thread(target=_watch, args=(reader,), daemon=True).start()
    fd_before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    before = {number: signal.signal(number, _interrupt) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if then is None else then)
        signal.set_wakeup_fd(fd_before)
        os.close(writer)  # which ends the thread


@contextmanager
def deferred() -> Iterator[None]:
    """Within, an interruption waits until what must not be cut in two is done."""
    _state.deferring = True
    try:
        yield
    finally:
        _state.deferring = False
        check()


def check() -> None:
    """Raise KeyboardInterrupt if there was a signal: a library may have swallowed the one that it raised."""
    if _state.received is not None and not _state.deferring:
        raise KeyboardInterrupt


def received() -> str | None:
    """The name of the signal, if there was one."""
    return None if _state.received is None else _state.received.name


def _interrupt(number: int, frame: object) -> None:
    if _state.received is None:
        _state.received = signal.Signals(number)
        check()


def _watch(reader: int) -> None:
    first: float | None = None
    while True:
        left = None if first is None else max(0.0, first + GRACE_SECONDS - time.monotonic())
        if not select.select([reader], [], [], left)[0]:
            _end("what could not be saved in time is lost")
        arrived = os.read(reader, 64)
        if not arrived:
            os.close(reader)
            return
        if not any(number in arrived for number in SIGNALS):
            continue
        if first is None:
            first = time.monotonic()
        elif time.monotonic() - first > TOGETHER_SECONDS:
            _end("ended at once, by a second signal")


def _end(why: str) -> NoReturn:
    os.write(2, f"interrupted: {why}; the same command goes on from what is saved\n".encode())
    os._exit(INTERRUPTED)
