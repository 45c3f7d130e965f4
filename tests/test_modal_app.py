"""The app on Modal: its real command line and its real containers, against a local server for Modal."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from conftest import make_llama, make_llama_tokenizer, make_settings
from hub import WRITE_TOKEN, Hub, Server
from modal_proto import api_pb2
from modal_server import MODAL, Loss, Modal, caller
from tiny_run import REPO, TINY_ON_THE_HUB, fill_hub

from job import pipeline
from job.cloud import modal_launcher

ROOT = Path(__file__).parents[1]
APP = str(ROOT / "modal_app.py")
RECIPE = "".join(f"{name}={value}\n" for name, value in TINY_ON_THE_HUB.items())


@dataclass
class World:
    """Modal, the Hub that its containers use, a run there as the caller saw it, and the requests to Modal."""

    modal: Modal
    hub: Hub
    home: Path
    run: subprocess.CompletedProcess[str]
    requests: list[tuple[str, Any]]

    @property
    def outcome(self) -> dict[str, Any]:
        return json.loads((self.home / "outcome.json").read_text())

    def requested(self, name: str) -> list[Any]:
        return [request for called, request in self.requests if called == name]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, object]]) -> World:
    """Run the job once; it is preempted after its second step, and its time is up after its fourth."""
    home = tmp_path_factory.mktemp("modal")
    make_llama(make_llama_tokenizer(rows), home / "llama")
    server = Server()
    hub = server.fresh()
    fill_hub(hub, home / "llama")
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


def test_an_interrupted_run_ends_like_an_uninterrupted_one(world: World, tmp_path: Path) -> None:
    assert world.modal.losses == [], "both signals were sent"
    logs = [(world.home / f"ta-{attempt}.log").read_text() for attempt in range(3)]
    assert "after step" not in logs[0]
    assert "after step 2 of 6" in logs[1], "only the commit after the checkpoint is left"
    assert "after step 4 of 6" in logs[2]
    assert [name for name, _ in world.requests].count("FunctionPutOutputs") == 2, (
        "the end of the time, and the end of the job"
    )
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


def test_modal_gets_gpus_times_retries_volumes_and_secrets(world: World) -> None:
    functions = {}
    for request in world.requested("FunctionCreate"):
        gpus = [each.function.resources.gpu_config for each in request.function_data.ranked_functions]
        definition = request.function_data.ranked_functions[0].function
        functions[definition.function_name] = definition
        assert [(gpu.gpu_type, gpu.count) for gpu in gpus] == [("A100", 2), ("L4", 1)]
        resources = definition.resources
        assert (resources.milli_cpu, resources.memory_mb) == (4000, 8192), "for a process on each of two GPUs"
        assert (definition.timeout_secs, definition.startup_timeout_secs) == (5400, 1800)
        assert definition.retry_policy.retries == 3
        mounts = {each.mount_path: each.volume_id for each in definition.volume_mounts}
        assert mounts == {"/runs": "vo-my-runs", "/cache": "vo-tagger-cache"}
        assert "st-mine" in definition.secret_ids
    assert {name: each.single_use_containers for name, each in functions.items()} == {
        "perform": True,
        "scheduled": True,
        "tag_texts": False,
        "tag_parts": True,
    }
    assert {name: len(each.secret_ids) for name, each in functions.items()} == {
        "perform": 1,
        "scheduled": 2,
        "tag_texts": 1,
        "tag_parts": 1,
    }
    [secret] = [request for request in world.requested("SecretGetOrCreate") if request.deployment_name]
    assert (secret.deployment_name, list(secret.required_keys)) == ("mine", ["HF_TOKEN"])


def test_the_image_is_the_dockerfile_without_entry_point(world: World) -> None:
    layers = [list(request.image.dockerfile_commands) for request in world.requested("ImageGetOrCreate")]
    assert layers[0] == (ROOT / "Dockerfile").read_text().split("\n")
    assert [layer[-1] for layer in layers[-2:]] == ["USER root", "ENTRYPOINT []"]
    sent = {file.filename for request in world.requested("MountGetOrCreate") for file in request.files}
    assert {
        "/requirements.lock",
        "/requirements-build.lock",
        "/requirements-torch.lock",
        "/job/training/checkpoints.py",
        "/deploy/entrypoint.sh",
        "/root/modal_app.py",
    } <= sent
    assert not [name for name in sent if "test" in name or name.endswith("/.env") or ".git" in name]


def test_the_volumes_are_mounted_where_the_image_expects_them() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    assert f"TAGGER_RUN_DIR={modal_launcher.RUNS}\n" in dockerfile
    assert f"HF_HOME={modal_launcher.CACHE} " in dockerfile


def test_no_secret_of_the_caller_is_sent(world: World) -> None:
    sent = b"".join(request.SerializeToString() for _, request in world.requests)
    assert b"TAGGER_TRAIN_MAX_STEPS" in sent
    assert b"hf_of_the_caller" not in sent


def test_status_lists_the_runs_and_fetch_downloads_one(world: World) -> None:
    volume = {"TAGGER_MODAL_RUNS_VOLUME": "my-runs"}
    run_id = world.outcome["run_id"]
    (world.modal.committed("vo-my-runs") / "data").mkdir()
    status = world.modal.run("status", **volume)
    assert status.returncode == 0, status.stderr
    assert f"{run_id}: complete, started 20" in status.stdout
    assert "step 6 of 6, loss " in status.stdout
    assert f"the adapter is at {world.hub.url}/{REPO}/commit/" in status.stdout

    fetched = world.modal.run("fetch", "--run-id", run_id, "--to", "fetched", **volume)
    assert fetched.returncode == 0, fetched.stderr
    there, here = world.modal.committed("vo-my-runs") / run_id, world.home / "fetched" / run_id
    files = {str(path.relative_to(there)): path.read_bytes() for path in there.rglob("*") if path.is_file()}
    assert {str(path.relative_to(here)): path.read_bytes() for path in here.rglob("*") if path.is_file()} == files

    missing = world.modal.run("status", "--run-id", "nothing", **volume)
    assert missing.returncode == 2
    assert "error: the volume has no manifest.json of a run nothing" in missing.stderr


def test_a_file_is_tagged_in_order_though_a_container_dies(world: World) -> None:
    texts = [f"text number {i}" for i in range(23)]
    volume = world.modal.committed("vo-tagger-runs")
    (volume / "texts.jsonl").write_text("".join(json.dumps({"quote": text, "n": 1}) + "\n" for text in texts))
    world.modal.losses = [Loss(signal.SIGKILL, folder="tagged.csv/_parts/parts.json")]
    words = [
        "--recipe",
        "tiny.env",
        "--input",
        "/runs/texts.jsonl",
        "--output",
        "/runs/tagged.csv/",
        "--containers",
        "2",
    ]
    before = len(world.modal.containers)
    tagged = world.modal.run("tag", *words, TAGGER_TAG_PART_ROWS="5")
    assert tagged.returncode == 0, (
        tagged.stdout + tagged.stderr + "".join(log.read_text() for log in world.home.glob("ta-*.log"))
    )
    assert world.modal.losses == [], "a container was killed"
    assert len(world.modal.containers) > before + 1
    parts = sorted((world.modal.committed("vo-tagger-runs") / "tagged.csv").glob("part-*.csv"))
    table = list(csv.DictReader(line for part in parts for line in part.read_text().splitlines()))
    assert [row["quote"] for row in table] == texts
    assert list(table[0]) == ["quote", "n", "tags", "confidences", "error"]
    assert "rows: 23, " in tagged.stdout
    assert "GPU: " in tagged.stdout
    sent = b"".join(request.SerializeToString() for name, request in world.modal.requests if "Function" in name)
    assert b"text number" not in sent, "nothing passes through the caller"


def test_an_error_in_the_container_is_reported_not_retried(world: World) -> None:
    before = len(world.modal.containers)
    refused = world.modal.run("", "--recipe", "tiny.env", "--dataset", "tiny/nothing", "--output", "no.json")
    assert refused.returncode == 2, refused.stdout + refused.stderr
    assert "error: the data set tiny/nothing is not on the Hub" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert len(world.modal.containers) == before + 1
    assert json.loads((world.home / "no.json").read_text())["exit_code"] == 2


def test_sample_without_an_adapter_is_refused(world: World) -> None:
    refused = world.modal.run("sample", "--text", "a song", "--run-id", "none")
    assert refused.returncode == 2, refused.stdout + refused.stderr
    assert "error: there is no trained adapter in" in refused.stderr


def test_a_deployed_app_retrains_with_the_settings_of_deployment(world: World) -> None:
    mine = {"TAGGER_TRAIN_MAX_STEPS": "6", "TAGGER_MODAL_CRON": "5 4 * * 0", "TAGGER_RUN_DIR": "/home/ada/runs"}
    deployed = world.modal.run("deploy", **{**TINY_ON_THE_HUB, **mine})
    assert deployed.returncode == 0, deployed.stdout + deployed.stderr
    schedules = {
        request.function_data.function_name: request.function_data.schedule.cron.cron_string
        for request in world.modal.requested("FunctionCreate")
    }
    assert "TAGGER_RUN_DIR" not in world.modal.app_secret
    assert schedules == {"perform": "", "tag_texts": "", "tag_parts": "", "scheduled": "5 4 * * 0"}
    outcome = world.modal.trigger("scheduled")
    assert outcome["exit_code"] == 0
    assert outcome["message"].startswith(
        "nothing to do: ada/tiny-tagger was published with the same base model, data and settings"
    )


def test_invalid_settings_are_refused_before_any_request(tmp_path: Path) -> None:
    modal = Modal(tmp_path, {})
    bad = {"TAGGER_LORA_R": "0", "TAGGER_TRAIN_STEPS": "9", "TAGGER_MODAL_TIMEOUT_HOURS": "25"}
    refused = modal.run("", "--gpu", "H1000", **bad)
    assert (refused.returncode, refused.stdout) == (2, "")
    lines = refused.stderr.splitlines()
    assert all(line.startswith("error: ") for line in lines), refused.stderr
    for message in (
        "TAGGER_LORA_R=0: expected",
        "TAGGER_TRAIN_STEPS is not a setting; did you mean TAGGER_TRAIN_MAX_STEPS?",
        "TAGGER_MODAL_TIMEOUT_HOURS=25: expected a value of at most 24.",
        "TAGGER_MODAL_GPU=H1000: expected T4, L4, ",
    ):
        assert sum(message in line for line in lines) == 1, message
    (tmp_path / "folder.env").mkdir()
    for recipe in ("nowhere.env", "folder.env"):
        refused = modal.run("retrain", "--recipe", recipe)
        assert refused.returncode == 2
        assert refused.stderr.startswith(f"error: --recipe={recipe} is neither a shipped recipe")
    assert modal.requests == []


@pytest.mark.parametrize(
    ("signalled", "detach"), [(signal.SIGINT, []), (signal.SIGINT, ["--detach"]), (signal.SIGTERM, [])]
)
def test_a_signal_to_the_caller_ends_with_75_and_writes_no_outcome(
    tmp_path: Path, signalled: signal.Signals, detach: list[str]
) -> None:
    modal = Modal(tmp_path, {})
    modal.has_gpus = False
    words = [MODAL, "run", *detach, str(modal.checkout / "modal_app.py"), "--output", "outcome.json"]
    environ = {**modal.token, "PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    with subprocess.Popen(words, env=environ, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        while not modal.requested("FunctionGetOutputs"):
            time.sleep(0.05)
            assert process.poll() is None
        process.send_signal(signalled)
        assert process.wait(timeout=30) == 75
        assert process.stderr is not None
        assert b"the same command resumes from what is on the volume" in process.stderr.read()
    [app] = modal.requested("AppCreate")
    assert app.app_state == (api_pb2.APP_STATE_DETACHED if detach else api_pb2.APP_STATE_EPHEMERAL)
    assert not (tmp_path / "outcome.json").exists()


def test_without_a_token_modal_reports_it(tmp_path: Path) -> None:
    refused = caller(tmp_path, "run", APP, "--max-steps", "20")
    assert refused.returncode == 1
    assert refused.stderr.startswith("Error: Token missing. Could not authenticate client.")


def test_the_app_imports_without_token_network_or_torch(tmp_path: Path) -> None:
    """Its declarations can be read from it, too."""
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


def test_the_image_of_the_job_does_not_contain_modal() -> None:
    assert "\nmodal==" not in (ROOT / "requirements.lock").read_text()
