"""The caller's side of Hugging Face Jobs: check a request, say its price, start it, follow it, return its exit code."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from job.cloud.container import (
    JOB_OVERRIDES,
    TAG_OVERRIDES,
    Container,
    apply_overrides,
    missing_for_tag,
    refuse,
    unwritable_folder,
)
from job.cloud.hfjobs import (
    LABELS,
    Jobs,
    describe_cost,
    describe_price,
    jobs_errors,
    pinned_revisions,
    price_per_hour,
    read_outcome,
    running_jobs_named,
    stage,
)
from job.config import environment
from job.dataset.texts import check_texts
from job.errors import CRASHED, INTERRUPTED, InvalidInputError, JobError, print_error
from job.runs import shutdown
from job.runs.objects import StoreError
from job.runs.stored_run import StoredRun, stored_ids
from job.settings import Settings
from job.system.paths import DATA_SUFFIXES, is_on_hub
from job.system.printable import printable_line

if TYPE_CHECKING:
    from huggingface_hub import JobInfo
    from huggingface_hub._jobs_api import JobHardwareInfo

OVERRIDES = {
    "--flavor": "TAGGER_HFJOBS_FLAVOR",
    "--timeout-hours": "TAGGER_HFJOBS_TIMEOUT_HOURS",
    "--image": "TAGGER_HFJOBS_IMAGE",
    **JOB_OVERRIDES,
}
PROMPTS = "TAGGER_SAMPLE_PROMPTS"
CONTAINER = Container(
    "the container of Hugging Face Jobs", (), "a file in a bucket (hf://buckets/...)", "python hf_app.py tag"
)


@dataclass(frozen=True)
class Request:
    """A command with what it needs."""

    command: str
    options: argparse.Namespace
    settings: Settings
    env: dict[str, str]
    """The TAGGER_ variables for the container. Never a secret: HF_TOKEN is sent as one."""


@dataclass(frozen=True)
class Command:
    """A command: its validator, what its --help says, and its own options."""

    validate: Callable[[argparse.Namespace, Settings], None]
    description: str
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def parse_request(words: Sequence[str]) -> Request:
    """Parse and validate the command line; raises InvalidInputError with every problem found."""
    parser = argparse.ArgumentParser(
        prog="python hf_app.py",
        description="Run the job on Hugging Face Jobs. Settings are environment variables named TAGGER_<GROUP>_<NAME>; "
        "the options override them.",
    )
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        subparser = subparsers.add_parser(
            name, help=command.description, description=command.description, allow_abbrev=False
        )
        subparser.add_argument("--recipe", metavar="RECIPE", help="name of a shipped recipe, or a file of NAME=value")
        for option, variable in OVERRIDES.items():
            subparser.add_argument(option, metavar="VALUE", help=f"overrides {variable}")
        for option, keywords in command.options.items():
            subparser.add_argument(option, **keywords)
    options = parser.parse_args(words)
    apply_overrides(options, OVERRIDES | (TAG_OVERRIDES if options.command == "tag" else {}))
    for name, value in environment.third_party_variables(options.recipe).items():
        os.environ.setdefault(name, value)
    settings = environment.load(options.recipe)
    COMMANDS[options.command].validate(options, settings)
    env = {
        name: value
        for name, value in environment.explicit_values(options.recipe).items()
        if not name.startswith(
            ("TAGGER_HFJOBS_", "TAGGER_MODAL_", "TAGGER_RUN_DIR", "TAGGER_RECIPE", environment.NOTIFY)
        )
    }
    return Request(options.command, options, settings, env)


# One validator for each command: it raises InvalidInputError for what a container could not do.


def _validate_job(options: argparse.Namespace, settings: Settings) -> None:
    refuse(_job_problems(settings), CONTAINER.local_inputs(settings), CONTAINER.local_vocabulary(settings))


def _validate_retrain(options: argparse.Namespace, settings: Settings) -> None:
    problems = []
    if options.schedule is not None and options.when_data_changes:
        problems.append("--schedule and --when-data-changes are two ways to start a job; choose one")
    if settings.run.id is not None and (options.schedule is not None or options.when_data_changes):
        problems.append(
            f"TAGGER_RUN_ID={settings.run.id} (--run-id) would make all retrainings one run, which is refused with "
            "other data; unset it"
        )
    if options.when_data_changes and not is_on_hub(settings.data.dataset, DATA_SUFFIXES):
        problems.append(
            f"TAGGER_DATA_DATASET={settings.data.dataset} is no data set on the Hub, and only these can be watched"
        )
    refuse(problems, _job_problems(settings), CONTAINER.local_inputs(settings), CONTAINER.local_vocabulary(settings))


def _validate_status(options: argparse.Namespace, settings: Settings) -> None:
    refuse(_store_problems(settings))


def _validate_fetch(options: argparse.Namespace, settings: Settings) -> None:
    missing = "fetch needs the name of a run: add --run-id; `python hf_app.py status` lists the runs"
    refuse(_store_problems(settings), unwritable_folder(options.to), [missing] if settings.run.id is None else [])


def _validate_sample(options: argparse.Namespace, settings: Settings) -> None:
    check_texts(options.text, "--text")
    refuse(_job_problems(settings), CONTAINER.local_vocabulary(settings))


def _validate_tag(options: argparse.Namespace, settings: Settings) -> None:
    given, output, problems = settings.tag.input, settings.tag.output, missing_for_tag(settings.tag)
    if options.containers < 1:
        problems.append(f"--containers {options.containers}: expected a number of at least 1")
    if given is not None and not given.startswith("hf://") and not is_on_hub(given, DATA_SUFFIXES):
        problems.append(
            f"TAGGER_TAG_INPUT={given} cannot be read there; expected hf://buckets/..., or a data set on the Hub. "
            "`hf buckets sync` copies files to a bucket"
        )
    if output is not None and not output.startswith("hf://buckets/"):
        problems.append(
            f"TAGGER_TAG_OUTPUT={output} cannot be written there, where HF_TOKEN is the only credential; expected "
            "hf://buckets/..."
        )
    refuse(problems, _job_problems(settings), CONTAINER.local_vocabulary(settings))


def _job_problems(settings: Settings) -> list[str]:
    problems = _store_problems(settings)
    if settings.hfjobs.image is None:
        problems.append(
            "TAGGER_HFJOBS_IMAGE is not set; set it to an image of this job that Hugging Face Jobs can pull, such as "
            "ghcr.io/<owner>/tagger-job:<version>"
        )
    return problems


def _store_problems(settings: Settings) -> list[str]:
    if settings.run.store is None:
        return []
    return [
        f"TAGGER_RUN_STORE={settings.run.store}: on Hugging Face Jobs, runs are kept in the bucket "
        "TAGGER_HFJOBS_BUCKET; remove TAGGER_RUN_STORE"
    ]


COMMANDS = {
    "run": Command(_validate_job, "Train, evaluate and publish, like `tagger-job run`."),
    "retrain": Command(
        _validate_retrain,
        "Train if something has changed, and publish what is no worse, like `tagger-job retrain`.",
        {
            "--schedule": {
                "metavar": "CRON",
                "help": "make a scheduled job instead: five cron fields in UTC, or a word such as @weekly",
            },
            "--when-data-changes": {
                "action": "store_true",
                "help": "also make a webhook, once, that starts this job again whenever the data set changes",
            },
        },
    ),
    "status": Command(_validate_status, "List the latest jobs with their price, and the stored runs."),
    "fetch": Command(
        _validate_fetch,
        "Download the folder of a run.",
        {"--to": {"type": Path, "metavar": "DIR", "default": Path("runs"), "help": "folder into which it goes"}},
    ),
    "sample": Command(
        _validate_sample,
        "Tag some texts with a published adapter, or with that of a run.",
        {"--text": {"action": "append", "required": True, "metavar": "TEXT", "help": "a text to tag; repeatable"}},
    ),
    "tag": Command(
        _validate_tag,
        "Tag data of any size in several jobs, like `tagger-job tag`.",
        {
            "--input": {"metavar": "VALUE", "help": "overrides TAGGER_TAG_INPUT: hf://buckets/..., or a data set"},
            "--output": {"metavar": "VALUE", "help": "overrides TAGGER_TAG_OUTPUT: hf://buckets/..."},
            "--containers": {"type": int, "metavar": "N", "default": 1, "help": "how many jobs share the parts (1)"},
        },
    ),
}


def perform(words: Sequence[str]) -> None:
    """Do a command, and exit with its exit code."""
    try:
        with shutdown.interrupts():
            request = parse_request(words)
            jobs = Jobs(request.settings)
            with running_jobs_named(jobs):
                _COMMANDS[request.command](request, jobs)
    except JobError as error:
        print_error(str(error))
        raise SystemExit(error.exit_code) from None
    except StoreError as error:
        print_error(f"the bucket TAGGER_HFJOBS_BUCKET cannot be read: {error}")
        raise SystemExit(CRASHED) from None
    except KeyboardInterrupt:
        print("interrupted here; `python hf_app.py status` shows the jobs that run", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None


def _run(request: Request, jobs: Jobs) -> None:
    hardware = _prepare(request, jobs)
    env = request.env
    schedule = request.options.schedule if request.command == "retrain" else None
    if schedule is not None:
        print(f"the scheduled job {jobs.schedule([request.command], env, schedule)} retrains at {schedule}")
        return
    if request.command == "retrain" and request.options.when_data_changes:
        _retrain_when_data_changes(request, jobs, hardware)
        return
    # all attempts resume one run, also if the Hub has a new commit by then
    job = jobs.start([request.command], {**env, **pinned_revisions(jobs, request.settings)})
    _finish(jobs, [job], hardware)


def _retrain_when_data_changes(request: Request, jobs: Jobs, hardware: JobHardwareInfo) -> None:
    """Retrain now, and by a webhook whenever the data set changes; a webhook that is there is kept."""
    dataset, settings = request.settings.data.dataset, request.settings
    identity = (jobs.namespace, dataset, settings.hub.repo, settings.base.model)
    labels = {"retrains": hashlib.sha256(repr(identity).encode()).hexdigest()[:16]}
    webhook = jobs.find_webhook(dataset, labels)  # before a job is paid for: the token may not read webhooks
    job = jobs.start([request.command], request.env, labels=labels)
    if webhook is None:
        print(f"the webhook {jobs.make_webhook(job, dataset)} starts this job again whenever {dataset} changes")
    else:
        print(f"the webhook {webhook} watches {dataset} already; delete it to change its settings")
    _finish(jobs, [job], hardware)


def _prepare(request: Request, jobs: Jobs, count: int = 1) -> JobHardwareInfo:
    """Check the flavor, say the price, and make the bucket."""
    hardware, settings = jobs.hardware(), request.settings.hfjobs
    print(describe_price(hardware, settings.timeout_hours, settings.attempts, count), file=sys.stderr)
    jobs.make_bucket()
    return hardware


def _sample(request: Request, jobs: Jobs) -> None:
    hardware = _prepare(request, jobs)
    # the page of a job shows its command and variables, but no secrets
    texts = {PROMPTS: json.dumps(request.options.text, ensure_ascii=False)}
    env = {name: value for name, value in request.env.items() if name.upper() not in (PROMPTS, "TAGGER_SAMPLE_INPUT")}
    _finish(jobs, [jobs.start(["sample"], env, secrets=texts)], hardware)


def _tag(request: Request, jobs: Jobs) -> None:
    count = request.options.containers
    hardware = _prepare(request, jobs, count)
    shares = [{} if count == 1 else {"TAGGER_TAG_SHARD": f"{index}/{count}"} for index in range(count)]
    _finish(jobs, [jobs.start(["tag"], {**request.env, **share}) for share in shares], hardware)


def _finish(jobs: Jobs, started: Sequence[JobInfo], hardware: JobHardwareInfo) -> None:
    """Follow jobs to their end, print what came of them and what they cost, and exit with the first failure's code."""
    code, seconds = 0, 0
    for job in started:
        ended = jobs.follow(job)
        seconds += (ended.durations and ended.durations.running_secs) or 0
        outcome = read_outcome(jobs.open_store(), ended)
        if "run_id" in outcome:
            for line in (f"run: {outcome['run_id']}, {outcome['status']}", *outcome.get("table", [])):
                print(printable_line(line))
            if outcome.get("published"):
                print(f"the adapter is at {outcome['published']['url']}")
        if outcome["exit_code"]:
            print_error(f"the job {job.id} ended with {outcome['exit_code']}: {outcome['message']}")
        code = code or outcome["exit_code"]
    cost = describe_cost(price_per_hour(hardware), seconds)
    print(f"price: {seconds} s on {hardware.name}{f', about {cost}' if cost else ''}")
    if code:
        raise SystemExit(code)


def _status(request: Request, jobs: Jobs) -> None:
    with jobs_errors("the list of jobs"):
        prices = {hardware.name: price_per_hour(hardware) for hardware in jobs.api.list_jobs_hardware()}
        for job in jobs.api.list_jobs(namespace=jobs.namespace, labels=LABELS):
            seconds = (job.durations and job.durations.running_secs) or 0
            cost = describe_cost(prices.get(str(job.flavor)), seconds)
            took = f"{seconds} s on {job.flavor}{f', {cost}' if cost else ''}"
            command = " ".join((job.command or [])[3:])
            print(printable_line(f"job {job.id}: {stage(job)}, {command}, {took}; {job.url}"))
    objects = jobs.open_store()
    for run_id in stored_ids(objects):
        if request.settings.run.id in (None, run_id):
            manifest = json.loads(StoredRun(objects, run_id).read("manifest.json") or b"{}")
            print(printable_line(f"run {run_id}: {manifest.get('status')}, started {manifest.get('started')}"))


def _fetch(request: Request, jobs: Jobs) -> None:
    run_id, to = request.settings.run.id, request.options.to
    assert run_id is not None
    target = to / run_id
    if target.exists():
        raise InvalidInputError(f"{target} exists; remove it, or name another folder with --to")
    if StoredRun(jobs.open_store(), run_id).restore(target) is None:
        raise InvalidInputError(
            f"the bucket {jobs.bucket} has no run {run_id}; `python hf_app.py status` lists the runs"
        )
    print(target)


_COMMANDS: dict[str, Callable[[Request, Jobs], None]] = {
    "run": _run,
    "retrain": _run,
    "status": _status,
    "fetch": _fetch,
    "sample": _sample,
    "tag": _tag,
}
