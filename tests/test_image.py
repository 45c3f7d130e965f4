"""The Dockerfile keeps the rules that builders, Modal and security ask of it."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from job.cli import _parser
from job.errors import INTERRUPTED
from job.runs import shutdown

ROOT = Path(__file__).parents[1]
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
ENTRYPOINT = ROOT / "deploy" / "entrypoint.sh"


def instructions() -> list[str]:
    """The Dockerfile's instructions, each on one line."""
    lines = [line for line in DOCKERFILE.splitlines() if not line.lstrip().startswith("#")]
    return [line for line in re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines() if line]


def arguments(name: str) -> list[str]:
    return [line.split(maxsplit=1)[1] for line in instructions() if line.split()[0].upper() == name]


def test_the_base_is_pinned_by_tag_and_digest_and_brings_no_cuda_libraries() -> None:
    base = next(value for value in arguments("ARG") if value.startswith("BASE_IMAGE="))
    assert re.fullmatch(r"BASE_IMAGE=nvidia/cuda:[\d.]+-base-ubuntu24\.04@sha256:[0-9a-f]{64}", base)
    assert arguments("FROM") == ["${BASE_IMAGE} AS build", "${BASE_IMAGE}"]


def test_only_plain_copies_that_modal_understands() -> None:
    assert not arguments("ADD")
    for copy in arguments("COPY"):
        words = copy.split()
        flags = [word for word in words if word.startswith("--")]
        assert all(re.fullmatch(r"--(from=build|chmod=\d+)", flag) for flag in flags), copy
        assert not set(copy) & set("[]{}$*?<"), copy
        assert len(words) - len(flags) == 2, copy
    assert "type=bind" not in DOCKERFILE


def test_the_context_holds_only_what_is_copied() -> None:
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    copied = {copy.split()[-2].rstrip("/") for copy in arguments("COPY") if "--from" not in copy}
    assert rules[0] == "*"
    assert {rule[1:] for rule in rules if rule.startswith("!")} == copied
    for path in copied:
        assert (ROOT / path).exists(), path


def test_no_secret_comes_as_an_argument_or_stays_in_the_environment() -> None:
    for value in [*arguments("ARG"), *arguments("ENV"), *arguments("LABEL")]:
        assert not re.search(r"token|secret|password|key\b", value, re.IGNORECASE), value
    [prefetch] = [run for run in arguments("RUN") if "job prefetch" in run]
    assert "--mount=type=secret,id=hf_token" in prefetch


def test_dependencies_come_before_the_sources_from_the_lock_with_hashes() -> None:
    order = "\n".join(instructions())
    steps = ["COPY requirements.lock", "--require-hashes -r requirements.lock", "uv pip install --comp", "COPY job/"]
    assert [order.index(step) for step in steps] == sorted(order.index(step) for step in steps)
    last_copies = [copy for copy in arguments("COPY") if "--from=build" in copy]
    assert last_copies[0].endswith(" /opt/venv")
    assert last_copies[-1].endswith(" /app"), "an edit in job/ makes the last layer anew, and no other"


def test_uv_is_the_one_of_the_lock() -> None:
    [uv] = re.findall(r"^uv==(\S+)", (ROOT / "requirements-dev.lock").read_text(encoding="utf-8"), re.MULTILINE)
    assert re.findall(r"uv==([\d.]+)", DOCKERFILE) == [uv]


def test_the_image_runs_as_a_numeric_user_who_is_not_root_and_its_entry_point_is_no_shell() -> None:
    [user] = arguments("USER")
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user)
    assert json.loads(arguments("ENTRYPOINT")[0]) == ["/usr/local/bin/tagger-job"]
    assert json.loads(arguments("VOLUME")[0]) == ["/runs", "/cache"]


@pytest.fixture
def echo(tmp_path: Path) -> dict[str, str]:
    """An environment in which `python` and `train.sh` say how they were called."""
    for name in ("python", "train.sh"):
        program = tmp_path / name
        program.write_text(f'#!/bin/sh\necho {name} "$@"\n')
        program.chmod(0o755)
    return {"PATH": f"{tmp_path}:{os.environ['PATH']}"}


def test_the_entry_point_takes_every_command_of_the_job_and_any_other_program(echo: dict[str, str]) -> None:
    def called(*words: str) -> str:
        return subprocess.run([ENTRYPOINT, *words], env=echo, capture_output=True, text=True, check=True).stdout.strip()

    [commands] = [action for action in _parser()._actions if isinstance(action, argparse._SubParsersAction)]
    assert called() == "python -m job"
    assert called("--help") == "python -m job --help"
    for command in commands.choices:
        assert called(command, "a text") == f"python -m job {command} a text"
    assert called("train.sh", "-m", "two") == "train.sh -m two"
    assert called("python", "-m", "other") == "python -m other"


def test_kubernetes_tries_again_what_was_interrupted_and_never_what_was_refused() -> None:
    [job] = yaml.safe_load_all((ROOT / "deploy" / "k8s-job.yaml").read_text(encoding="utf-8"))
    rules = job["spec"]["podFailurePolicy"]["rules"]
    by_action = {rule["action"]: rule.get("onExitCodes", {}).get("values") for rule in rules if "onExitCodes" in rule}
    assert by_action == {"FailJob": [2, 3, 4], "Ignore": [INTERRUPTED]}
    pod = job["spec"]["template"]["spec"]
    assert pod["restartPolicy"] == "Never", "the policy is only read with it"
    assert pod["terminationGracePeriodSeconds"] > shutdown.GRACE_SECONDS
    [container] = pod["containers"]
    mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert {"/runs", "/cache", "/tmp", "/dev/shm", "/run/secrets"} == mounts
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert container["securityContext"]["readOnlyRootFilesystem"]


def test_compose_waits_for_the_interruption_and_mounts_both_volumes() -> None:
    [service] = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))["services"].values()
    assert int(service["stop_grace_period"].removesuffix("s")) > shutdown.GRACE_SECONDS
    assert {volume.partition(":")[2] for volume in service["volumes"]} == {"/runs", "/cache"}
    assert service["read_only"] and any(place.startswith("/tmp") for place in service["tmpfs"])
