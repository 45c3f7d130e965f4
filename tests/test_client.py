"""The client retries transient errors only, reads published files, and never shows the token."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from hub import WRITE_TOKEN, Fault, Hub, Repo
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

from job.errors import InvalidInputError
from job.hub import client
from job.settings import Hub as HubSettings

NAME = "big/model"


@pytest.fixture
def repo(loopback_hub: Hub) -> Repo:
    loopback_hub.models[NAME] = Repo(NAME)
    return loopback_hub.models[NAME]


def head(name: str = NAME, seconds: float = 4.0) -> str:
    return client.retry(lambda: str(client.api().repo_info(name).sha), seconds, "hub")


@pytest.mark.parametrize("fault", [Fault(f"GET /api/models/{NAME}$", "status"), Fault(f"/{NAME}$", "drop")])
def test_a_transient_error_is_retried(loopback_hub: Hub, repo: Repo, fault: Fault) -> None:
    loopback_hub.faults = [Fault(**vars(fault))]
    assert head() == repo.branches["main"][-1].oid
    assert loopback_hub.faults[0].times == 0


def test_retries_wait_as_long_as_retry_after_asks(loopback_hub: Hub, repo: Repo) -> None:
    loopback_hub.faults = [Fault(NAME, "status", status=429, headers={"Retry-After": "2"})]
    started = time.monotonic()
    head()
    assert time.monotonic() - started >= 2


def test_a_permanent_error_is_not_retried(loopback_hub: Hub) -> None:
    with pytest.raises(RepositoryNotFoundError):
        head("big/absent")
    assert len(loopback_hub.requests) == 1


def test_retries_end_after_the_given_time(loopback_hub: Hub, repo: Repo) -> None:
    loopback_hub.faults = [Fault(NAME, "status", times=99, status=502)]
    started = time.monotonic()
    with pytest.raises(HfHubHTTPError, match="502"):
        head(seconds=1.5)
    assert time.monotonic() - started < 3


def test_published_json_reads_an_object(repo: Repo) -> None:
    repo.commit("main", "manifest", {"manifest.json": b'{"run_id": "tiny"}', "list.json": b"[]"})
    assert client.published_json(NAME, None, "manifest.json") == {"run_id": "tiny"}
    assert client.published_json(NAME, None, "absent.json") is None
    assert client.published_json(NAME, "v9", "manifest.json") is None
    with pytest.raises(client.HubFileError, match=r"list\.json is not a JSON object"):
        client.published_json(NAME, None, "list.json")
    with pytest.raises(client.HubFileError, match="404"):
        client.published_json("big/absent", None, "manifest.json")


def test_an_unreadable_manifest_is_an_input_error(repo: Repo) -> None:
    assert client.published_manifest(HubSettings(repo=NAME)) == {}
    repo.commit("main", "damaged", {"manifest.json": b"["})
    with pytest.raises(InvalidInputError, match=f"manifest.json of the adapter in {NAME} cannot be read"):
        client.published_manifest(HubSettings(repo=NAME))


def test_the_token_is_read_from_a_mounted_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("job.system.hub_token.SECRET_FILE", tmp_path / "hf_token")
    assert client.token() is None
    (tmp_path / "hf_token").write_text(f"{WRITE_TOKEN}\n")
    assert client.token() == WRITE_TOKEN
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    assert client.token() == "hf_other"


def test_error_messages_never_show_the_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert client.error_message(ValueError("bad token\nhf_secret")) == "bad token ***"
