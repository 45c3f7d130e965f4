"""Atomic writes: a file or folder appears complete or not at all."""

from __future__ import annotations

import glob
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

_TMP_NAME = re.compile(r".+\.[0-9a-f]{8}\.tmp")


def atomic_write(path: Path, text: str) -> None:
    """Write a text file so that it is complete or absent."""
    with atomic_file(path) as file:
        file.write(text.encode("utf-8"))


@contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """Yield a binary file under a temporary name that is synced and renamed if the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp_path = _tmp_path(path)
    try:
        with tmp_path.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        tmp_path.replace(path)
    finally:
        tmp_path.unlink(missing_ok=True)


@contextmanager
def atomic_directory(path: Path, *, keep_existing: bool = False) -> Iterator[Path]:
    """Yield an empty temporary folder that is synced and takes the place of `path` if the block ends without an error.

    With `keep_existing`, a folder that another process has created at `path` in the meantime is kept, and this
    one is discarded. Raises OSError also for a full disk that a library reports with an error of its own.
    """
    tmp_path, old_path = _tmp_path(path), _tmp_path(path)
    try:
        tmp_path.mkdir(parents=True)
        yield tmp_path
        readable = tmp_path.stat().st_mode & 0o666  # what the umask, or the parent's access list, allows
        for written in (*tmp_path.rglob("*"), tmp_path):
            _make_readable(written, readable)
            _sync(written)
        if not keep_existing:
            with suppress(FileNotFoundError):
                path.rename(old_path)  # deleted in its place, a kill would leave half of it there
        try:
            tmp_path.rename(path)
        except OSError:
            if not (keep_existing and path.is_dir()):
                raise
        _sync(path.parent)
    except Exception as error:
        # safetensors and tokenizers are written in Rust, and their errors quote the system's
        match = re.search(r"\(os error (\d+)\)", str(error))
        if match and not isinstance(error, OSError):
            raise OSError(int(match[1]), os.strerror(int(match[1])), str(path)) from error
        raise
    finally:
        shutil.rmtree(tmp_path, ignore_errors=True)
        shutil.rmtree(old_path, ignore_errors=True)


def _tmp_path(path: Path) -> Path:
    """Return a path next to `path` that no other process or machine uses."""
    return path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")


def is_tmp_path(path: Path) -> bool:
    """Return whether this is a name of an unfinished file or folder, which a process that was killed leaves."""
    return _TMP_NAME.fullmatch(path.name) is not None


def tmp_paths_of(path: Path) -> list[Path]:
    """Return what unfinished writes of a file or folder have left next to it."""
    own = re.compile(re.escape(path.name) + r"\.[0-9a-f]{8}\.tmp")  # and none of a name that begins with this one
    return [found for found in path.parent.glob(f"{glob.escape(path.name)}.*.tmp") if own.fullmatch(found.name)]


def json_lines(entries: Iterable[object]) -> str:
    """Serialize entries as JSON, one a line."""
    return "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)


def _make_readable(path: Path, mode: int) -> None:
    """Add permissions to a file that a library created for its owner alone, as safetensors does."""
    present = path.stat().st_mode
    if path.is_file() and present | mode != present:
        with suppress(PermissionError):  # a volume without permissions of its own
            path.chmod(present | mode)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
