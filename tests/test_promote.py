"""`tagger-job promote` publishes a candidate or rolls back, in one commit, without loading a model."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hub import WRITE_TOKEN, Commit, Fault, Hub, Repo

from job.cli import main
from job.errors import PublishError
from job.promote import promote
from job.settings import Hub as HubSettings

ROOT = Path(__file__).parents[1]
NAME = "ada/tiny-tagger"
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def repo(monkeypatch: pytest.MonkeyPatch, loopback_hub: Hub) -> Repo:
    monkeypatch.setenv("HF_TOKEN", WRITE_TOKEN)
    monkeypatch.setenv("TAGGER_HUB_REPO", NAME)
    monkeypatch.setenv("TAGGER_HUB_RETRY_MINUTES", "0.1")
    loopback_hub.models[NAME] = Repo(NAME, private=True)
    return loopback_hub.models[NAME]


def adapter(hub: Hub, branch: str, title: str, weights: bytes, **files: bytes) -> Commit:
    """Commit an adapter with these weights to a branch of the repo."""
    hub.objects[hashlib.sha256(weights).hexdigest()] = weights
    return hub.models[NAME].commit(branch, title, {"adapter_config.json": b"{}", WEIGHTS: weights, **files})


def test_a_candidate_is_published_and_rolled_back_without_torch(
    loopback_hub: Hub, repo: Repo, capsys: pytest.CaptureFixture[str]
) -> None:
    old = adapter(loopback_hub, "main", "old", b"old")
    repo.tags["v1"] = old.oid
    repo.branches["candidate"] = list(repo.branches["main"])
    candidate = adapter(loopback_hub, "candidate", "new", b"new")
    assert main(["promote", "--revision", "candidate"]) == 0
    assert repo.branches["main"][-1].files == candidate.files

    code = (
        "import sys; from job.cli import main; assert main(['promote', '--revision', 'v1']) == 0;"
        "heavy = {'torch', 'transformers', 'peft', 'sklearn'} & set(sys.modules); assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False)
    assert done.returncode == 0
    assert repo.branches["main"][-1].files == old.files
    assert list(repo.tags) == ["v1", "v2", "v3"]
    assert repo.tags["v3"] == repo.branches["main"][-1].oid
    capsys.readouterr()
    assert main(["promote", "--revision", "v1"]) == 0, "v1 is published already"
    assert capsys.readouterr().out == f"{loopback_hub.url}/{NAME}/commit/{repo.tags['v3']} is published, as v3\n"
    assert len(repo.titles) == 4


def test_a_rollback_deletes_newer_files_but_keeps_gitattributes(loopback_hub: Hub, repo: Repo) -> None:
    first = adapter(loopback_hub, "main", "one", b"1")
    repo.commit("main", "two", {WEIGHTS: b"2", "merged/config.json": b"{}", ".gitattributes": b"lfs"})
    assert main(["promote", "--revision", first.oid]) == 0
    assert repo.branches["main"][-1].files == {"adapter_config.json": b"{}", WEIGHTS: b"1", ".gitattributes": b"lfs"}


@pytest.mark.parametrize("kind", ["lose_answer", "status"])
def test_a_promotion_with_faults_makes_one_commit(loopback_hub: Hub, repo: Repo, kind: Any) -> None:
    first = adapter(loopback_hub, "main", "one", b"1")
    adapter(loopback_hub, "main", "two", b"2")
    loopback_hub.faults = [Fault("/commit/main", kind), Fault("/tag/", kind)]
    published = promote(NAME, first.oid, HubSettings(retry_minutes=0.5))
    assert repo.titles == ["initial commit", "one", "two", f"promote {first.oid[:12]}"]
    assert published.revision == repo.branches["main"][-1].oid == repo.tags["v1"]


def test_a_commit_after_the_comparison_is_not_overwritten(loopback_hub: Hub, repo: Repo) -> None:
    compared = adapter(loopback_hub, "main", "one", b"1")
    repo.branches["candidate"] = list(repo.branches["main"])
    candidate = adapter(loopback_hub, "candidate", "new", b"new")
    adapter(loopback_hub, "main", "theirs", b"2")
    with pytest.raises(PublishError, match=r"someone has published .* \(theirs\) since; nothing was overwritten"):
        promote(NAME, candidate.oid, HubSettings(), parent_commit=compared.oid)
    assert repo.titles == ["initial commit", "one", "theirs"]
    assert repo.tags == {}


def test_nothing_is_promoted_in_a_repo_that_is_public_now(
    loopback_hub: Hub, repo: Repo, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = adapter(loopback_hub, "main", "one", b"1")
    adapter(loopback_hub, "main", "two", b"2")
    for pattern in ("whoami", f"commits/{first.oid}"):
        repo.private = True
        loopback_hub.faults = [Fault(pattern, "before", action=lambda: setattr(repo, "private", False))]
        assert main(["promote", "--revision", first.oid]) == 4
        assert f"{NAME} is public now and TAGGER_HUB_PRIVATE=true" in capsys.readouterr().err
        assert repo.titles == ["initial commit", "one", "two"]
        assert repo.tags == {}
    monkeypatch.setenv("TAGGER_HUB_PRIVATE", "false")
    assert main(["promote", "--revision", first.oid]) == 0


@pytest.mark.parametrize(
    ("revision", "message"),
    [
        ("v9", "has no revision v9; expected a branch, a tag such as v1, or a commit"),
        ("main", "at main holds no adapter: adapter_config.json, adapter_model.safetensors is missing"),
    ],
)
def test_a_revision_without_an_adapter_ends_with_2(
    repo: Repo, capsys: pytest.CaptureFixture[str], revision: str, message: str
) -> None:
    assert main(["promote", "--revision", revision]) == 2
    assert message in capsys.readouterr().err
    assert repo.titles == ["initial commit"]


def test_a_missing_repo_or_token_ends_with_2(
    loopback_hub: Hub, repo: Repo, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TAGGER_HUB_REPO", "ada/absent")
    assert main(["promote", "--revision", "main"]) == 2
    assert "ada/absent is not on the Hub" in capsys.readouterr().err
    assert "ada/absent" not in loopback_hub.models
    monkeypatch.delenv("HF_TOKEN")
    assert main(["promote", "--revision", "main"]) == 2
    assert "there is no token; set HF_TOKEN" in capsys.readouterr().err


def test_a_promotion_that_the_hub_rejects_ends_with_4(
    loopback_hub: Hub, repo: Repo, capsys: pytest.CaptureFixture[str]
) -> None:
    first = adapter(loopback_hub, "main", "one", b"1")
    repo.commit("main", "two", {"adapter_config.json": b"{ }"})
    loopback_hub.faults = [Fault("/commit/main", "status", status=403)]
    assert main(["promote", "--revision", first.oid]) == 4
    assert f"{NAME} could not be changed (" in (err := capsys.readouterr().err)
    assert "403" in err
    assert repo.titles == ["initial commit", "one", "two"]
