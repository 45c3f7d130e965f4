"""Standard streams that never end the job: closed ones, readers that are gone, full disks and other encodings."""

from __future__ import annotations

import errno
import io
import os
import select
import sys
from typing import TYPE_CHECKING, TextIO

from job.system import events

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

STDIN, STDOUT, STDERR = 0, 1, 2


def protect() -> None:
    """Make writing to standard output and standard error harmless, for a program and the libraries it loads.

    What cannot be written is dropped: the exit code says how the job ended, and what it publishes does not depend on
    who reads its log. Characters that the encoding does not have are written as escapes. A stream that is closed
    becomes the null device, so that no file that is opened later gets its number.
    """
    for number in (STDIN, STDOUT, STDERR):
        _open_if_closed(number)
    if sys.stdin is None:
        sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115, PTH123 - for the rest of the process
    sys.stdout, sys.stderr = _lasting(STDOUT, sys.stdout), _lasting(STDERR, sys.stderr)


def is_utf(stream: TextIO) -> bool:
    """Return whether a stream can hold any text."""
    return (getattr(stream, "encoding", None) or "").lower().startswith("utf")


def _open_if_closed(number: int) -> None:
    try:
        os.fstat(number)
    except OSError:
        null = os.open(os.devnull, os.O_RDWR)  # usually gets the lowest free number, which is this one
        if null != number:
            os.dup2(null, number)
            os.close(null)


def _lasting(number: int, stream: TextIO | None) -> TextIO:
    if not isinstance(stream, io.TextIOWrapper):  # None: it was closed when Python started
        return io.TextIOWrapper(io.BufferedWriter(_LastingOutput(number)), encoding="utf-8", errors="backslashreplace")
    stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(_LastingOutput(number)),
        encoding=stream.encoding,
        errors="backslashreplace",
        line_buffering=stream.line_buffering or number == STDERR,
        write_through=stream.write_through,
    )


class _LastingOutput(io.FileIO):
    """The raw stream of a file descriptor; once it cannot be written, it is replaced by the null device."""

    def __init__(self, number: int) -> None:
        super().__init__(number, "w", closefd=False)

    def write(self, data: ReadableBuffer) -> int:
        while True:
            try:
                written: int | None = super().write(data)
            except OSError as error:
                self._abandon(error)
                return memoryview(data).nbytes
            if written is not None:
                return written
            select.select([], [self.fileno()], [])  # the parent made it non-blocking, and its buffer is full

    def _abandon(self, error: OSError) -> None:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self.fileno())
        os.close(null)
        if self.fileno() == STDOUT and error.errno != errno.EPIPE:  # a reader that has gone knows what it left out
            message = f"standard output cannot be written ({error.strerror}): its rest is missing"
            if events.is_json():
                events.write("log", "warning", message)
            else:
                print(message, file=sys.stderr)
