"""Sizes and SHA-256 digests of files, to detect later changes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

Checksums = dict[str, dict[str, int | str]]
"""For each file, by its path within a folder, its size in `bytes` and its `sha256`."""


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
