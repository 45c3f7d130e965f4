"""Files and folders are whole or absent, also when the disk is full."""

from __future__ import annotations

import errno
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from job.runs.atomic import atomic_directory, atomic_write
from job.runs.checksums import checksum_files, find_mismatch


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """The kernel refuses to let any file of this process grow beyond so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_file_that_cannot_be_written_leaves_the_one_before(tmp_path: Path) -> None:
    atomic_write(tmp_path / "a.json", "before")
    with pytest.raises(UnicodeEncodeError):
        atomic_write(tmp_path / "a.json", "\ud800")
    with largest_file(1000), pytest.raises(OSError, match="File too large"):
        atomic_write(tmp_path / "a.json", "x" * 2000)
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]
    assert (tmp_path / "a.json").read_text() == "before"


def test_a_folder_that_does_not_fit_leaves_the_one_before_and_an_oserror_of_every_writer(tmp_path: Path) -> None:
    def fill(n: int) -> None:
        with atomic_directory(tmp_path / "checkpoint") as folder:
            save_file({"a": torch.zeros(n)}, folder / "tensors")

    fill(10)
    before = (tmp_path / "checkpoint" / "tensors").read_bytes()
    with largest_file(1000), pytest.raises(OSError, match="File too large") as caught:
        fill(1000)
    assert caught.value.errno == errno.EFBIG
    assert [folder.name for folder in tmp_path.iterdir()] == ["checkpoint"], "and nothing takes room"
    assert (tmp_path / "checkpoint" / "tensors").read_bytes() == before


def test_a_seal_tells_what_was_altered(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "a").write_text("one")
    (tmp_path / "in" / "b").write_text("two")
    sealed = checksum_files(tmp_path, [tmp_path / "a", tmp_path / "in" / "b"])
    assert list(sealed) == ["a", "in/b"]
    assert find_mismatch(tmp_path, sealed) is None
    (tmp_path / "in" / "b").write_text("tvo")
    assert "in/b is not as it was written" in str(find_mismatch(tmp_path, sealed))
    (tmp_path / "a").unlink()
    assert "a is not there" in str(find_mismatch(tmp_path, sealed))
