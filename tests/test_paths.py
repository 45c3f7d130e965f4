"""What a setting names: a local path, a file of a package, or a Hub id."""

from __future__ import annotations

from pathlib import Path

import pytest

from job.errors import InvalidInputError
from job.system.paths import DATA_SUFFIXES, hub_snapshot, is_local, local_path


def test_a_snapshot_of_the_cache_names_its_hub_id_and_commit(tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = tmp_path / "models--bigscience--bloomz-560m" / "snapshots" / commit
    assert hub_snapshot(snapshot) == ("bigscience/bloomz-560m", commit)
    assert hub_snapshot(snapshot.parent) is None
    assert hub_snapshot(tmp_path) is None


@pytest.mark.parametrize("name", ["./quotes", "/data/quotes", "~/quotes", "quotes.CSV", "package:job/quotes", "here"])
def test_paths_and_data_files_are_local(tmp_path: Path, name: str) -> None:
    (tmp_path / "here").mkdir()  # the tests' working directory
    assert is_local(name, DATA_SUFFIXES)


@pytest.mark.parametrize("name", ["owner/quotes", "quotes", "owner/model.gguf"])
def test_other_names_are_hub_ids(name: str) -> None:
    assert not is_local(name, DATA_SUFFIXES)


def test_a_package_file_is_found() -> None:
    assert local_path("package:job/dataset/sayings.jsonl", "TAGGER_DATA_DATASET").name == "sayings.jsonl"


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        (
            "./absent.csv",
            "TAGGER_DATA_DATASET=./absent.csv does not exist; expected a local file or folder",
        ),
        ("~nobody_here/x.csv", "does not exist"),
        (
            "package:absent/x.csv",
            "the Python package 'absent' is not installed; install it, or set TAGGER_DATA_DATASET to another file",
        ),
        ("package:job/x.csv", "the Python package 'job' has no file 'x.csv'"),
    ],
)
def test_a_path_that_does_not_exist_is_refused(name: str, problem: str) -> None:
    with pytest.raises(InvalidInputError, match=problem):
        local_path(name, "TAGGER_DATA_DATASET")
