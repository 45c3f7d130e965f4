"""Read the files of a run that are published: regular files without links on the way, with their recorded checksums."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Mapping
from io import BufferedReader
from pathlib import Path, PurePosixPath

MAX_BYTES_IN_MEMORY = 256 * 2**20
"""A larger file is handed on as an open file, which stays the one that was verified when another takes its name."""


ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO)
"""Errors of opening a file that is not there, or of following a link or opening a socket."""


class NotSealedError(Exception):
    """A file is not what was recorded when it was written, or cannot be read."""


class NotRegularError(NotSealedError):
    """There is no regular file: it is absent, a link, or something else."""


def open_regular(folder: Path, name: str) -> BufferedReader:
    """Open a file below a folder.

    Raises NotRegularError if it, or a folder on the way, is missing or is a link, and NotSealedError if it cannot be
    opened.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    *parents, last = PurePosixPath(name).parts
    try:
        for part in parents:
            inner = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=descriptor)
            os.close(descriptor)
            descriptor = inner
        # without O_NONBLOCK, a named pipe would be waited for
        file = os.open(last, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=descriptor)
    except OSError as error:
        is_link = any((folder / path).is_symlink() for path in (PurePosixPath(name), *PurePosixPath(name).parents))
        kind = NotRegularError if is_link or error.errno in ABSENT else NotSealedError
        raise kind(f"{name} is a link" if is_link else f"{name}: {error.strerror}") from None
    finally:
        os.close(descriptor)
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise NotRegularError(f"{name} is not a regular file")
    return os.fdopen(file, "rb")


def read_regular(folder: Path, name: str, most: int) -> bytes:
    """Return the content of a file that has no checksum; raises NotSealedError as `open_regular`, or if it is large."""
    with open_regular(folder, name) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise NotSealedError(f"{name} has more than {most} bytes")
    return content


def open_sealed(folder: Path, name: str, recorded: Mapping[str, int | str]) -> bytes | BufferedReader:
    """Return the content of a file, or if it is large the open file, once it is verified against its checksum.

    Raises NotSealedError if it differs.
    """
    file = open_regular(folder, name)
    try:
        size = os.fstat(file.fileno()).st_size
        if size == recorded["bytes"] and size <= MAX_BYTES_IN_MEMORY:
            content = file.read()
            file.close()
            digest = hashlib.sha256(content).hexdigest()
        else:
            content = None
            digest = hashlib.file_digest(file, "sha256").hexdigest() if size == recorded["bytes"] else ""
            file.seek(0)
        if digest != recorded["sha256"]:
            raise NotSealedError(f"{name} has changed since it was written")
    except BaseException:
        file.close()
        raise
    return file if content is None else content
