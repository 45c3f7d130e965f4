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


def test_a_large_object_comes_down_a_slow_line(
    bucket: s3.Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("job.runs.objects.REQUEST_SECONDS", 1)
    monkeypatch.setattr("job.runs.objects.RANGE_BYTES", 5_000)
    objects, content = open_objects("s3://bucket/x"), os.urandom(24_000)
    objects.put("large", content)
    bucket.bytes_per_second = 20_000
    with (tmp_path / "copy").open("w+b") as copy:
        assert objects.download("large", copy)
    assert (tmp_path / "copy").read_bytes() == content


def test_a_download_that_is_cut_off_is_repeated(
    bucket: s3.Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("job.runs.objects.RANGE_BYTES", 5_000)
    monkeypatch.setattr("job.runs.objects.PAUSE_SECONDS", 0.0)
    objects, content = open_objects("s3://bucket/x"), os.urandom(12_000)
    objects.put("large", content)
    objects.put("small", content[:4000])
    bucket.faults = [Fault("GET .*/small", "cut"), Fault("GET .*/large", "cut", times=2)]
    with (tmp_path / "copy").open("w+b") as copy:
        assert objects.download("large", copy)
        copy.flush()
        assert (tmp_path / "copy").read_bytes() == content
        assert objects.download("small", copy)
    assert (tmp_path / "copy").read_bytes() == content[:4000]


def test_an_object_that_goes_during_its_download_is_absent(
    bucket: s3.Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("job.runs.objects.RANGE_BYTES", 5_000)
    objects = open_objects("s3://bucket/x")
    objects.put("large", os.urandom(12_000))
    get_range = objects._obstore.get_range

    def prune_and_get(*arguments: Any, **options: Any) -> Any:
        objects.delete(["large"])
        return get_range(*arguments, **options)

    monkeypatch.setattr(objects._obstore, "get_range", prune_and_get)
    with (tmp_path / "copy").open("w+b") as copy:
        assert not objects.download("large", copy)


def test_reading_creates_no_folder(tmp_path: Path) -> None:
    objects = open_objects(f"file://{tmp_path}/store")
    with (tmp_path / "copy").open("w+b") as copy:
        assert not objects.download("a", copy)
    objects.delete(["a"])
    assert (objects.get("a"), objects.list("")) == (None, {})
    assert not (tmp_path / "store").exists()
    open_objects(f"file://{tmp_path}/store").put("a", b"1")
    assert objects.get("a") == b"1"  # of another process


@pytest.mark.parametrize("name", ["runs#1", "what?", "50%20off"])
def test_a_url_is_used_as_it_is(bucket: s3.Store, tmp_path: Path, name: str) -> None:
    open_objects(f"file://{tmp_path}/{name}").put("a", b"1")
    assert (tmp_path / name.replace("%20", " ") / "a").read_bytes() == b"1"
    open_objects(f"s3://bucket/{name}").put("a", b"1")
    assert list(bucket.objects) == [f"{name.replace('%20', ' ')}/a"]


def test_a_bucket_of_the_hub_is_used_with_a_mounted_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("job.system.hub_token.SECRET_FILE", tmp_path / "hf_token")
    (tmp_path / "hf_token").write_text("hf_mounted\n")
    bucket: Any = open_objects("hf://buckets/ada/runs")
    assert bucket._api.token == "hf_mounted"


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
