"""Objects in S3 and in a folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import s3
from s3 import Fault

from job.runs.objects import StoreError, open_objects


def test_objects_are_written_read_listed_and_deleted(url: str, tmp_path: Path) -> None:
    objects = open_objects(url)
    assert list(objects.list("")) == []
    assert objects.get("a/b") is None
    objects.put("a/b", b"1")
    objects.put("a/b", b"2")
    large = tmp_path / "large"
    large.write_bytes(os.urandom(12_000_000))
    with large.open("rb") as file:
        objects.put("a/large", file)
    objects.put("other", b"3")
    assert list(objects.list("a/")) == ["a/b", "a/large"]
    assert objects.get("a/b") == b"2"
    with (tmp_path / "copy").open("w+b") as copy:
        assert objects.download("a/large", copy)
        assert not objects.download("a/none", copy)
    objects.delete(["a/b", "a/none", "other"])
    assert list(objects.list("")) == ["a/large"]


def test_an_object_is_only_written_if_it_is_absent(url: str) -> None:
    objects = open_objects(url)
    assert objects.put_if_absent("lease", b"mine")
    assert not objects.put_if_absent("lease", b"yours")
    assert objects.get("lease") == b"mine"


def test_a_write_whose_answer_was_lost_was_made(bucket: s3.Store) -> None:
    bucket.faults = [Fault("PUT", "lose_answer")]
    assert open_objects("s3://bucket/x").put_if_absent("lease", b"mine")


@pytest.mark.parametrize("kind", ["503", "403"])
def test_a_store_that_fails_says_why_in_one_line(bucket: s3.Store, kind: Any) -> None:
    bucket.faults = [Fault("PUT", kind, times=99)]
    with pytest.raises(StoreError, match=r"^[^\n]*(SlowDown|AccessDenied)[^\n]*$"):
        open_objects("s3://bucket/x").put("a", b"")
