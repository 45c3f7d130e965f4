"""Checksums detect files that are missing or have changed."""

from __future__ import annotations

import hashlib
from pathlib import Path

from job.runs.checksums import checksum_files, file_digest, find_mismatch


def test_missing_and_changed_files_are_found(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "a").write_text("one")
    (tmp_path / "in" / "b").write_text("two")
    recorded = checksum_files(tmp_path, [tmp_path / "in" / "b", tmp_path / "a"])
    assert list(recorded) == ["a", "in/b"]
    assert find_mismatch(tmp_path, recorded) is None
    (tmp_path / "in" / "b").write_text("tvo")
    assert "in/b has changed since it was written" in str(find_mismatch(tmp_path, recorded))
    (tmp_path / "a").unlink()
    assert "a is missing" in str(find_mismatch(tmp_path, recorded))


def test_the_digest_is_the_sha256_of_the_content(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"one")
    assert file_digest(tmp_path / "a") == hashlib.sha256(b"one").hexdigest()
