"""Checksums: sizes and SHA-256 digests of files, to detect later changes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

Checksums = dict[str, dict[str, int | str]]
"""For each file, by its path relative to a folder: its size in `bytes` and its `sha256`."""


def checksum_files(folder: Path, files: Iterable[Path]) -> Checksums:
    """Compute the checksums of files in a folder, sorted by path."""
    return {
        file.relative_to(folder).as_posix(): {"bytes": file.stat().st_size, "sha256": file_digest(file)}
        for file in sorted(files)
    }


def find_mismatch(folder: Path, recorded: Mapping[str, Mapping[str, int | str]]) -> str | None:
    """Return which file is the first that differs from its recorded checksum, and how; None if none does."""
    for name, entry in recorded.items():
        file = folder / name
        if not file.is_file():
            return f"{file} is missing"
        if file.stat().st_size != entry["bytes"] or file_digest(file) != entry["sha256"]:
            return f"{file} has changed since it was written"
    return None


def file_digest(path: Path) -> str:
    """Compute the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
