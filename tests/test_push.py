"""A push makes exactly one commit, whatever fails on the way."""

from __future__ import annotations

from pathlib import Path

import pytest
from hub import WRITE_TOKEN, Fault, Hub, Repo

from job import push
from job.errors import InvalidInputError, PublishError
from job.runs.run_folder import RunFolder
from job.settings import Hub as HubSettings
from job.settings import Settings

NAME = "ada/tagger"


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    run = RunFolder(tmp_path / "runs" / "tiny-1", {"timings": {}})
    run.begin("cpu")
    run.adapter.mkdir()
    (run.adapter / "adapter_model.safetensors").write_bytes(b"weights" * 1000)
    (run.adapter / "adapter_config.json").write_text("{}")
    (run.adapter / "README.md").write_text("---\nlibrary_name: peft\n---\n# A tagger\n")
    for i in range(30):
        (run.adapter / f"shard-{i}.json").write_text(str(i))
    run.write("metrics.json", "{}")
    run.write("loss.svg", "<svg/>")
    (run.checkpoints / "checkpoint-1").mkdir()
    (run.checkpoints / "checkpoint-1" / "optimizer.pt").write_bytes(b"moments")
    return run


@pytest.fixture
def repo(loopback_hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Repo:
    monkeypatch.setenv("HF_TOKEN", WRITE_TOKEN)
    loopback_hub.models[NAME] = Repo(NAME, private=True)
    return loopback_hub.models[NAME]


SETTINGS = HubSettings(retry_minutes=0.5)


def commit_calls(loopback_hub: Hub) -> int:
    return sum(request.startswith(f"POST /api/models/{NAME}/commit/") for request in loopback_hub.requests)


def hub_settings(**values: object) -> Settings:
    return Settings.model_validate({"hub": values})


def test_prepare_repo_creates_the_repo_as_set(loopback_hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", WRITE_TOKEN)
    assert push.prepare_repo(hub_settings()) == "ada/bloomz-560m-tagger"
    assert loopback_hub.models["ada/bloomz-560m-tagger"].private
    assert push.prepare_repo(hub_settings(repo="lovelace-lab/tagger", private=False)) == "lovelace-lab/tagger"
    assert not loopback_hub.models["lovelace-lab/tagger"].private
    requests = len(loopback_hub.requests)
    assert push.prepare_repo(hub_settings(push="never")) is None
    assert len(loopback_hub.requests) == requests


def test_without_a_token_nothing_is_pushed(loopback_hub: Hub) -> None:
    assert push.prepare_repo(hub_settings()) is None
    with pytest.raises(InvalidInputError, match=r"TAGGER_HUB_PUSH=always needs a token \(HF_TOKEN\)"):
        push.prepare_repo(hub_settings(push="always"))
    assert loopback_hub.requests == []


def test_one_commit_holds_all_published_files(loopback_hub: Hub, repo: Repo, run: RunFolder) -> None:
    published = push.push(run, NAME, SETTINGS)
    assert repo.titles == ["initial commit", "basic training"]
    head = repo.branches["main"][-1]
    expected = {file.name: file.read_bytes() for file in run.adapter.iterdir()}
    expected |= {name: (run.path / name).read_bytes() for name in ("metrics.json", "manifest.json", "loss.svg")}
    assert head.files == expected
    assert published.revision == head.oid
    assert published.url == f"{loopback_hub.url}/{NAME}/commit/{head.oid}"
    assert commit_calls(loopback_hub) == 1


def test_pushing_the_same_run_twice_makes_one_commit(loopback_hub: Hub, repo: Repo, run: RunFolder) -> None:
    first = push.push(run, NAME, SETTINGS)
    repo.commit("main", "someone's note", {"NOTE.md": b"hello"})
    assert push.push(run, NAME, SETTINGS) == first
    assert repo.titles == ["initial commit", "basic training", "someone's note"]


def test_new_weights_make_a_new_commit(repo: Repo, run: RunFolder) -> None:
    push.push(run, NAME, SETTINGS)
    (run.adapter / "adapter_model.safetensors").write_bytes(b"better weights")
    push.push(run, NAME, SETTINGS)
    assert repo.titles == ["initial commit", "basic training", "basic training"]


def test_a_missing_branch_is_created(repo: Repo, run: RunFolder) -> None:
    push.push(run, NAME, HubSettings(revision="candidate"))
    assert repo.titles == ["initial commit"]
    assert repo.branches["candidate"][-1].title == "basic training"


COMMIT, UPLOAD = "/commit/main", "PUT /lfs/"


@pytest.mark.parametrize(
    ("faults", "commit_requests"),
    [
        ([Fault(COMMIT, "status", times=2, status=503)], 3),
        ([Fault(COMMIT, "status", status=429, headers={"Retry-After": "1"})], 2),
        ([Fault(COMMIT, "drop")], 2),
        ([Fault(COMMIT, "lose_answer")], 1),
        ([Fault(UPLOAD, "drop")], 1),
        ([Fault(UPLOAD, "status", status=503)], 1),
        ([Fault("preupload", "status", status=500), Fault("commits/main", "status", status=502)], 1),
        ([Fault("validate-yaml", "status", status=503)], 1),
    ],
    ids=lambda value: "+".join(f"{f.kind} {f.pattern}" for f in value) if isinstance(value, list) else str(value),
)
def test_a_transient_fault_still_makes_one_commit(
    loopback_hub: Hub, repo: Repo, run: RunFolder, faults: list[Fault], commit_requests: int
) -> None:
    loopback_hub.faults = [Fault(**vars(fault)) for fault in faults]
    published = push.push(run, NAME, SETTINGS)
    assert repo.titles == ["initial commit", "basic training"]
    assert published.revision == repo.branches["main"][-1].oid
    assert commit_calls(loopback_hub) == commit_requests
    assert all(fault.times == 0 for fault in loopback_hub.faults)


def test_a_commit_made_in_between_is_kept(loopback_hub: Hub, repo: Repo, run: RunFolder) -> None:
    loopback_hub.faults = [
        Fault(COMMIT, "before", action=lambda: repo.commit("main", "another writer", {"THEIRS.md": b"theirs"}))
    ]
    published = push.push(run, NAME, SETTINGS)
    assert repo.titles == ["initial commit", "another writer", "basic training"]
    assert published.revision == repo.branches["main"][-1].oid
    assert repo.branches["main"][-1].files["THEIRS.md"] == b"theirs"


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (Fault(COMMIT, "status", times=99, status=503), "503"),
        (Fault(COMMIT, "status", times=99, status=403), "403 Forbidden"),
        (Fault("validate-yaml", "status", times=99, status=400), "Invalid metadata in README.md"),
    ],
)
def test_a_failed_push_names_the_cause_and_the_command_to_finish(
    loopback_hub: Hub, repo: Repo, run: RunFolder, fault: Fault, message: str
) -> None:
    loopback_hub.faults = [Fault(**vars(fault))]
    with pytest.raises(PublishError) as error:
        push.push(run, NAME, HubSettings(retry_minutes=0.03))
    assert message in str(error.value)
    assert "Finish with: TAGGER_RUN_ID=tiny-1 tagger-job push" in str(error.value)
    assert WRITE_TOKEN not in str(error.value)
    assert repo.titles == ["initial commit"]
    loopback_hub.faults = []
    push.push(run, NAME, SETTINGS)
    assert repo.titles == ["initial commit", "basic training"]


def test_a_rejected_token_is_not_retried(loopback_hub: Hub, repo: Repo, run: RunFolder) -> None:
    loopback_hub.faults = [Fault(COMMIT, "status", times=99, status=401)]
    with pytest.raises(PublishError):
        push.push(run, NAME, SETTINGS)
    assert commit_calls(loopback_hub) == 1
