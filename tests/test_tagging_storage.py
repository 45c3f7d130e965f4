"""Input and output in object storage give the same bytes as on disk, whatever requests fail."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import s3
from hub import Hub, Repo
from s3 import Fault, Store
from stub_tagger import job, tag

from job.errors import InvalidInputError, JobError
from job.tagging import storage

LINES = b"".join(json.dumps({"id": i, "quote": f"text {i}"}).encode() + b"\n" for i in range(40))


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    monkeypatch.setattr("time.sleep", lambda _: None)  # the waits before a request is repeated
    with s3.serve() as (served, variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        served.objects["in/a.jsonl"] = LINES
        yield served


@pytest.fixture
def expected(tmp_path: Path) -> dict[str, bytes]:
    (tmp_path / "in.jsonl").write_bytes(LINES)
    tag(job(tmp_path / "in.jsonl", f"{tmp_path}/expected/"))
    return {path.name: path.read_bytes() for path in (tmp_path / "expected").glob("part-*")}


def parts(store: Store, folder: str = "out") -> dict[str, bytes]:
    found = {name.removeprefix(f"{folder}/"): content for name, content in store.objects.items()}
    return {name: content for name, content in found.items() if name.startswith("part-")}


@pytest.mark.parametrize("output", ["s3://bucket/out/", "s3://bucket/deep/er/out.jsonl"])
def test_object_storage_gets_the_bytes_of_a_disk(store: Store, expected: dict[str, bytes], output: str) -> None:
    success = tag(job("s3://bucket/in/", output))
    assert success["rows"] == 40
    if output.endswith("/"):
        assert parts(store) == expected
        assert json.loads(store.objects["out/_SUCCESS.json"]) == success
    else:
        assert store.objects["deep/er/out.jsonl"] == b"".join(expected[name] for name in sorted(expected))
        assert not parts(store, "deep/er/.out.jsonl.parts")
    before = dict(store.objects)
    assert tag(job("s3://bucket/in/", output)) == success
    assert store.objects == before


@pytest.mark.parametrize(
    ("requests", "kind"),
    [
        ("GET /bucket/in/", "503"),
        ("GET /bucket/in/", "cut"),
        ("GET /bucket/in/", "slow"),
        ("PUT /bucket/out/part", "503"),
        ("PUT /bucket/out/part", "lose_answer"),
        ("GET /bucket/out/_parts/", "cut"),
        ("list-type", "503"),
    ],
)
def test_failed_requests_are_repeated(store: Store, expected: dict[str, bytes], kind: str, requests: str) -> None:
    what = job("s3://bucket/in/a.jsonl", "s3://bucket/out/")
    times = 4 if kind == "503" and "in" in requests else 2  # the client repeats a 503 by itself, three times in all
    store.faults = [Fault(requests, kind, times=times)]  # type: ignore[arg-type]
    tag(what)
    tag(what)
    assert parts(store) == expected
    assert store.faults[0].times < times, "the fault was met"


def test_what_stays_unreachable_keeps_the_sealed_parts(
    store: Store, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    what = job("s3://bucket/in/a.jsonl", "s3://bucket/out/")
    monkeypatch.setattr(storage, "ATTEMPTS", 2)
    store.faults = [Fault("PUT /bucket/out/part-00002", "503", times=1000)]
    with pytest.raises(JobError, match=r"cannot be written: part-00002.*sealed parts are kept"):
        tag(what)
    assert set(parts(store)) == {"part-00000.jsonl", "part-00001.jsonl"}
    store.faults = []
    tag(what)
    assert parts(store) == expected


@pytest.mark.parametrize(
    ("given", "output", "fault", "message"),
    [
        (
            "s3://bucket/in/",
            "s3://none/out/",
            None,
            "TAGGER_TAG_OUTPUT=s3://none/out cannot be written.*NO_SUCH_BUCKET",
        ),
        (
            "s3://bucket/in/",
            "s3://bucket/out/",
            "PUT",
            "TAGGER_TAG_OUTPUT=s3://bucket/out cannot be written.*ACCESS_DENIED",
        ),
        ("s3://bucket/in/", "s3://bucket/out.csv", "list-type.*out", "TAGGER_TAG_OUTPUT=.*ACCESS_DENIED"),
        ("s3://bucket/in/", "s3://bucket/out/", "GET /bucket/in/a", "in/a.jsonl cannot be read.*ACCESS_DENIED"),
        ("s3://bucket/none/", "s3://bucket/out/", None, "TAGGER_TAG_INPUT=s3://bucket/none/ names no data file"),
    ],
)
def test_what_may_not_be_used_is_refused(
    store: Store, given: str, output: str, fault: str | None, message: str
) -> None:
    store.faults = [Fault(fault, "403", times=100)] if fault else []
    with pytest.raises(InvalidInputError, match=message):
        tag(job(given, output))
    assert set(store.objects) == {"in/a.jsonl"}


def test_a_large_object_is_written_in_pieces(store: Store) -> None:
    content = bytes(range(256)) * 50_000
    folder = storage.open_folder("s3://bucket/large")
    storage.write(folder, "file", content)
    assert store.objects["large/file"] == content
    assert folder.list() == {"file": len(content)}
    assert store.uploads, "several requests"


def test_an_input_in_a_repo_is_tagged(tmp_path: Path, loopback_hub: Hub, expected: dict[str, bytes]) -> None:
    repo = loopback_hub.datasets["tiny/texts"] = Repo("tiny/texts")
    repo.commit("main", "data", {"a.jsonl": LINES})
    what = job("hf://datasets/tiny/texts/a.jsonl", f"{tmp_path}/out/")
    tag(what)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").glob("part-*")} == expected
    repo.commit("main", "other data", {"a.jsonl": LINES.replace(b"text 3", b"tent 3")})
    with pytest.raises(InvalidInputError, match="a.jsonl are not what they were"):
        tag(what)
