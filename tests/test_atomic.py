"""Files and folders are complete or absent, also when the disk is full."""

from __future__ import annotations

import errno
import os
import resource
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from job.runs.atomic import atomic_directory, atomic_write, tmp_paths_of


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Limit the size of every file that this process writes, in bytes; the kernel enforces it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_file_that_cannot_be_written_keeps_its_content(tmp_path: Path) -> None:
    atomic_write(tmp_path / "a.json", "before")
    with pytest.raises(UnicodeEncodeError):
        atomic_write(tmp_path / "a.json", "\ud800")
    with largest_file(1000), pytest.raises(OSError, match="File too large"):
        atomic_write(tmp_path / "a.json", "x" * 2000)
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]
    assert (tmp_path / "a.json").read_text() == "before"


def test_a_folder_on_a_full_disk_keeps_its_content(tmp_path: Path) -> None:
    def fill(n: int) -> None:
        with atomic_directory(tmp_path / "checkpoint") as folder:
            save_file({"a": torch.zeros(n)}, folder / "tensors")

    fill(10)
    before = (tmp_path / "checkpoint" / "tensors").read_bytes()
    with largest_file(1000), pytest.raises(OSError, match="File too large") as caught:
        fill(1000)
    assert caught.value.errno == errno.EFBIG
    assert [folder.name for folder in tmp_path.iterdir()] == ["checkpoint"], "no temporary folder is left"
    assert (tmp_path / "checkpoint" / "tensors").read_bytes() == before


def test_a_folder_replaces_the_previous_one_completely(tmp_path: Path) -> None:
    for name in ("old", "new"):
        with atomic_directory(tmp_path / "adapter") as folder:
            (folder / name).touch()
            assert not (tmp_path / "adapter" / name).exists()
    assert [file.name for file in (tmp_path / "adapter").iterdir()] == ["new"]


def test_a_kill_during_a_replacement_leaves_no_half_of_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def replace(content: str) -> None:
        with atomic_directory(tmp_path / "run") as folder:
            for name in ("a", "b"):
                (folder / name).write_text(content)

    def kill(path: Path, **_: object) -> None:
        for file in path.glob("a"):
            file.unlink()
            raise SystemExit

    replace("old")
    monkeypatch.setattr("shutil.rmtree", kill)
    with pytest.raises(SystemExit):
        replace("new")
    assert [(tmp_path / "run" / name).read_text() for name in ("a", "b")] == ["new", "new"]


def test_keep_existing_keeps_what_another_process_has_created(tmp_path: Path) -> None:
    with atomic_directory(tmp_path / "weights", keep_existing=True) as folder:
        (folder / "ours").touch()
        (tmp_path / "weights").mkdir()
        (tmp_path / "weights" / "theirs").touch()
    assert [file.relative_to(tmp_path).as_posix() for file in tmp_path.rglob("*")] == ["weights", "weights/theirs"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o002, 0o664), (0o077, 0o600)])
def test_files_are_readable_as_the_umask_says(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        with atomic_directory(tmp_path / "checkpoint") as folder:
            save_file({"a": torch.zeros(1)}, folder / "tensors")
            (folder / "deeper").mkdir()
            os.close(tempfile.mkstemp(dir=folder / "deeper")[0])  # 0600, as of safetensors
        atomic_write(tmp_path / "a.json", "{}")
    finally:
        os.umask(before)
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert len(files) == 3
    assert {oct(file.stat().st_mode & 0o777) for file in files} == {oct(mode)}


def test_unfinished_folders_of_a_longer_name_belong_to_others(tmp_path: Path) -> None:
    own, other = tmp_path / "demo.0a1b2c3d.tmp", tmp_path / "demo.v2.0a1b2c3d.tmp"
    for folder in (own, other):
        folder.mkdir()
    assert tmp_paths_of(tmp_path / "demo") == [own]
    assert tmp_paths_of(tmp_path / "demo.v2") == [other]
