"""The rules that Dockerfile, entry point and deployment files have to keep for builders, Modal and security."""

from __future__ import annotations

import ipaddress
import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from job.cli import COMMANDS
from job.distributed.place import machines
from job.errors import GATE_REJECTED, INTERRUPTED, INVALID_INPUT, PUBLISH_FAILED
from job.runs import provenance, shutdown

ROOT = Path(__file__).parents[1]
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
ENTRYPOINT = ROOT / "deploy" / "entrypoint.sh"


def instructions() -> list[str]:
    """Return the instructions of the Dockerfile, each on one line."""
    lines = [line for line in DOCKERFILE.splitlines() if not line.lstrip().startswith("#")]
    return [line for line in re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines() if line]


def arguments(name: str) -> list[str]:
    return [line.split(maxsplit=1)[1] for line in instructions() if line.split()[0].upper() == name]


def test_the_base_image_is_pinned_and_has_no_cuda_libraries() -> None:
    base = next(value for value in arguments("ARG") if value.startswith("BASE_IMAGE="))
    assert re.fullmatch(r"BASE_IMAGE=nvidia/cuda:[\d.]+-base-ubuntu24\.04@sha256:[0-9a-f]{64}", base)
    assert arguments("FROM") == ["${BASE_IMAGE} AS build", "${BASE_IMAGE}"]


def test_modal_understands_every_copy_instruction() -> None:
    assert not arguments("ADD")
    for copy in arguments("COPY"):
        words = copy.split()
        flags = [word for word in words if word.startswith("--")]
        assert all(re.fullmatch(r"--(from=build|chmod=\d+)", flag) for flag in flags), copy
        assert not set(copy) & set("[]{}$*?<"), copy
        assert len(words) - len(flags) == 2, copy
    assert "type=bind" not in DOCKERFILE


def test_the_build_context_has_only_what_is_copied() -> None:
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    copied = {copy.split()[-2].rstrip("/") for copy in arguments("COPY") if "--from" not in copy}
    assert rules[0] == "*"
    assert {rule[1:] for rule in rules if rule.startswith("!")} == copied
    for path in copied:
        assert (ROOT / path).exists(), path


def test_no_secret_is_an_argument_or_in_the_environment() -> None:
    for value in [*arguments("ARG"), *arguments("ENV"), *arguments("LABEL")]:
        assert not re.search(r"token|secret|password|key\b", value, re.IGNORECASE), value
    [prefetch] = [run for run in arguments("RUN") if "job prefetch" in run]
    assert "--mount=type=secret,id=hf_token" in prefetch


def test_a_run_in_the_image_knows_the_commit_of_its_code() -> None:
    order = "\n".join(instructions())
    assert f"{provenance.IMAGE_REVISION}=$REVISION" in arguments("ENV")
    assert order.rindex("ARG REVISION") < order.index("ENV IMAGE_REVISION"), (
        "the argument has a value only after its line"
    )


def test_dependencies_are_installed_before_the_sources() -> None:
    order = "\n".join(instructions())
    steps = [
        "COPY requirements.lock",
        "--require-hashes -r requirements.lock",
        "-r requirements-torch.lock",
        "COPY job/",
    ]
    assert [order.index(step) for step in steps] == sorted(order.index(step) for step in steps)
    last_copies = [copy for copy in arguments("COPY") if "--from=build" in copy]
    assert last_copies[0].endswith(" /opt/venv")
    assert last_copies[-1].endswith(" /app"), "an edit in job/ changes only the last layer"


def locked(name: str, *, lock: str = "requirements-*.lock") -> set[str]:
    """Return the versions of a package in the locks."""
    texts = [path.read_text(encoding="utf-8") for path in ROOT.glob(lock)]
    return {version for text in texts for version in re.findall(rf"^{name}==(\S+)", text, re.MULTILINE)}


def test_what_is_installed_has_one_version_and_its_hashes() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for name in ("uv", "torch"):
        assert locked(name) == set(re.findall(rf'"{name}==([\d.]+)"', project)), name
    for lock in ROOT.glob("requirements*.lock"):
        for entry in re.split(r"\n(?=[a-z])", lock.read_text(encoding="utf-8").strip()):
            assert re.fullmatch(r"[\w.-]+==[^\n]*\\\n(\s+--hash=sha256:[0-9a-f]{64}( \\\n|$))+", entry), entry
    installs = [line for line in DOCKERFILE.splitlines() if "pip install" in line and "apt-get" not in line]
    by_version = [line for line in installs if "--require-hashes" not in line]
    assert len(installs) == 4
    assert len(by_version) == 1 and "torch==" in by_version[0], "builds of torch from other indexes have other hashes"


def test_images_of_others_are_named_by_digest() -> None:
    """The job's own image is named by version, which tests/test_deploy.py checks."""
    deployed = [*(ROOT / "deploy").glob("*.y*ml"), *(ROOT / ".github").rglob("*.yml")]
    named = [
        line.strip().removeprefix("- ")
        for file in deployed
        for line in re.findall(r"^\s*(?:- )?image: .*$", file.read_text(), re.MULTILINE)
    ]
    assert len(named) > 4
    for line in (line for line in named if "/tagger-job:" not in line):
        assert re.fullmatch(r"image: \S+@sha256:[0-9a-f]{64}", line), line
    [service] = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))["services"].values()
    assert service["build"] == "." and service["pull_policy"] == "build"


def test_the_image_runs_as_a_numeric_user_and_without_a_shell() -> None:
    [user] = arguments("USER")
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user)
    assert json.loads(arguments("ENTRYPOINT")[0]) == ["/usr/local/bin/tagger-job"]
    assert json.loads(arguments("VOLUME")[0]) == ["/runs", "/cache"]


@pytest.fixture
def echo(tmp_path: Path) -> dict[str, str]:
    """Return an environment in which `python` and `train.sh` print their arguments."""
    for name in ("python", "train.sh"):
        program = tmp_path / name
        program.write_text(f'#!/bin/sh\necho {name} "$@"\n')
        program.chmod(0o755)
    return {"PATH": f"{tmp_path}:{os.environ['PATH']}"}


def test_the_entry_point_runs_every_command_and_any_program(echo: dict[str, str]) -> None:
    def called(*words: str) -> str:
        return subprocess.run([ENTRYPOINT, *words], env=echo, capture_output=True, text=True, check=True).stdout.strip()

    assert called() == "python -m job"
    assert called("--help") == "python -m job --help"
    for command in COMMANDS:
        assert called(command, "a text") == f"python -m job {command} a text"
    assert called("train.sh", "-m", "two") == "train.sh -m two"
    assert called("python", "-m", "other") == "python -m other"


def kubernetes(file: str = "k8s-job.yaml") -> dict[str, Any]:
    """Return the objects of a file in deploy/, by kind."""
    objects = yaml.safe_load_all((ROOT / "deploy" / file).read_text(encoding="utf-8"))
    return {entry["kind"]: entry for entry in objects}


@pytest.mark.parametrize("file", ["k8s-job.yaml", "k8s-tag.yaml", "k8s-two-nodes.yaml"])
def test_kubernetes_limits_the_time_and_every_volume_of_a_job(file: str) -> None:
    job = kubernetes(file)["Job"]["spec"]
    assert job["activeDeadlineSeconds"] > 0 and job["ttlSecondsAfterFinished"] > 0
    claims = {
        claim["metadata"]["name"]: claim["spec"]["resources"]["limits"]["storage"]
        for claim in yaml.safe_load_all((ROOT / "deploy" / "k8s-volumes.yaml").read_text(encoding="utf-8"))
    }
    for volume in job["template"]["spec"]["volumes"]:
        if claim := volume.get("persistentVolumeClaim"):
            assert claims[claim["claimName"]]
        elif "emptyDir" in volume:
            assert volume["emptyDir"]["sizeLimit"], volume
        else:
            assert volume["secret"]["defaultMode"] == 0o400
    [container] = job["template"]["spec"]["containers"]
    assert {"memory", "ephemeral-storage"} <= container["resources"]["limits"].keys()


@pytest.mark.parametrize("file", ["k8s-job.yaml", "k8s-tag.yaml"])
def test_kubernetes_lets_a_job_connect_to_the_hub_and_nothing_to_it(file: str) -> None:
    objects = kubernetes(file)
    policy = objects["NetworkPolicy"]["spec"]
    assert objects["Job"]["spec"]["template"]["metadata"]["labels"] == policy["podSelector"]["matchLabels"]
    assert (set(policy["policyTypes"]), policy["ingress"]) == ({"Ingress", "Egress"}, [])
    assert {port["port"] for rule in policy["egress"] for port in rule["ports"]} == {53, 443}
    [https] = [rule for rule in policy["egress"] if rule["ports"] == [{"port": 443, "protocol": "TCP"}]]
    for block in https["to"]:  # the address of a cloud's metadata service is not among them
        blocked = [ipaddress.ip_network(cidr) for cidr in block["ipBlock"]["except"]]
        private = {4: "169.254.169.254", 6: "fd00:ec2::254"}[blocked[0].version]
        assert any(ipaddress.ip_address(private) in network for network in blocked)


@pytest.mark.parametrize("file", ["k8s-job.yaml", "k8s-two-nodes.yaml"])
def test_kubernetes_retries_interruptions_but_no_refusals(file: str) -> None:
    job = kubernetes(file)["Job"]
    rules = job["spec"]["podFailurePolicy"]["rules"]
    by_action = {rule["action"]: rule.get("onExitCodes", {}).get("values") for rule in rules if "onExitCodes" in rule}
    assert by_action == {
        "FailJob": [INVALID_INPUT, GATE_REJECTED, PUBLISH_FAILED],
        "Ignore": [INTERRUPTED],
    }
    pod = job["spec"]["template"]["spec"]
    assert pod["restartPolicy"] == "Never", "Kubernetes requires it for a pod failure policy"
    assert pod["terminationGracePeriodSeconds"] > shutdown.GRACE_SECONDS
    [container] = pod["containers"]
    mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert {"/runs", "/cache", "/tmp", "/dev/shm", "/run/secrets"} == mounts
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert container["securityContext"]["readOnlyRootFilesystem"]


def test_kubernetes_starts_the_job_on_two_machines_that_find_each_other() -> None:
    objects = kubernetes("k8s-two-nodes.yaml")
    service, policy, job = objects["Service"], objects["NetworkPolicy"]["spec"], objects["Job"]
    pod = job["spec"]["template"]["spec"]
    variables = {entry["name"]: entry["value"] for entry in pod["containers"][0]["env"]}
    found = [machines(variables | {"JOB_COMPLETION_INDEX": str(index)}) for index in range(job["spec"]["completions"])]
    name = job["metadata"]["name"]
    assert [(each.count, each.number, each.address) for each in found] == [
        (2, 0, f"{name}-0.{pod['subdomain']}"),
        (2, 1, f"{name}-0.{pod['subdomain']}"),
    ]
    assert (service["metadata"]["name"], service["spec"]["clusterIP"]) == (pod["subdomain"], "None")
    labels = job["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["selector"] == labels == policy["podSelector"]["matchLabels"]
    assert policy["ingress"] == [{"from": [{"podSelector": {"matchLabels": labels}}]}], "only from each other"


def test_compose_waits_for_an_interruption_and_mounts_volumes() -> None:
    [service] = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))["services"].values()
    assert int(service["stop_grace_period"].removesuffix("s")) > shutdown.GRACE_SECONDS
    assert {volume.partition(":")[2] for volume in service["volumes"]} == {"/runs", "/cache"}
    assert service["read_only"] and any(path.startswith("/tmp") for path in service["tmpfs"])
