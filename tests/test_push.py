"""A push is one commit, made exactly once, whatever happens on the way."""

from __future__ import annotations

from pathlib import Path

import pytest
from hub import WRITE_TOKEN, Fault, Hub, Repo

from job import push
from job.errors import PublishError
from job.runs.run_folder import RunFolder
from job.settings import Hub as HubSettings

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


def test_one_commit_holds_everything_that_is_to_be_published_and_no_checkpoint(
    loopback_hub: Hub, repo: Repo, run: RunFolder
) -> None:
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


def test_another_training_of_the_run_is_another_commit(repo: Repo, run: RunFolder) -> None:
    push.push(run, NAME, SETTINGS)
    (run.adapter / "adapter_model.safetensors").write_bytes(b"better weights")
    push.push(run, NAME, SETTINGS)
    assert repo.titles == ["initial commit", "basic training", "basic training"]


def test_a_branch_is_made_when_one_is_named(repo: Repo, run: RunFolder) -> None:
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
def test_a_fault_that_passes_is_waited_out_and_leaves_one_commit(
    loopback_hub: Hub, repo: Repo, run: RunFolder, faults: list[Fault], commit_requests: int
) -> None:
    loopback_hub.faults = [Fault(**vars(fault)) for fault in faults]
    published = push.push(run, NAME, SETTINGS)
    assert repo.titles == ["initial commit", "basic training"]
    assert published.revision == repo.branches["main"][-1].oid
    assert commit_calls(loopback_hub) == commit_requests
    assert all(fault.times == 0 for fault in loopback_hub.faults)


def test_a_commit_that_came_in_between_is_kept_and_built_upon(loopback_hub: Hub, repo: Repo, run: RunFolder) -> None:
    loopback_hub.faults = [
        Fault(COMMIT, "before", action=lambda: repo.commit("main", "another writer", {"THEIRS.md": b"theirs"}))
    ]
    published = push.push(run, NAME, SETTINGS)
    assert repo.titles == ["initial commit", "another writer", "basic training"]
    assert published.revision == repo.branches["main"][-1].oid
    assert repo.branches["main"][-1].files["THEIRS.md"] == b"theirs"


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (Fault(COMMIT, "status", times=99, status=503), "503"),
        (Fault(COMMIT, "status", times=99, status=403), "403 Forbidden"),
        (Fault("validate-yaml", "status", times=99, status=400), "Invalid metadata in README.md"),
    ],
)
def test_a_push_that_fails_says_why_and_how_it_is_finished_without_the_token(
    loopback_hub: Hub, repo: Repo, run: RunFolder, fault: Fault, said: str
) -> None:
    loopback_hub.faults = [Fault(**vars(fault))]
    with pytest.raises(PublishError) as failure:
        push.push(run, NAME, HubSettings(retry_minutes=0.03))
    assert said in str(failure.value)
    assert "Finish with: TAGGER_RUN_ID=tiny-1 tagger-job push" in str(failure.value)
    assert WRITE_TOKEN not in str(failure.value)
    assert repo.titles == ["initial commit"]
    loopback_hub.faults = []
    push.push(run, NAME, SETTINGS)
    assert repo.titles == ["initial commit", "basic training"]


def test_a_token_that_is_refused_is_not_tried_again(loopback_hub: Hub, repo: Repo, run: RunFolder) -> None:
    loopback_hub.faults = [Fault(COMMIT, "status", times=99, status=401)]
    with pytest.raises(PublishError):
        push.push(run, NAME, SETTINGS)
    assert commit_calls(loopback_hub) == 1
