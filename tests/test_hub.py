"""What the Hub says before training becomes a sentence; what may pass by itself is tried again."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from hub import READ_TOKEN, SCOPED_TOKEN, WRITE_TOKEN, Fault, Hub, Repo

from job import push
from job.errors import InvalidInputError
from job.hub import access
from job.hub import client as hub
from job.settings import Settings


def settings(**knobs: object) -> Settings:
    return Settings.model_validate({"hub": knobs})


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "CHECK_SECONDS", 4.0)


def test_the_repo_is_made_private_before_training(loopback_hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", WRITE_TOKEN)
    assert push.prepare_repo(settings()) == "ada/bloomz-560m-tagger"
    assert loopback_hub.models["ada/bloomz-560m-tagger"].private
    assert push.prepare_repo(settings(repo="lovelace-lab/tagger", private=False)) == "lovelace-lab/tagger"
    assert not loopback_hub.models["lovelace-lab/tagger"].private
    assert push.prepare_repo(settings(push="never")) is None


def test_without_a_token_nothing_is_asked_and_always_is_refused(loopback_hub: Hub) -> None:
    assert push.prepare_repo(settings()) is None
    with pytest.raises(InvalidInputError, match=r"TAGGER_HUB_PUSH=always needs a token \(HF_TOKEN\)"):
        push.prepare_repo(settings(push="always"))
    assert loopback_hub.requests == []


@pytest.mark.parametrize(
    ("token", "repo", "said"),
    [
        ("hf_unknown", None, "HF_TOKEN is not valid"),
        (READ_TOKEN, None, "HF_TOKEN may only read"),
        (SCOPED_TOKEN, None, "fine-grained and may not write to repos of ada"),
        (WRITE_TOKEN, "babbage/tagger", "the namespace babbage is not the token's; it has ada, lovelace-lab"),
        (WRITE_TOKEN, "ada/public", "ada/public is public and TAGGER_HUB_PRIVATE=true"),
        (WRITE_TOKEN, "ada/locked", "may not write to ada/locked"),
    ],
)
def test_what_would_refuse_the_push_is_refused_before_training(
    loopback_hub: Hub, monkeypatch: pytest.MonkeyPatch, token: str, repo: str | None, said: str
) -> None:
    loopback_hub.models["ada/public"] = Repo("ada/public")
    loopback_hub.models["ada/locked"] = Repo("ada/locked", private=True)
    if repo == "ada/locked":
        loopback_hub.faults = [Fault("locked/auth-check", "status", times=9, status=403)]
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(InvalidInputError) as refusal:
        push.prepare_repo(settings(repo=repo))
    assert said in str(refusal.value)
    assert token not in str(refusal.value)
    assert len(loopback_hub.models) == 2


def test_a_scoped_token_may_use_the_namespace_it_is_for(loopback_hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", SCOPED_TOKEN)
    assert push.prepare_repo(settings(repo="lovelace-lab/tagger")) == "lovelace-lab/tagger"


def test_names_become_commits_and_licences(loopback_hub: Hub) -> None:
    model = loopback_hub.models["big/model"] = Repo("big/model", licence="bigscience-bloom-rail-1.0")
    first = model.commit("main", "first", {})
    second = model.commit("main", "second", {})
    assert access.resolve_revision("model", "big/model", None).commit == second.oid
    assert access.resolve_revision("model", "big/model", first.oid).commit == first.oid
    assert access.resolve_revision("model", "big/model", None).licence == "bigscience-bloom-rail-1.0"


@pytest.mark.parametrize(
    ("name", "revision", "said"),
    [
        ("big/absent", None, "the base model big/absent is not on the Hub, or is private"),
        ("big/gated", None, "the base model big/gated is gated; accept its terms"),
        ("big/model", "v9", "the base model big/model has no revision v9; check TAGGER_BASE_REVISION"),
        ("not a name", None, "TAGGER_BASE_MODEL=not a name is neither a local path that exists nor a Hub id"),
    ],
)
def test_missing_and_gated_and_no_such_revision_each_have_their_own_words(
    loopback_hub: Hub, name: str, revision: str | None, said: str
) -> None:
    loopback_hub.models |= {"big/model": Repo("big/model"), "big/gated": Repo("big/gated", gated=True)}
    with pytest.raises(InvalidInputError) as refusal:
        access.resolve_revision("model", name, revision)
    assert said in str(refusal.value)


def test_a_server_error_that_passes_is_waited_out(loopback_hub: Hub) -> None:
    loopback_hub.models["big/model"] = Repo("big/model")
    loopback_hub.faults = [Fault("auth-check", "status", status=503), Fault("GET /api/models/big/model$", "drop")]
    assert access.resolve_revision("model", "big/model", None).commit


def test_a_hub_that_stays_away_is_said_to(loopback_hub: Hub) -> None:
    loopback_hub.faults = [Fault("auth-check", "status", times=99, status=502)]
    started = time.monotonic()
    with pytest.raises(InvalidInputError, match="the Hub cannot be asked .*; check the network and HF_ENDPOINT"):
        access.resolve_revision("model", "big/model", None)
    assert time.monotonic() - started < 10


def test_retry_after_is_obeyed_and_what_would_fail_again_is_not_tried_again(loopback_hub: Hub) -> None:
    loopback_hub.models["big/model"] = Repo("big/model")
    loopback_hub.faults = [Fault("auth-check", "status", status=429, headers={"Retry-After": "2"})]
    started = time.monotonic()
    access.resolve_revision("model", "big/model", None)
    assert time.monotonic() - started >= 2
    asked = len(loopback_hub.requests)
    with pytest.raises(InvalidInputError):
        access.resolve_revision("model", "big/absent", None)
    assert len(loopback_hub.requests) == asked + 1


def test_a_mounted_secret_is_a_token_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hf_token").write_text(f"{WRITE_TOKEN}\n")
    monkeypatch.setattr(hub, "SECRET_FILE", tmp_path / "hf_token")
    assert access.token_info().user == "ada"
    monkeypatch.setenv("HF_TOKEN", SCOPED_TOKEN)
    assert access.token_info().role == "fineGrained"


def test_errors_never_show_the_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert hub.error_message(ValueError("bad token\nhf_secret")) == "bad token ***"
