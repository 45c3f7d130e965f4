"""Each launch file in deploy/ starts the job with settings that it accepts, and reacts to its exit codes.

`make manifests` and `make launch-files` check the form of the files with the parsers of their platforms.
"""

from __future__ import annotations

import fnmatch
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from typing import Any

import pytest
import yaml

from job import __version__
from job.distributed.place import machines
from job.errors import CRASHED, DONE, EXIT_CODES, GATE_REJECTED, INTERRUPTED, INVALID_INPUT, PUBLISH_FAILED
from job.runs import shutdown
from job.tagging import shards

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
RELEASE = re.sub(r"\.dev\d+$", "", __version__)
"""The version that the files on this commit will be released with, or were."""
REFUSALS = (INVALID_INPUT, GATE_REJECTED, PUBLISH_FAILED)
TAGGING = {"TAGGER_HUB_REPO": "owner/name", "TAGGER_TAG_INPUT": "s3://in/a/", "TAGGER_TAG_OUTPUT": "s3://out/b/"}


def text(name: str) -> str:
    return (DEPLOY / name).read_text(encoding="utf-8")


def objects(name: str) -> dict[str, Any]:
    """Return the objects of a file of Kubernetes, by kind."""
    return {entry["kind"]: entry for entry in yaml.safe_load_all(text(name))}


@dataclass
class Start:
    """How a platform starts the job: with which arguments and variables."""

    arguments: list[str]
    environ: dict[str, str]


PROGRAM = """#!/bin/sh
{ echo "args=$*"; env; echo end=; } >> "$SEEN"
n=$(grep -c ^args= "$SEEN")
set -- $CODES
[ "$n" -gt $# ] || shift $((n - 1))
exit "$1"
"""
"""A job that notes its arguments and variables, and ends with the next code of CODES."""
DOCKER = """#!/bin/bash
echo "$*" > "$SEEN.docker"
names=()
while [[ $1 != ghcr.io/* ]]; do
    [ "$1" != --env ] || names+=("$2=${!2}")
    shift
done
shift
exec env --ignore-environment PATH="$PATH" SEEN="$SEEN" CODES="$CODES" "${names[@]}" tagger-job "$@"
"""
"""Starts the job with the variables that it is given by name, as a container has no others."""
SRUN = """#!/bin/bash
most=0
for ((SLURM_NODEID = 0; SLURM_NODEID < SLURM_JOB_NUM_NODES; SLURM_NODEID++)); do
    export SLURM_NODEID
    "$@" || { code=$?; [ $code -lt $most ] || most=$code; }
done
exit $most
"""
SCONTROL = """#!/bin/sh
case "$1" in
show) printf 'node7\\nnode8\\n' ;;
requeue) echo "$2" >> "$SEEN.requeued" ;;
esac
"""


class Platform:
    """A folder of programs that stand for those of a scheduler; scripts of the launch files run in it."""

    def __init__(self, folder: Path) -> None:
        self.seen, self._bin = folder / "seen", folder / "bin"
        self._bin.mkdir()
        programs = {"tagger-job": PROGRAM, "docker": DOCKER, "srun": SRUN, "scontrol": SCONTROL}
        for name, code in {**programs, "sleep": "#!/bin/sh\n"}.items():
            (self._bin / name).write_text(code)
            (self._bin / name).chmod(0o755)

    def run(self, *command: str, codes: str = "0", **environ: str) -> int:
        """Run a script of a launch file, with jobs that end with these codes, and return its own."""
        variables = {"PATH": f"{self._bin}:{os.environ['PATH']}", "SEEN": str(self.seen), "CODES": codes}
        self.seen.unlink(missing_ok=True)
        done = subprocess.run(command, env={**variables, **environ}, capture_output=True, text=True, check=False)
        assert not done.stderr, done.stderr
        return done.returncode

    @property
    def starts(self) -> list[Start]:
        """The jobs that the script has started."""
        found = []
        for block in self.seen.read_text().split("end=\n")[:-1]:
            variables = dict(line.split("=", 1) for line in block.splitlines() if "=" in line)
            found.append(Start(variables.pop("args").split(), variables))
        return found

    @property
    def requeued(self) -> list[str]:
        file = self.seen.with_suffix(".requeued")
        return file.read_text().split() if file.exists() else []


@pytest.fixture
def platform(tmp_path: Path) -> Platform:
    return Platform(tmp_path)


def run_skypilot(platform: Platform, codes: str = "0", **environ: str) -> int:
    task = yaml.safe_load(text("skypilot.yaml"))
    return platform.run("bash", "-c", task["run"], codes=codes, **{**task["envs"], "HF_TOKEN": "hf_x", **environ})


def run_dstack(platform: Platform, codes: str = "0", **environ: str) -> int:
    task = yaml.safe_load(text("dstack.yaml"))
    given = {"DSTACK_NODES_NUM": "1", "DSTACK_NODE_RANK": "0", "DSTACK_MASTER_NODE_IP": "10.0.0.7"}
    commands = " && ".join(task["commands"])  # as dstack joins them
    return platform.run("sh", "-c", commands, codes=codes, **{**task["env"], **given, **environ})


def run_slurm(platform: Platform, codes: str = "0", script: str = "slurm.sh", **environ: str) -> int:
    given = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "node[7-8]", **environ}
    return platform.run(str(DEPLOY / script), codes=codes, **given)


def of_container(container: dict[str, Any]) -> Start:
    """Return how a container of Kubernetes, or of Cloud Run, which uses the same words, is started."""
    environ = {entry["name"]: entry["value"] for entry in container.get("env", []) if "value" in entry}
    return Start(container.get("args", []), environ)


def inner_job(name: str) -> dict[str, Any]:
    """Return the spec of the Job in a JobSet, or in the TrainingRuntime of a TrainJob."""
    found = objects(name)
    holder = found["JobSet"] if "JobSet" in found else found["TrainingRuntime"]["spec"]["template"]
    [replicated] = holder["spec"]["replicatedJobs"]
    spec: dict[str, Any] = replicated["template"]["spec"]
    return spec


def start_of(name: str, platform: Platform) -> Start:
    """Return how the platform of a file starts the job."""
    if name in (runs := {"skypilot.yaml": run_skypilot, "dstack.yaml": run_dstack, "slurm.sh": run_slurm}):
        assert runs[name](platform) == DONE
        [start] = platform.starts
        return start
    if name == "aws-batch.json":
        container = json.loads(text(name))["containerProperties"]
        return Start(container["command"], {entry["name"]: entry["value"] for entry in container["environment"]})
    if name == "cloud-run.yaml":
        return of_container(objects(name)["Job"]["spec"]["template"]["spec"]["template"]["spec"]["containers"][0])
    if name == "trainjob.yaml":
        return of_container(objects(name)["TrainJob"]["spec"]["trainer"])
    job = inner_job(name) if name == "jobset.yaml" else objects(name)["Job"]["spec"]
    return of_container(job["template"]["spec"]["containers"][0])


FILES = (
    *("skypilot.yaml", "dstack.yaml", "trainjob.yaml", "jobset.yaml", "aws-batch.json", "cloud-run.yaml", "slurm.sh"),
    *("k8s-job.yaml", "k8s-tag.yaml", "k8s-two-nodes.yaml"),
)
WITHOUT_A_DISK = FILES[:6]
"""The platforms on which no disk survives an interruption."""


@pytest.mark.parametrize("name", FILES)
def test_the_job_accepts_the_settings_of_a_launch_file(name: str, platform: Platform) -> None:
    start = start_of(name, platform)
    assert start.arguments in (["run"], ["tag"], [])
    given = {key: value for key, value in start.environ.items() if key.startswith("TAGGER_")}
    environ = {**{key: os.environ[key] for key in ("PATH", "HF_HOME")}, "PYTHONPATH": str(ROOT), **given}
    command = [sys.executable, "-m", "job", "settings"]
    done = subprocess.run(command, env=environ, cwd=platform.seen.parent, capture_output=True, text=True, check=False)
    assert done.returncode == DONE, done.stderr
    for variable, value in given.items():
        assert re.search(rf"^{variable}={re.escape(value)}\s", done.stdout, re.MULTILINE), done.stdout
    if start.arguments != ["tag"]:
        assert given["TAGGER_RUN_ID"], "an id that is made from the data may differ at the next attempt"
    assert ("TAGGER_RUN_STORE" in given) == (name in WITHOUT_A_DISK)


def test_every_launch_file_names_the_image_of_this_version() -> None:
    named = {path.name: re.findall(r"[\w./-]+/tagger-job[:@][\w.:]+", path.read_text()) for path in DEPLOY.iterdir()}
    found = {name: set(images) for name, images in named.items() if images}
    assert found.keys() == {*FILES, "slurm-tag.sh"}
    for name, images in found.items():
        assert all(image.endswith(f"/owner/tagger-job:{RELEASE}") for image in images), (name, images)


def again_on_aws(code: int) -> bool:
    """Decide as AWS Batch does: the first condition that matches, and a retry if none does."""
    strategy = json.loads(text("aws-batch.json"))["retryStrategy"]
    assert 1 < strategy["attempts"] <= 10 and len(strategy["evaluateOnExit"]) <= 5, "the limits of AWS Batch"
    reason = "Essential container in task exited"
    for rule in strategy["evaluateOnExit"]:
        patterns = {rule.get("onExitCode", "*"): str(code), rule.get("onStatusReason", "*"): reason}
        if all(fnmatch.fnmatchcase(value, pattern) for pattern, value in patterns.items()):
            return bool(rule["action"] == "RETRY")
    return True


def again_on_skypilot(code: int) -> bool:
    recovery = yaml.safe_load(text("skypilot.yaml"))["resources"]["job_recovery"]
    return code in recovery["recover_on_exit_codes"] or recovery["max_restarts_on_errors"] > 0


def again_on_kubernetes(job: dict[str, Any], code: int) -> bool:
    """Decide as the Job controller does: the first rule that matches, and the backoff limit if none does."""
    container = job["template"]["spec"]["containers"][0]["name"]
    for rule in job["podFailurePolicy"]["rules"]:
        wanted = rule.get("onExitCodes")
        if wanted and wanted["containerName"] == container and code in wanted["values"]:
            return bool(rule["action"] != "FailJob")
    return bool(job["backoffLimit"] > 0)


SCHEDULERS: dict[str, Callable[[int], bool]] = {
    "aws-batch.json": again_on_aws,
    "skypilot.yaml": again_on_skypilot,
    "jobset.yaml": lambda code: again_on_kubernetes(inner_job("jobset.yaml"), code),
    "trainjob.yaml": lambda code: again_on_kubernetes(inner_job("trainjob.yaml"), code),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_resumes_interruptions_and_repeats_no_refusal(name: str) -> None:
    decisions = {code: SCHEDULERS[name](code) for code in EXIT_CODES if code != DONE}
    crashed = decisions.pop(CRASHED)
    assert decisions == {INTERRUPTED: True, **dict.fromkeys(REFUSALS, False)}
    assert crashed == (name != "skypilot.yaml"), "SkyPilot has one limit for all codes"


def test_aws_batch_replaces_a_spot_machine_that_is_reclaimed() -> None:
    rules = json.loads(text("aws-batch.json"))["retryStrategy"]["evaluateOnExit"]
    reason = "Host EC2 (instance i-0123456789abcdef0) terminated."
    [rule] = [rule for rule in rules if fnmatch.fnmatchcase(reason, rule.get("onStatusReason", "-"))]
    assert rule == {"onStatusReason": "Host EC2*", "action": "RETRY"}


@pytest.mark.parametrize("code", EXIT_CODES)
def test_skypilot_sees_the_exit_code_of_the_job(platform: Platform, code: int) -> None:
    assert run_skypilot(platform, codes=str(code)) == code
    assert "hf_x" not in platform.seen.with_suffix(".docker").read_text(), "the token is on the command line"
    assert platform.starts[0].environ["HF_TOKEN"] == "hf_x"


def test_skypilot_gives_every_setting_and_each_worker_its_share(platform: Platform) -> None:
    environ = {"COMMAND": "tag", **TAGGING, "SKYPILOT_JOB_RANK": "3", "SKYPILOT_NUM_JOBS": "8"}
    assert run_skypilot(platform, **environ) == DONE
    [start] = platform.starts
    assert start.arguments == ["tag"]
    assert TAGGING.items() <= start.environ.items()
    assert str(shards.resolve("auto", start.environ)) == "3/8"


@pytest.mark.parametrize(
    ("codes", "ends_with", "starts"),
    [("0", DONE, 1), ("75 75 0", DONE, 3), ("75 3", GATE_REJECTED, 2), ("2", INVALID_INPUT, 1), ("1", CRASHED, 1)],
)
def test_dstack_resumes_an_interruption_on_the_machine(
    platform: Platform, codes: str, ends_with: int, starts: int
) -> None:
    assert run_dstack(platform, codes=codes) == ends_with
    assert len(platform.starts) == starts
    retry = yaml.safe_load(text("dstack.yaml"))["retry"]
    assert set(retry["on_events"]) == {"no-capacity", "interruption"}, "an error would repeat refusals"


def test_dstack_machines_find_each_other_and_share_the_parts(platform: Platform) -> None:
    environ = {"DSTACK_NODES_NUM": "4", "DSTACK_NODE_RANK": "2", "COMMAND": "tag", **TAGGING}
    assert run_dstack(platform, **environ) == DONE
    [start] = platform.starts
    assert start.arguments == ["tag"]
    assert str(shards.resolve(start.environ["TAGGER_TAG_SHARD"], start.environ)) == "2/4"
    found = machines(start.environ)
    assert (found.count, found.number, found.address) == (4, 2, "10.0.0.7")


@pytest.mark.parametrize("code", EXIT_CODES)
def test_slurm_requeues_an_interruption_and_nothing_else(platform: Platform, code: int) -> None:
    assert run_slurm(platform, codes=str(code)) == (DONE if code == INTERRUPTED else code)
    assert platform.requeued == (["4711"] if code == INTERRUPTED else [])


def test_slurm_ends_a_job_that_is_interrupted_again_and_again(platform: Platform) -> None:
    assert run_slurm(platform, codes="75", SLURM_RESTART_COUNT="50") == INTERRUPTED
    assert platform.requeued == []


def test_slurm_starts_the_job_once_on_each_machine(platform: Platform) -> None:
    assert run_slurm(platform, codes="0 75", SLURM_JOB_NUM_NODES="2", PROGRAM="tagger-job --recipe best") == DONE
    assert platform.requeued == ["4711"], "one of the machines was interrupted"
    assert [start.arguments for start in platform.starts] == [["--recipe", "best", "run"]] * 2
    found = [machines(start.environ) for start in platform.starts]
    assert [(each.count, each.number, each.address, each.port) for each in found] == [
        (2, 0, "node7", 24711),
        (2, 1, "node7", 24711),
    ]
    assert {start.environ["TAGGER_RUN_ID"] for start in platform.starts} == {"tagger-4711"}


@pytest.mark.parametrize(("code", "requeued"), [(INTERRUPTED, ["99_3"]), (INVALID_INPUT, []), (DONE, [])])
def test_slurm_requeues_one_task_of_an_array(platform: Platform, code: int, requeued: list[str]) -> None:
    array = {"SLURM_ARRAY_JOB_ID": "99", "SLURM_ARRAY_TASK_ID": "3", **TAGGING}
    ends_with = run_slurm(platform, codes=str(code), script="slurm-tag.sh", **array)
    assert (ends_with, platform.requeued) == (0 if requeued else code, requeued)


def test_cloud_run_repeats_what_it_cuts_off() -> None:
    spec = objects("cloud-run.yaml")["Job"]["spec"]["template"]["spec"]["template"]["spec"]
    assert 0 < spec["maxRetries"] <= 10 and spec["timeoutSeconds"] <= 3600, "the limits of Cloud Run with a GPU"


def test_pods_of_other_controllers_are_as_restricted_as_those_of_the_job() -> None:
    plain = objects("k8s-two-nodes.yaml")
    pod = plain["Job"]["spec"]["template"]["spec"]
    for name in ("jobset.yaml", "trainjob.yaml"):
        assert objects(name)["NetworkPolicy"] == plain["NetworkPolicy"], name
        template = inner_job(name)["template"]
        assert template["metadata"]["labels"] == {"app": "tagger-job"}
        for key in ("restartPolicy", "automountServiceAccountToken", "securityContext"):
            assert template["spec"][key] == pod[key], (name, key)
        [container] = template["spec"]["containers"]
        assert container["securityContext"] == pod["containers"][0]["securityContext"]
        assert container["volumeMounts"] == pod["containers"][0]["volumeMounts"]
        for volume in template["spec"]["volumes"]:
            assert volume.get("emptyDir", {}).get("sizeLimit") or volume["secret"]["defaultMode"] == 0o400


def test_machines_of_a_jobset_and_of_a_trainjob_find_each_other() -> None:
    job = inner_job("jobset.yaml")
    name = objects("jobset.yaml")["JobSet"]["metadata"]["name"]
    environ = of_container(job["template"]["spec"]["containers"][0]).environ
    found = [machines({**environ, "JOB_COMPLETION_INDEX": str(i)}) for i in range(job["completions"])]
    assert [(each.count, each.number, each.address) for each in found] == [
        (2, 0, f"{name}-node-0-0.{name}"),
        (2, 1, f"{name}-node-0-0.{name}"),
    ]
    train = objects("trainjob.yaml")["TrainJob"]
    assert train["spec"]["runtimeRef"]["name"] == objects("trainjob.yaml")["TrainingRuntime"]["metadata"]["name"]
    given = {  # what Trainer's torch plugin sets
        "PET_NNODES": str(train["spec"]["trainer"]["numNodes"]),
        "PET_NODE_RANK": "1",
        "PET_NPROC_PER_NODE": "4",
        "PET_MASTER_ADDR": "tagger-job-node-0-0.tagger-job",
        "PET_MASTER_PORT": "29400",
    }
    found = [machines(given)]
    assert (found[0].count, found[0].number, found[0].processes, found[0].port) == (2, 1, 4, 29400)


def test_each_platform_gives_the_job_time_to_save_its_state() -> None:
    grace = shutdown.GRACE_SECONDS
    assert int(yaml.safe_load(text("dstack.yaml"))["stop_duration"].removesuffix("s")) > grace
    for name in ("jobset.yaml", "trainjob.yaml"):
        assert inner_job(name)["template"]["spec"]["terminationGracePeriodSeconds"] > grace
    for name in ("slurm.sh", "slurm-tag.sh"):
        [seconds] = re.findall(r"^#SBATCH --signal=TERM@(\d+)$", text(name), re.MULTILINE)
        assert int(seconds) > grace
        assert "#SBATCH --requeue\n" in text(name)


def test_secrets_come_from_the_platform_and_are_in_no_file() -> None:
    assert yaml.safe_load(text("skypilot.yaml"))["secrets"] == {"HF_TOKEN": None}
    of_dstack = yaml.safe_load(text("dstack.yaml"))["env"]
    kept = {name for name, value in of_dstack.items() if re.fullmatch(r"\$\{\{ secrets\.\w+ \}\}", value)}
    assert kept == {"HF_TOKEN", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"}
    batch = json.loads(text("aws-batch.json"))["containerProperties"]["secrets"]
    assert [secret["name"] for secret in batch] == ["HF_TOKEN"]
    assert batch[0]["valueFrom"].startswith("arn:aws:secretsmanager:")
    cloud_run = objects("cloud-run.yaml")["Job"]["spec"]["template"]["spec"]["template"]["spec"]["containers"][0]
    assert [entry["name"] for entry in cloud_run["env"] if "valueFrom" in entry] == ["HF_TOKEN"]
    for path in DEPLOY.iterdir():
        assert not re.search(r"hf_[A-Za-z0-9]{8,}|AKIA[0-9A-Z]{8,}|PRIVATE KEY", path.read_text()), path


def test_the_checks_of_launch_files_find_unknown_fields_and_wrong_types() -> None:
    loader = SourceFileLoader("launch_files", str(ROOT / ".ci" / "launch-files"))
    spec = spec_from_loader("launch_files", loader)
    assert spec is not None
    checks = module_from_spec(spec)
    loader.exec_module(checks)
    assert set(checks.CHECKS) | {"slurm.sh"} == set(FILES[:7])
    assert list(checks.lost({"a": [{"b": 1, "c": {}}]}, {"a": [{"b": 1}]})) == []
    assert list(checks.lost({"a": [{"b": 1}, {"x": 2}]}, {"a": [{"b": 1}, {}]})) == ["a[1].x"]
    schemas = {
        "Job": {"type": "object", "properties": {"n": {"type": "integer"}, "env": {"$ref": "Env"}}},
        "Env": {"type": "array", "items": {"type": "object", "additionalProperties": {"type": "string"}}},
    }
    found = list(checks.discovery({"n": "1", "env": [{"x": 2}], "m": 3}, {"$ref": "Job"}, schemas, "Job"))
    assert found == ["Job.n is '1'; expected integer", "Job.env[0].x is 2; expected string", "Job has no field m"]
