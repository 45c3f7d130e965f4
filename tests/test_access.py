"""Token and repo are checked before training, and names on the Hub become commits."""

from __future__ import annotations

import time

import pytest
from hub import READ_TOKEN, SCOPED_TOKEN, WRITE_TOKEN, Fault, Hub, Repo

from job.errors import InvalidInputError
from job.hub import access, client


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "CHECK_SECONDS", 4.0)


def prepare(repo: str, *, private: bool = True) -> None:
    access.prepare_repo(repo, access.token_info(), private=private)


def test_token_info_describes_the_account(loopback_hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", WRITE_TOKEN)
    account = access.token_info()
    assert (account.user, account.organizations, account.role) == ("ada", ("lovelace-lab",), "write")
    monkeypatch.setenv("HF_TOKEN", SCOPED_TOKEN)
    assert access.token_info().role == "fineGrained"
    assert access.token_info().writable == {"lovelace-lab"}


@pytest.mark.parametrize("private", [True, False])
def test_a_missing_repo_is_created(loopback_hub: Hub, monkeypatch: pytest.MonkeyPatch, private: bool) -> None:
    monkeypatch.setenv("HF_TOKEN", WRITE_TOKEN)
    prepare("lovelace-lab/tagger", private=private)
    assert loopback_hub.models["lovelace-lab/tagger"].private == private


@pytest.mark.parametrize(
    ("token", "repo", "message"),
    [
        ("hf_unknown", "ada/tagger", "HF_TOKEN is not valid: the Hub does not know it"),
        ("hf_käse", "ada/tagger", "HF_TOKEN is not valid: it contains a character that no token has"),
        (READ_TOKEN, "ada/tagger", "HF_TOKEN may only read"),
        (SCOPED_TOKEN, "ada/tagger", "fine-grained and may not write to repos of ada"),
        (WRITE_TOKEN, "babbage/tagger", "no access to the namespace babbage; expected one of ada, lovelace-lab"),
        (WRITE_TOKEN, "ada/public", "ada/public is public and TAGGER_HUB_PRIVATE=true"),
        (WRITE_TOKEN, "ada/locked", "may not write to ada/locked"),
    ],
)
def test_a_repo_that_cannot_be_pushed_to_is_an_error(
    loopback_hub: Hub, monkeypatch: pytest.MonkeyPatch, token: str, repo: str, message: str
) -> None:
    loopback_hub.models["ada/public"] = Repo("ada/public")
    loopback_hub.models["ada/locked"] = Repo("ada/locked", private=True)
    if repo == "ada/locked":
        loopback_hub.faults = [Fault("locked/auth-check", "status", times=9, status=403)]
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(InvalidInputError) as error:
        prepare(repo)
    assert message in str(error.value)
    assert token not in str(error.value)
    assert len(loopback_hub.models) == 2


def test_a_fine_grained_token_may_write_to_its_namespace(loopback_hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", SCOPED_TOKEN)
    prepare("lovelace-lab/tagger")
    assert loopback_hub.models["lovelace-lab/tagger"].private


def test_names_become_commits_and_licences(loopback_hub: Hub) -> None:
    model = loopback_hub.models["big/model"] = Repo("big/model", licence="bigscience-bloom-rail-1.0")
    first = model.commit("main", "first", {})
    second = model.commit("main", "second", {})
    assert access.resolve_revision("model", "big/model", None).commit == second.oid
    assert access.resolve_revision("model", "big/model", first.oid).commit == first.oid
    assert access.resolve_revision("model", "big/model", None).licence == "bigscience-bloom-rail-1.0"


@pytest.mark.parametrize(
    ("name", "revision", "message"),
    [
        ("big/absent", None, "the base model big/absent is not on the Hub, or is private"),
        ("big/gated", None, "the base model big/gated is gated; accept its terms"),
        ("big/model", "v9", "the base model big/model has no revision v9; check TAGGER_BASE_REVISION"),
        ("big/pickle", None, "the base model big/pickle has no weights in safetensors"),
        ("not a name", None, "TAGGER_BASE_MODEL=not a name is neither a local path that exists nor a Hub id"),
    ],
)
def test_each_unusable_base_model_has_its_own_message(
    loopback_hub: Hub, name: str, revision: str | None, message: str
) -> None:
    loopback_hub.models |= {n: Repo(n, gated=n == "big/gated") for n in ("big/model", "big/gated", "big/pickle")}
    loopback_hub.models["big/pickle"].commit("main", "weights", {"pytorch_model.bin": b""})
    with pytest.raises(InvalidInputError) as error:
        access.resolve_revision("model", name, revision)
    assert message in str(error.value)


def test_a_transient_error_of_the_hub_is_retried(loopback_hub: Hub) -> None:
    loopback_hub.models["big/model"] = Repo("big/model")
    loopback_hub.faults = [Fault("auth-check", "status", status=503), Fault("GET /api/models/big/model$", "drop")]
    assert access.resolve_revision("model", "big/model", None).commit


def test_a_hub_that_does_not_answer_is_an_input_error(loopback_hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", WRITE_TOKEN)
    monkeypatch.setattr(client, "CHECK_SECONDS", 1.5)
    started = time.monotonic()
    for pattern, check in (
        ("auth-check", lambda: access.resolve_revision("model", "big/model", None)),
        ("whoami", access.token_info),
    ):
        loopback_hub.faults = [Fault(pattern, "status", times=99, status=502)]
        with pytest.raises(InvalidInputError, match="the Hub cannot be reached .*; check the network and HF_ENDPOINT"):
            check()
    assert time.monotonic() - started < 10
