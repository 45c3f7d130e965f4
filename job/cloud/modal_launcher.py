"""The caller's side of Modal: parse and check a request before anything is uploaded, and show what came of it."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NoReturn

from job.cloud.container import (
    JOB_OVERRIDES,
    TAG_OVERRIDES,
    Container,
    apply_overrides,
    missing_for_tag,
    refuse,
    unwritable_folder,
    unwritable_output,
)
from job.cloud.gpus import price_per_second
from job.config import environment
from job.dataset.texts import check_texts
from job.errors import INTERRUPTED, InvalidInputError, JobError, print_error
from job.runs import shutdown
from job.runs.atomic import atomic_directory, atomic_write
from job.runs.run_folder import read_manifest
from job.settings import Modal, Settings
from job.system.paths import DATA_SUFFIXES, is_local, is_remote
from job.system.printable import printable_line
from job.types import TaggedText

if TYPE_CHECKING:
    import modal

RUNS, CACHE = "/runs", "/cache"
"""Where the image expects the two volumes."""
TOKEN = "HF_TOKEN"
STORE_KEYS = {
    "s3": ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"),
    "az": ("AZURE_STORAGE_ACCOUNT_NAME",),  # and a key or a SAS token
    "hf": (),
}
"""For the stores that a container can open, what its secret must have besides HF_TOKEN."""
OVERRIDES = {"--gpu": "TAGGER_MODAL_GPU", "--timeout-hours": "TAGGER_MODAL_TIMEOUT_HOURS", **JOB_OVERRIDES}
CONTAINER = Container(
    "Modal's container",
    (f"{RUNS}/", f"{CACHE}/"),
    f"a path on a volume ({RUNS}/..., {CACHE}/...)",
    "modal run modal_app.py::tag",
)


@dataclass(frozen=True)
class Request:
    """A command with what it needs. A container, which imports the app without a command, has the default."""

    command: str = ""
    options: argparse.Namespace = field(default_factory=argparse.Namespace)
    modal: Modal = field(default_factory=Modal)
    env: dict[str, str] = field(default_factory=dict)
    """The TAGGER_ variables for the container. Never a secret: secrets come from Modal's."""
    texts: tuple[str, ...] = ()
    secret_keys: tuple[str, ...] = (TOKEN,)
    """What Modal's secret must have; Modal refuses one that lacks a key before anything is started."""


def parse_request(app: str, words: Sequence[str] | None = None) -> Request:
    """Parse and validate the command line `modal run APP::COMMAND ...`; under any other program, read the settings.

    This reads the command line itself because Modal parses a command's options only after it has made the app, too
    late to refuse one. Ends the process with code 2 and a message for each problem.
    """
    try:
        name, arguments = _find_command(Path(app), sys.argv if words is None else words)
        command = COMMANDS.get(name, DEPLOY)
        options = _parser(name, command).parse_args(arguments)
        apply_overrides(options, OVERRIDES | (TAG_OVERRIDES if name == "tag" else {}))
        settings = environment.load(options.recipe)
        texts = command.validate(options, settings)
        keys = (TOKEN, *STORE_KEYS.get(_store_scheme(settings), ()))
        return Request(name, options, settings.modal, environment.explicit_values(options.recipe), texts, keys)
    except InvalidInputError as error:
        _exit(error)


def _find_command(app: Path, words: Sequence[str]) -> tuple[str, Sequence[str]]:
    """Return the command after `::` and its arguments; `deploy` if this is not `modal run`."""
    for number, word in enumerate(words):
        before, (file, _, command) = words[1:number], word.partition("::")
        is_app = file == app.stem if "-m" in before else Path(file).resolve() == app.resolve()
        if "run" in before and is_app and (command := command.removeprefix("app.") or "main") in COMMANDS:
            return command, words[number + 1 :]
    return "deploy", []


def _parser(name: str, command: Command) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="modal run modal_app.py" + ("" if name == "main" else f"::{name}"),
        description=f"{command.description} Settings are environment variables named TAGGER_<GROUP>_<NAME>; "
        "these options override them.",
        allow_abbrev=False,
    )
    parser.add_argument("--recipe", metavar="RECIPE", help="name of a shipped recipe, or a file with lines NAME=value")
    for option, variable in OVERRIDES.items():
        parser.add_argument(option, metavar="VALUE", help=f"overrides {variable}")
    for option, keywords in command.options.items():
        parser.add_argument(option, **keywords)
    return parser


# One validator for each command: it raises InvalidInputError for what a container could not do, and returns the
# texts to tag.


def _store_scheme(settings: Settings) -> str:
    """Return the scheme of TAGGER_RUN_STORE; empty if it is not set."""
    return (settings.run.store or "").partition(":")[0]


def _store_problems(settings: Settings) -> list[str]:
    scheme = _store_scheme(settings)
    if not scheme or scheme in STORE_KEYS:
        return []
    why = "is a folder of this machine" if scheme == "file" else "needs a file or a machine of Google as its credential"
    return [
        f"TAGGER_RUN_STORE={settings.run.store} {why}, which Modal's container does not have; expected s3://, az:// or "
        f"hf://buckets/ with their credentials in Modal's secret {settings.modal.secret}, or unset it: runs are kept "
        f"on the volume {settings.modal.runs_volume}"
    ]


def _validate_deploy(options: argparse.Namespace, settings: Settings) -> tuple[str, ...]:
    refuse(_store_problems(settings), CONTAINER.local_inputs(settings), CONTAINER.local_vocabulary(settings))
    return ()


def _validate_job(options: argparse.Namespace, settings: Settings) -> tuple[str, ...]:
    refuse(
        _store_problems(settings),
        CONTAINER.local_inputs(settings),
        CONTAINER.local_vocabulary(settings),
        unwritable_output(options.output),
        unwritable_folder(options.to),
    )
    return ()


def _validate_status(options: argparse.Namespace, settings: Settings) -> tuple[str, ...]:
    return ()


def _validate_fetch(options: argparse.Namespace, settings: Settings) -> tuple[str, ...]:
    missing = "fetch needs the name of a run: add --run-id; `modal run modal_app.py::status` lists the runs"
    refuse(unwritable_folder(options.to), [missing] if settings.run.id is None else [])
    return ()


def _validate_sample(options: argparse.Namespace, settings: Settings) -> tuple[str, ...]:
    refuse(_store_problems(settings), CONTAINER.local_vocabulary(settings))
    return check_texts(options.text, "--text")


def _validate_tag(options: argparse.Namespace, settings: Settings) -> tuple[str, ...]:
    given, output = settings.tag.input, settings.tag.output
    problems = missing_for_tag(settings.tag)
    if options.containers < 1:
        problems.append(f"--containers {options.containers}: expected a number of at least 1")
    places = f"an s3://, gs:// or az:// URL, or a path on a volume ({RUNS}/..., {CACHE}/...)"
    if given is not None and not CONTAINER.has(given) and (given == "-" or is_local(given, DATA_SUFFIXES)):
        problems.append(
            f"TAGGER_TAG_INPUT={given} is not in Modal's container; expected {places}, or a data set on the Hub. "
            "`modal volume put` copies a file to a volume"
        )
    if output is not None and not CONTAINER.has(output) and not is_remote(output):
        problems.append(f"TAGGER_TAG_OUTPUT={output} would be lost with Modal's container; expected {places}")
    refuse(_store_problems(settings), CONTAINER.local_vocabulary(settings), problems)
    return ()


@dataclass(frozen=True)
class Command:
    """A command of the app: its validator, what its --help says, and its own options."""

    validate: Callable[[argparse.Namespace, Settings], tuple[str, ...]]
    description: str
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """For each option, the keyword arguments of `ArgumentParser.add_argument`."""


_JOB_OPTIONS = {
    "--output": {"type": Path, "metavar": "FILE", "help": "file to which the outcome is written, as JSON"},
    "--to": {"type": Path, "metavar": "DIR", "help": "folder into which the run is downloaded"},
}
COMMANDS = {
    "main": Command(_validate_job, "Do the complete job, like `tagger-job run`.", _JOB_OPTIONS),
    "retrain": Command(_validate_job, "Train and publish if needed, like `tagger-job retrain`.", _JOB_OPTIONS),
    "status": Command(_validate_status, "Print the state of all runs on the volume, or of one."),
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
        "Tag data of any size in several containers, like `tagger-job tag`.",
        {
            "--input": {"metavar": "VALUE", "help": "overrides TAGGER_TAG_INPUT: a URL, a Hub data set, /runs/..."},
            "--output": {"metavar": "VALUE", "help": "overrides TAGGER_TAG_OUTPUT: a URL, or a path below /runs"},
            "--containers": {
                "type": int,
                "metavar": "N",
                "default": 10,
                "help": "how many share the parts (10)",
            },
        },
    ),
}
"""The commands after `::`; `main` is the one without `::`."""
DEPLOY = Command(_validate_deploy, "Deploy the app, which retrains on a schedule.")
"""Stands for `modal deploy`, and for every other program that imports the app."""


@contextmanager
def exit_on_job_error(next_attempt: str = "the same command starts over") -> Iterator[None]:
    """End the process with the message and exit code of a JobError that is raised inside, without a traceback.

    Ends it with 75 after SIGINT (Ctrl-C) or SIGTERM, and when the time of the last attempt is up: Modal's own exit code
    after Ctrl-C is 0, that of a completed run. `next_attempt` tells the user what the same command does after that.
    """
    import modal

    try:
        with shutdown.interrupts():
            yield
    except JobError as error:
        _exit(error)
    except (KeyboardInterrupt, modal.exception.FunctionTimeoutError) as end:
        why = "interrupted here" if isinstance(end, KeyboardInterrupt) else "the time of the last attempt is up"
        print(f"{why}; {next_attempt}", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None


def wait(call: modal.FunctionCall[dict[str, Any]], request: Request, runs: modal.Volume) -> None:
    """Wait for the end of a call, print and save its outcome, download the run, and exit with the job's exit code."""
    with exit_on_job_error("the same command resumes from what is on the volume"):
        print(f"call {call.object_id}; `modal run modal_app.py::status` prints its state", file=sys.stderr)
        outcome = call.get()
        if request.options.output is not None:
            atomic_write(request.options.output, json.dumps(outcome, indent=2, ensure_ascii=False) + "\n")
        _show(summary(outcome, request.modal.gpu))
        if request.options.to is not None and "run_id" in outcome:
            try:
                fetch(runs, outcome["run_id"], request.options.to)
            except InvalidInputError as error:
                raise JobError(f"the call ended as above, but {error}") from error
        exit_with(outcome)


def summary(outcome: Mapping[str, Any], gpus: str) -> list[str]:
    """Return the lines that say how a call ended, and the list price of its GPU seconds in US dollars."""
    lines = [f"run: {outcome['run_id']}, {outcome['status']}", *outcome.get("table", [])] if "run_id" in outcome else []
    seconds, device = outcome["gpu_seconds"], outcome.get("device") or "a GPU that was not used"
    price = price_per_second(device)
    count = max(int(gpu.partition(":")[2] or 1) for gpu in gpus.split(","))
    cost = "" if price is None else f", about ${price * count * seconds:.2f}"
    lines.append(f"GPU: {seconds:.0f} s on {device}{cost}")
    return lines if outcome["exit_code"] else [*lines, outcome["message"]]


def exit_with(outcome: Mapping[str, Any]) -> None:
    """Exit with the message and the exit code of an outcome, unless the code is 0."""
    if outcome["exit_code"]:
        print_error(outcome["message"])
        raise SystemExit(outcome["exit_code"])


def status(runs: modal.Volume, run_id: str | None) -> None:
    """Print the state of a run, or of all runs, as last committed to the volume."""
    if run_id is not None:
        _show(run_status(runs, run_id))
        return
    for entry in runs.iterdir("/", recursive=False):
        with suppress(InvalidInputError):  # a folder that is not a run
            _show(run_status(runs, entry.path.strip("/")))


def run_status(runs: modal.Volume, run_id: str) -> list[str]:
    """Return the lines that describe the state of a run; raise InvalidInputError if it is not on the volume."""
    manifest = json.loads(_read(runs, run_id, "manifest.json"))
    device, steps = manifest.get("device", "no device yet"), manifest["settings"]["TAGGER_TRAIN_MAX_STEPS"]
    lines = [f"{run_id}: {manifest['status']}, started {manifest['started']} on {device}"]
    with suppress(InvalidInputError, IndexError):  # no step has been logged yet
        last = json.loads(_read(runs, run_id, "log.jsonl").splitlines()[-1])
        lines.append(f"  step {last['step']} of {steps}, loss {last['loss']:.4f}")
    lines.append("  seconds: " + ", ".join(f"{name} {seconds:g}" for name, seconds in manifest["timings"].items()))
    if manifest.get("published"):
        lines.append(f"  the adapter is at {manifest['published']['url']}")
    return lines


def fetch(runs: modal.Volume, run_id: str, to: Path) -> Path:
    """Download the folder of a run, completely or not at all, and return its path.

    An existing folder is only replaced if it is an earlier state of the same run.
    Raises InvalidInputError if it is something else, or if the run changed during the download.
    """
    import modal

    target = to / run_id
    started = json.loads(_read(runs, run_id, "manifest.json"))["started"]
    if target.exists() and (not (target / "manifest.json").is_file() or read_manifest(target)["started"] != started):
        raise InvalidInputError(f"{target} exists and is not this run; remove it, or name another folder with --to")
    to.mkdir(parents=True, exist_ok=True)
    try:
        with atomic_directory(target) as folder:
            for entry in runs.iterdir(run_id, recursive=True):
                if entry.type == modal.types.FileEntryType.FILE:
                    download_file(runs, entry.path, folder / PurePosixPath(entry.path).relative_to(run_id), entry.size)
    except (FileNotFoundError, modal.exception.NotFoundError) as error:
        raise InvalidInputError(f"{run_id} changed during the download ({error}); fetch it again") from error
    return target


def download_file(runs: modal.Volume, path: str, to: Path, size: int) -> None:
    """Download a file of the volume; raise FileNotFoundError if it does not have this size in bytes any more."""
    to.parent.mkdir(parents=True, exist_ok=True)
    with to.open("wb") as file:
        for chunk in runs.read_file(path):
            file.write(chunk)
        if file.tell() != size:
            raise FileNotFoundError(f"{path} has {file.tell()} bytes instead of {size}")


def _read(runs: modal.Volume, run_id: str, name: str) -> str:
    import modal

    try:
        return b"".join(runs.read_file(f"{run_id}/{name}")).decode()
    except (FileNotFoundError, modal.exception.NotFoundError):
        raise InvalidInputError(
            f"the volume has no {name} of a run {run_id}; `modal run modal_app.py::status` lists the runs"
        ) from None


def collect(texts: Sequence[str], outcomes: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the answers of all shards, in order; exit with the outcome of a shard that failed.

    Raises RuntimeError unless there is exactly one answer for each text, in the order of the texts.
    """
    answers: list[dict[str, Any]] = []
    for outcome in outcomes:
        exit_with(outcome)
        answers += outcome["answers"]
    if [answer["text"] for answer in answers] != list(texts):
        raise RuntimeError("the answers do not belong to the texts that were sent; nothing is written")
    return answers


def _show(lines: Iterable[str]) -> None:
    for line in lines:
        print(printable_line(line))


def show_answers(answers: Iterable[Mapping[str, Any]]) -> None:
    """Print a line for each answer, like `tagger-job sample`."""
    for answer in answers:
        print(TaggedText(**answer))


def wait_for_parts(calls: Sequence[modal.FunctionCall[dict[str, Any]]], gpus: str) -> None:
    """Wait for containers that share the parts of a job; one that succeeds has found all parts sealed."""
    with exit_on_job_error("the same command does what is not sealed yet"):
        print(f"calls {', '.join(call.object_id for call in calls)}", file=sys.stderr)
        outcomes = [call.get() for call in calls]
        done = next((outcome for outcome in outcomes if outcome["exit_code"] == 0), outcomes[0])
        seconds = sum(outcome["gpu_seconds"] for outcome in outcomes)
        print("\n".join(summary({**done, "gpu_seconds": seconds}, gpus)))
        exit_with(done)


def _exit(error: JobError) -> NoReturn:
    print_error(str(error))
    raise SystemExit(error.exit_code)
