"""Handling of SIGTERM and SIGINT: the first signal saves and ends with code 75, a second one ends immediately."""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

from job.errors import INTERRUPTED
from job.system import events

SIGNALS = (signal.SIGTERM, signal.SIGINT)
GRACE_SECONDS = 8.0
"""The longest time from the first signal to the end of the process; `docker stop` kills after 10 seconds."""
TOGETHER_SECONDS = 0.1
"""Signals within this time count as one: a terminal sends Ctrl-C to make or uv and their child, and they forward it."""


class _State:
    received: signal.Signals | None = None
    by: str | None = None
    deferring = False
    left_behind = False


_state = _State()


@contextmanager
def handled(then: signal.Handlers | None = None) -> Iterator[None]:
    """Let SIGTERM and SIGINT raise KeyboardInterrupt in the main thread, once, during this context.

    A process that has not ended after GRACE_SECONDS, or at a second signal, is ended. A separate thread
    watches for this, because Python runs no signal handler while the main thread computes in C code or waits
    for a download. Handlers of other signals are left unchanged: Modal's timeout is SIGUSR1. Afterwards
    both signals have the handler `then`, or by default the one they had before.
    """
    _state.received, _state.by, _state.deferring = None, None, False
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    threading.Thread(target=_watch, args=(reader,), daemon=True).start()
    old_fd = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    old_handlers = {number: signal.signal(number, _interrupt) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in old_handlers.items():
            signal.signal(number, handler if then is None else then)
        signal.set_wakeup_fd(old_fd)
        os.close(writer)  # this ends the thread
        _state.received = None  # the next job of this process was not interrupted


@contextmanager
def interrupts() -> Iterator[None]:
    """Let SIGTERM and SIGINT raise KeyboardInterrupt during this context, for a program that only waits for a job.

    A shell starts a program in the background with SIGINT ignored; here it is not.
    """
    old_handlers = {number: signal.signal(number, signal.default_int_handler) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in old_handlers.items():
            signal.signal(number, handler)


@contextmanager
def deferred() -> Iterator[None]:
    """Defer an interruption to the end of this context, for work that must be done completely or not at all."""
    _state.deferring = True
    try:
        yield
    finally:
        _state.deferring = False
        check()


def check() -> None:
    """Raise KeyboardInterrupt if a signal was received: a library may have swallowed the first KeyboardInterrupt."""
    if _state.received is not None and not _state.deferring:
        raise KeyboardInterrupt


def received() -> str | None:
    """Return the name of the signal that was received, or what sent it in this process; or None."""
    return None if _state.received is None else _state.by or _state.received.name


def interrupt(by: str) -> None:
    """Interrupt this process as SIGTERM does, from any thread; `by` says in its message what did."""
    _state.by = by
    os.kill(os.getpid(), signal.SIGTERM)


def leave_threads_behind() -> None:
    """Let the program exit without waiting for the threads of libraries, which hang."""
    _state.left_behind = True


def are_threads_left_behind() -> bool:
    """Return whether the program must not wait for the threads of libraries."""
    return _state.left_behind


def _interrupt(number: int, frame: object) -> None:
    if _state.received is None:
        _state.received = signal.Signals(number)
        check()


def _watch(reader: int) -> None:
    first: float | None = None
    while True:
        timeout = None if first is None else max(0.0, first + GRACE_SECONDS - time.monotonic())
        if not select.select([reader], [], [], timeout)[0]:
            _end("work that could not be saved in time is lost")
        numbers = os.read(reader, 64)
        if not numbers:
            os.close(reader)
            return
        if not any(number in numbers for number in SIGNALS):
            continue
        if first is None:
            first = time.monotonic()
        elif time.monotonic() - first > TOGETHER_SECONDS:
            _end("ended immediately by a second signal")


def _end(why: str) -> NoReturn:
    with suppress(OSError):  # standard error may be closed
        if select.select([], [2], [], 0)[1]:  # a reader that has stopped reading would block the end
            message = f"interrupted: {why}; the same command resumes from what is saved"
            if events.is_json():
                message = events.json_line("error", "warning", message, exit_code=INTERRUPTED)
            os.write(2, f"{message}\n".encode())
    os._exit(INTERRUPTED)
