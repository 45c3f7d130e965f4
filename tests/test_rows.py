"""Rows come from the Hub, from object storage and from folders, and a setting that does not fit is named."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from hub import Hub, Repo

from job.dataset.rows import read_rows
from job.errors import InvalidInputError
from job.settings import Data


def rows(name: str) -> list[dict[str, Any]]:
    return [{"quote": f"text {i} of {name}", "tags": ["a", "b"]} for i in range(3)]


def lines(name: str) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows(name)).encode()


def values(dataset: str, **knobs: Any) -> list[dict[str, Any]]:
    return [dict(row.values) for row in read_rows(Data(dataset=dataset, **knobs))]


@pytest.fixture
def with_configs(loopback_hub: Hub) -> Hub:
    card = (
        "---\nconfigs:\n- config_name: en\n  data_files:\n  - split: train\n    path: en.jsonl\n"
        "  - split: test\n    path: test.jsonl\n- config_name: de\n  data_files: de.jsonl\n---\n"
    )
    repo = loopback_hub.datasets["tiny/configs"] = Repo("tiny/configs")
    files = {f"{name}.jsonl": lines(name) for name in ("en", "de", "test")}
    repo.commit("main", "data", {"README.md": card.encode(), **files})
    return loopback_hub


def test_config_and_split_of_a_hub_data_set_are_chosen(with_configs: Hub) -> None:
    assert values("tiny/configs", config="en") == rows("en")
    assert values("tiny/configs", config="en", split="test") == rows("test")
    assert values("tiny/configs", config="de") == rows("de")


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({}, r"several configs .*\['en', 'de'\].* set TAGGER_DATA_CONFIG"),
        ({"config": "fr"}, r"BuilderConfig 'fr' not found.* set TAGGER_DATA_CONFIG"),
        ({"config": "de", "split": "dev"}, "has no split 'dev' .*set TAGGER_DATA_SPLIT"),
        ({"config": "de", "text_column": "text"}, "no column 'text'; it has 'quote', 'tags'"),
    ],
)
def test_a_setting_that_does_not_fit_is_named(with_configs: Hub, knobs: dict[str, str], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message) as refusal:
        values("tiny/configs", **knobs)
    assert "network" not in str(refusal.value)


def test_a_data_set_built_by_a_script_is_refused(loopback_hub: Hub) -> None:
    repo = loopback_hub.datasets["tiny/script"] = Repo("tiny/script")
    repo.commit("main", "code", {"script.py": b"raise SystemExit", "README.md": b"data"})
    with pytest.raises(InvalidInputError, match="built by a script, and scripts are not run"):
        values("tiny/script")


def test_a_file_in_a_repo_is_read_by_its_url(with_configs: Hub) -> None:
    assert values("hf://datasets/tiny/configs/de.jsonl") == rows("de")


class Store(BaseHTTPRequestHandler):
    """As much of S3 as listing and reading need."""

    objects: dict[str, bytes]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        bucket, _, key = unquote(url.path).lstrip("/").partition("/")
        query = parse_qs(url.query)
        if "list-type" in query:
            prefix = query.get("prefix", [""])[0]
            found = "".join(
                f"<Contents><Key>{name}</Key><Size>{len(content)}</Size>"
                "<LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
                for name, content in sorted(self.objects.items())
                if name.startswith(prefix)
            )
            body = f"<ListBucketResult><Name>{bucket}</Name><IsTruncated>false</IsTruncated>{found}</ListBucketResult>"
            self.answer(200, body.encode())
        elif key in self.objects:
            content = self.objects[key]
            start, _, end = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
            self.answer(206 if "Range" in self.headers else 200, content[int(start) : int(end or len(content)) + 1])
        else:
            self.answer(404 if key else 200, b"")

    def answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, bytes]]:
    objects: dict[str, bytes] = {}
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("OneStore", (Store,), {"objects": objects}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    yield objects
    server.shutdown()
    server.server_close()


def test_objects_folders_and_globs_of_s3_are_read(store: dict[str, bytes]) -> None:
    store |= {"data/b.jsonl": lines("b"), "data/a.jsonl": lines("a"), "data/notes.txt": b"none"}
    assert values("s3://bucket/data/a.jsonl") == rows("a")
    assert values("s3://bucket/data/") == rows("a") + rows("b")
    assert values("s3://bucket/data/b*.jsonl") == rows("b")
    with pytest.raises(InvalidInputError, match="names no data file"):
        values("s3://bucket/data/absent.jsonl")
