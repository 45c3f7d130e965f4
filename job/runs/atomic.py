"""Files and folders that appear whole or not at all, and seals that tell whether they still are what was written."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

Checksums = dict[str, dict[str, int | str]]
"""For each file, by its path within a folder, its size in `bytes` and its `sha256`."""


def atomic_write(path: Path, text: str) -> None:
    """Write a file beside and rename it, so that it is whole or absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with beside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """A folder beside `path` to fill; left without an error, it is on the disk and takes the path's place.

    Raises OSError also for what the libraries' own writers say of a disk that is full.
    """
    beside = path.with_name(f"{path.name}.tmp")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        beside.mkdir()
        yield beside
        for written in (*beside.rglob("*"), beside):
            _sync(written)
        shutil.rmtree(path, ignore_errors=True)
        beside.rename(path)
        _sync(path.parent)
    except Exception as error:
        said = re.search(r"\(os error (\d+)\)", str(error))  # safetensors and tokenizers are written in Rust
        if said and not isinstance(error, OSError):
            raise OSError(int(said[1]), os.strerror(int(said[1])), str(path)) from error
        raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def checksum_files(folder: Path, files: Iterable[Path]) -> Checksums:
    """Size and digest of these files of a folder."""
    return {
        file.relative_to(folder).as_posix(): {"bytes": file.stat().st_size, "sha256": file_digest(file)}
        for file in sorted(files)
    }


def find_mismatch(folder: Path, sealed: Mapping[str, Mapping[str, int | str]]) -> str | None:
    """The first file that is not as it was sealed, and why; None when all are."""
    for name, was in sealed.items():
        file = folder / name
        if not file.is_file():
            return f"{file} is not there"
        if file.stat().st_size != was["bytes"] or file_digest(file) != was["sha256"]:
            return f"{file} is not as it was written"
    return None


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_lines(entries: Iterable[object]) -> str:
    """One JSON value a line."""
    return "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
