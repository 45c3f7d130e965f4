"""Answers are limited in size and in time, for each kind of call, and so are the files that are sent."""

from __future__ import annotations

import gzip
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hub import WRITE_TOKEN, Fault, Hub, Repo
from huggingface_hub import constants, get_session, snapshot_download

from job.hub import client, transport
from job.hub.answers import HubAnswerError, HubTimeoutError

NAME = "ada/tagger"
COMMIT = {"X-Repo-Commit": "c0ffee" * 7, "ETag": '"1"'}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "READ_SECONDS", 0.4)
    monkeypatch.setattr(transport, "WRITE_SECONDS", 0.4)


@pytest.fixture
def repo(loopback_hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Repo:
    monkeypatch.setenv("HF_TOKEN", WRITE_TOKEN)
    loopback_hub.models[NAME] = Repo(NAME, private=True)
    loopback_hub.models[NAME].commit("main", "files", {"manifest.json": b"{}", "model.safetensors": b"w" * 100_000})
    return loopback_hub.models[NAME]


CALLS: dict[str, Callable[[], object]] = {
    "whoami": lambda: client.api().whoami(),
    f"GET /api/models/{NAME}$": lambda: client.api().repo_info(NAME),
    "commits/main": lambda: client.list_commits(NAME, None),
    "refs": lambda: client.api().list_repo_refs(NAME),
    "tree": lambda: list(client.api().list_repo_tree(NAME)),
    "auth-check": lambda: client.api().auth_check(NAME, write=True),
    "branch": lambda: client.api().create_branch(NAME, branch="new"),
    "HEAD .*manifest.json": lambda: client.download_metadata(NAME, None, "manifest.json"),
    "GET .*manifest.json": lambda: client.download_metadata(NAME, None, "manifest.json"),
    "GET .*model.safetensors": lambda: client.download(NAME, None, "model.safetensors"),
}


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("kind", ["dribble", "dribble_headers"])
@pytest.mark.parametrize("call", CALLS)
def test_a_byte_at_a_time_is_given_up(loopback_hub: Hub, repo: Repo, call: str, kind: str) -> None:
    if kind == "dribble" and call.startswith("HEAD"):
        pytest.skip("an answer to HEAD has no content")
    loopback_hub.faults = [Fault(call, kind, times=99, headers=COMMIT)]  # type: ignore[arg-type]
    started = time.monotonic()
    with pytest.raises(HubTimeoutError, match=r"no complete answer after|is too slow"):
        client.retry(CALLS[call], 0, "hub")
    assert time.monotonic() - started < 5


def test_a_slow_answer_is_retried(loopback_hub: Hub, repo: Repo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "READ_SECONDS", 1.5)
    loopback_hub.faults = [Fault("commits/main", "dribble")]
    assert client.retry(lambda: client.list_commits(NAME, None), 30, "hub")[0].title == "files"


def test_a_slow_step_of_many_pages_is_given_up(loopback_hub: Hub, repo: Repo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "STEP_SECONDS", 0.6)

    def pages() -> None:
        while True:
            client.api().repo_info(NAME)

    loopback_hub.faults = [Fault(f"/{NAME}$", "before", times=999, action=lambda: time.sleep(0.1))]
    with pytest.raises(HubTimeoutError):
        client.retry(pages, 0, "hub")


@pytest.mark.parametrize(
    ("call", "content", "headers"),
    [
        ("whoami", b'{"name": "' + b"a" * 3000, {}),
        ("commits/main", b"[" + b" " * 3000, {}),
        (f"GET /api/models/{NAME}$", gzip.compress(b" " * 1_000_000), {"Content-Encoding": "gzip"}),
        ("GET .*manifest.json", b" " * 3000, COMMIT),
        ("GET .*manifest.json", gzip.compress(b" " * 1_000_000), {**COMMIT, "Content-Encoding": "gzip"}),
    ],
)
def test_an_answer_of_any_size_is_not_read(
    loopback_hub: Hub, repo: Repo, monkeypatch: pytest.MonkeyPatch, call: str, content: bytes, headers: dict[str, str]
) -> None:
    monkeypatch.setattr(transport, "MAX_ANSWER_BYTES", 2000)
    loopback_hub.faults = [Fault(call, "answer", times=9, status=200, content=content, headers=headers)]
    with pytest.raises(HubAnswerError, match="has more than 2000 bytes"):
        client.retry(CALLS[call], 0, "hub")


def test_a_large_file_may_take_its_time(loopback_hub: Hub, repo: Repo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "MIN_BYTES_PER_SECOND", 100)
    monkeypatch.setattr(transport, "MAX_ANSWER_BYTES", 2000)
    loopback_hub.faults = [
        Fault("GET .*safetensors", "dribble", content=b"w" * 10_000, headers={**COMMIT, "Content-Length": "100000"})
    ]
    repo.commit("main", "other weights", {"model.safetensors": b"w" * 99_999 + b"!"})
    assert client.download(NAME, None, "model.safetensors").stat().st_size == 100_000


def test_the_hub_s_own_wait_is_kept_and_the_client_s_is_short(loopback_hub: Hub, repo: Repo) -> None:
    client.bound_requests()
    for headers, wait, told in (
        ({"Retry-After": "3600"}, 3600, "10"),
        ({"Retry-After": "nonsense"}, 0, None),
        ({"RateLimit": '"api";r=0;t=1800'}, 1800, "10"),
    ):
        loopback_hub.faults = [Fault("whoami", "status", status=429, headers=headers)]
        response = get_session().get(f"{constants.ENDPOINT}/api/whoami-v2")
        assert response.extensions["retry_after"] == wait
        assert response.headers.get("Retry-After") == told
        assert "RateLimit" not in response.headers


def test_a_file_name_that_leads_out_of_the_cache_is_not_written(loopback_hub: Hub, repo: Repo, tmp_path: Path) -> None:
    client.bound_requests()
    repo.commit("main", "evil", {"../../../outside.json": b"{}"})
    with pytest.raises(HubAnswerError, match="not a path in a repo"):
        snapshot_download(NAME, cache_dir=tmp_path / "cache", token=WRITE_TOKEN)
    assert not list(tmp_path.rglob("outside.json"))
