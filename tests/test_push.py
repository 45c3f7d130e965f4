"""What is published is whole, in one commit, private, and its token stays secret."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub import READ_TOKEN, WRITE_TOKEN, Hub, Repo

from job import push
from job.results import Refused
from job.settings import Hub as HubSettings
from job.settings import Settings

ROOT = Path(__file__).parents[1]
REPO = "ada/tiny-tagger"


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(b"weights" * 1000)
    (folder / "adapter_config.json").write_text("{}")
    (folder / "README.md").write_text("---\nlibrary_name: peft\n---\n# A tagger\n")
    return folder


def run_push(hub: Hub, adapter: Path, token: str | None, **variables: str) -> subprocess.CompletedProcess[str]:
    """Push in a process of its own, for huggingface_hub reads HF_ENDPOINT and HF_TOKEN when it is imported."""
    code = (
        f"from pathlib import Path; from job import push, settings; push.push(Path({str(adapter)!r}), settings.load())"
    )
    program = f"import logging; logging.basicConfig(level='INFO', format='%(message)s'); {code}"
    environ = {
        **os.environ,
        "HF_HUB_OFFLINE": "0",
        "HF_ENDPOINT": hub.url,
        "PYTHONPATH": str(ROOT),
        **variables,
        **({"HF_TOKEN": token} if token else {}),
    }
    return subprocess.run([sys.executable, "-c", program], env=environ, capture_output=True, text=True, check=False)


def test_one_commit_in_a_new_private_repo_holds_everything(loopback_hub: Hub, adapter: Path) -> None:
    done = run_push(loopback_hub, adapter, WRITE_TOKEN, TAGGER_HUB_REPO=REPO)
    assert done.returncode == 0, done.stderr
    repo = loopback_hub.repos[REPO]
    assert repo.private
    assert [commit.title for commit in repo.branches["main"]] == ["initial commit", "basic training"]
    assert repo.branches["main"][-1].files == {file.name: file.read_bytes() for file in adapter.iterdir()}
    assert f"{loopback_hub.url}/{REPO}/commit/{repo.branches['main'][-1].oid}" in done.stderr


def test_without_a_repo_name_it_is_the_user_s_and_named_after_the_base(loopback_hub: Hub, adapter: Path) -> None:
    done = run_push(loopback_hub, adapter, WRITE_TOKEN)
    assert done.returncode == 0, done.stderr
    assert list(loopback_hub.repos) == ["ada/bloomz-560m-tagger"]


def test_a_branch_is_made_when_one_is_named(loopback_hub: Hub, adapter: Path) -> None:
    done = run_push(loopback_hub, adapter, WRITE_TOKEN, TAGGER_HUB_REPO=REPO, TAGGER_HUB_REVISION="candidate")
    assert done.returncode == 0, done.stderr
    branches = loopback_hub.repos[REPO].branches
    assert [commit.title for commit in branches["main"]] == ["initial commit"]
    assert branches["candidate"][-1].title == "basic training"


def test_nothing_is_pushed_to_a_public_repo_that_was_meant_to_be_private(loopback_hub: Hub, adapter: Path) -> None:
    loopback_hub.repos[REPO] = Repo(REPO, private=False)
    done = run_push(loopback_hub, adapter, WRITE_TOKEN, TAGGER_HUB_REPO=REPO)
    assert "PushFailed" in done.stderr
    assert "is public and TAGGER_HUB_PRIVATE=true" in done.stderr
    assert len(loopback_hub.repos[REPO].branches["main"]) == 1


@pytest.mark.parametrize(
    ("token", "fail_at"),
    [(READ_TOKEN, None), ("hf_test_invalid", None), (WRITE_TOKEN, "commit/main")],
)
def test_a_push_that_fails_says_why_and_where_the_adapter_is_without_the_token(
    loopback_hub: Hub, adapter: Path, token: str, fail_at: str | None
) -> None:
    loopback_hub.repos[REPO] = Repo(REPO, private=True)
    loopback_hub.fail_at = fail_at
    done = run_push(loopback_hub, adapter, token, TAGGER_HUB_REPO=REPO)
    assert "PushFailed: publishing failed (" in done.stderr
    assert str(adapter) in done.stderr
    assert token not in done.stderr + done.stdout
    assert len(loopback_hub.repos[REPO].branches["main"]) == 1


def test_without_a_token_the_run_says_so_in_one_line(adapter: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert push.push(adapter, Settings()) is None
    assert [record.message for record in caplog.records] == [
        f"push: not pushed, for there is no token (HF_TOKEN); the adapter is in {adapter}"
    ]
    with pytest.raises(Refused, match="set HF_TOKEN"):
        push.check(HubSettings(push="always"))
