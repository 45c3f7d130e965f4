"""Modal from the caller's side: what was asked for, checked before anything is uploaded, and what came of it."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NoReturn

from job.cloud.gpus import price_per_second
from job.config import environment
from job.config.validators import is_unicode
from job.errors import INTERRUPTED, InvalidInputError, JobError, print_error
from job.runs.atomic import atomic_directory, atomic_write, json_lines
from job.runs.run_folder import check_writable, read_manifest
from job.settings import Modal, Settings
from job.system.paths import DATA_SUFFIXES, PACKAGE_PREFIX, WEIGHT_SUFFIXES, is_local
from job.types import TaggedText

if TYPE_CHECKING:
    import modal

COMMANDS = ("main", "retrain", "status", "fetch", "sample", "tag")
RUNS, CACHE = "/runs", "/cache"
"""Where the image expects the two volumes."""
SHARD = 256
"""Texts that one container tags at a time."""
OVERRIDES = {
    "--gpu": "TAGGER_MODAL_GPU",
    "--timeout-hours": "TAGGER_MODAL_TIMEOUT_HOURS",
    "--run-id": "TAGGER_RUN_ID",
    "--max-steps": "TAGGER_TRAIN_MAX_STEPS",
    "--learning-rate": "TAGGER_TRAIN_LEARNING_RATE",
    "--model": "TAGGER_BASE_MODEL",
    "--dataset": "TAGGER_DATA_DATASET",
    "--repo": "TAGGER_HUB_REPO",
}


@dataclass(frozen=True)
class Request:
    """A command with what it needs; without one, what is declared when the container imports the app."""

    command: str = ""
    options: argparse.Namespace = field(default_factory=argparse.Namespace)
    modal: Modal = field(default_factory=Modal)
    given: dict[str, str] = field(default_factory=dict)
    """The TAGGER_ variables for the container. Never a secret: those come from Modal's."""
    texts: tuple[str, ...] = ()


def parse_request(app: str, words: Sequence[str] | None = None) -> Request:
    """What `modal run APP::COMMAND ...` asks for, or the settings alone under any other program.

    Modal parses a command's options after it has made the app, too late to refuse any: hence from the
    command line itself. Ends the process with code 2 and a sentence for each thing that is wrong.
    """
    try:
        command, rest = _command(Path(app), sys.argv if words is None else words)
        options = _parser(command).parse_args(rest)
        _override(options)
        chosen = environment.load(options.recipe)
        texts = _validate_request(command, options, chosen)
        return Request(command, options, chosen.modal, environment.explicit_values(options.recipe), texts)
    except InvalidInputError as refusal:
        _exit(refusal)


def _command(app: Path, words: Sequence[str]) -> tuple[str, Sequence[str]]:
    """The command after `::` and its arguments; `deploy` when this is not `modal run`."""
    for number, word in enumerate(words):
        before, (file, _, command) = words[1:number], word.partition("::")
        is_app = file == app.stem if "-m" in before else Path(file).resolve() == app.resolve()
        if "run" in before and is_app and (command := command.removeprefix("app.") or "main") in COMMANDS:
            return command, words[number + 1 :]
    return "deploy", []


def _parser(command: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="modal run modal_app.py" + ("" if command == "main" else f"::{command}"),
        description="Settings are environment variables named TAGGER_<GROUP>_<KNOB>, as everywhere; these options win.",
        allow_abbrev=False,
    )
    parser.add_argument("--recipe", metavar="RECIPE", help="name of a shipped recipe, or file with lines NAME=value")
    for option, variable in OVERRIDES.items():
        parser.add_argument(option, metavar="VALUE", help=f"in the place of {variable}")
    if command in ("main", "retrain"):
        parser.add_argument("--output", type=Path, metavar="FILE", help="file that gets the outcome, as JSON")
        parser.add_argument("--to", type=Path, metavar="DIR", help="folder into which the run is fetched")
    elif command == "fetch":
        parser.add_argument("--to", type=Path, metavar="DIR", default=Path("runs"), help="folder for the run's")
    elif command == "sample":
        parser.add_argument("--text", action="append", required=True, metavar="TEXT", help="a text to tag")
    elif command == "tag":
        parser.add_argument("--input", type=Path, required=True, metavar="FILE", help="JSON lines with the texts")
        parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="JSON lines with the answers")
    return parser


def _override(options: argparse.Namespace) -> None:
    for option, variable in OVERRIDES.items():
        value = getattr(options, option.removeprefix("--").replace("-", "_"))
        if value == "":
            raise InvalidInputError(f"{option} is empty; expected a value for {variable}")
        if value is not None:
            os.environ[variable] = value


def _validate_request(command: str, options: argparse.Namespace, chosen: Settings) -> tuple[str, ...]:
    """Return the texts to tag, if any; raise InvalidInputError for what a container could not do."""
    problems = local_only_inputs(chosen) if command in ("main", "retrain", "deploy") else []
    problems += [] if command in ("status", "fetch") else _local_vocabulary(chosen)
    output, to = getattr(options, "output", None), getattr(options, "to", None)
    if output is not None and (output.is_dir() or not output.name):
        problems.append(f"--output {output} is a folder; expected the path of a file")
    if problems:
        raise InvalidInputError(*problems)
    if output is not None:
        check_writable(output.parent, "the folder of --output", "it to a file in one")
    if to is not None:
        check_writable(to, "the folder --to", "it to one")
    if command == "fetch" and chosen.run.id is None:
        raise InvalidInputError("fetch needs the run's name: add --run-id; `modal run modal_app.py::status` lists them")
    if command == "tag":
        return read_texts(options.input, chosen.data.text_column)
    texts = tuple(getattr(options, "text", ()))
    if any(not text.strip() or not is_unicode(text) for text in texts):
        raise InvalidInputError("a --text to tag is empty or not readable text; expected some words")
    return texts


def _local_vocabulary(chosen: Settings) -> list[str]:
    tags = chosen.sample.vocabulary
    if tags in (None, "open", "seen") or tags.startswith((f"{RUNS}/", f"{CACHE}/")):
        return []
    return [
        f"TAGGER_SAMPLE_VOCABULARY={tags} is not in Modal's container; expected open, seen, or a path on a volume "
        f"({RUNS}/..., {CACHE}/...)"
    ]


def local_only_inputs(chosen: Settings) -> list[str]:
    """A sentence for each file that is on this machine, or in a package, and not in the container."""
    named = {"TAGGER_BASE_MODEL": chosen.base.model, "TAGGER_DATA_DATASET": chosen.data.dataset}
    problems = [
        f"{variable}={name} is not in Modal's container; expected a Hub id, a file of the job's own package "
        f"(package:job/...), or a path on a volume ({RUNS}/..., {CACHE}/...)"
        for variable, name in named.items()
        if not name.startswith((f"{PACKAGE_PREFIX}job/", f"{RUNS}/", f"{CACHE}/"))
        and (name.startswith((PACKAGE_PREFIX, "~")) or is_local(name, (*DATA_SUFFIXES, *WEIGHT_SUFFIXES)))
    ]
    for variable, file in {"INPUT": chosen.sample.input, "OUTPUT": chosen.sample.output}.items():
        if file is not None:
            problems.append(
                f"TAGGER_SAMPLE_{variable}={file} is a file of this machine, which Modal's container does not see; "
                "unset it and use `modal run modal_app.py::tag --input FILE --output FILE`"
            )
    return problems


def read_texts(path: Path, column: str) -> tuple[str, ...]:
    """Return the texts of a file of JSON lines: strings, or objects with the column.

    Raises InvalidInputError with the number of a line that holds none.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInputError(
            f"--input {path} cannot be read ({error}); expected a UTF-8 file of JSON lines"
        ) from error
    texts = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        text = row.get(column) if isinstance(row, dict) else row
        if not isinstance(text, str) or not text.strip() or not is_unicode(text):
            raise InvalidInputError(
                f'{path} line {number} holds no text; expected {{"{column}": "a text"}}. Repair it, or set '
                "TAGGER_DATA_TEXT_COLUMN"
            )
        texts.append(text)
    if not texts:
        raise InvalidInputError(f"{path} is empty; expected at least one text")
    return tuple(texts)


@contextmanager
def exit_on_job_error(goes_on: str = "the same command begins anew") -> Iterator[None]:
    """Within, an error with a sentence of its own ends the process with it and its exit code, without a traceback.

    So do, with 75, the end of the last attempt's time, and Ctrl-C: Modal's own answer to it, 0, would
    pass for a run that was done. `goes_on` says what the same command would do then.
    """
    import modal

    try:
        yield
    except JobError as error:
        _exit(error)
    except (KeyboardInterrupt, modal.exception.FunctionTimeoutError) as end:
        why = "interrupted here" if isinstance(end, KeyboardInterrupt) else "the time of the last attempt is up"
        print(f"{why}; {goes_on}", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None


def wait(call: modal.FunctionCall[dict[str, Any]], request: Request, runs: modal.Volume) -> None:
    """Wait for the job's end, show it, save and fetch what is asked for, and end with the job's exit code."""
    with exit_on_job_error("the same command goes on from what the volume holds"):
        print(f"call {call.object_id}; `modal run modal_app.py::status` tells how it stands", file=sys.stderr)
        outcome = call.get()
        if request.options.output is not None:
            atomic_write(request.options.output, json.dumps(outcome, indent=2, ensure_ascii=False) + "\n")
        print("\n".join(summary(outcome, request.modal.gpu)))
        if request.options.to is not None and "run_id" in outcome:
            try:
                fetch(runs, outcome["run_id"], request.options.to)
            except InvalidInputError as refusal:
                raise JobError(f"the call has ended as above, but {refusal}") from refusal
        exit_with(outcome)


def summary(outcome: Mapping[str, Any], gpus: str) -> list[str]:
    """How a call ended and what it cost, line by line."""
    lines = [f"run: {outcome['run_id']}, {outcome['status']}", *outcome.get("table", [])] if "run_id" in outcome else []
    seconds, device = outcome["gpu_seconds"], outcome.get("device") or "a GPU that was not used"
    price = price_per_second(device)
    count = max(int(gpu.partition(":")[2] or 1) for gpu in gpus.split(","))
    cost = "" if price is None else f", about ${price * count * seconds:.2f}"
    lines.append(f"GPU: {seconds:.0f} s on {device}{cost}")
    return lines if outcome["exit_code"] else [*lines, outcome["message"]]


def exit_with(outcome: Mapping[str, Any]) -> None:
    """End as the job did: with its sentences and its exit code, if that is not 0."""
    if outcome["exit_code"]:
        print_error(outcome["message"])
        raise SystemExit(outcome["exit_code"])


def status(runs: modal.Volume, run_id: str | None) -> None:
    """Print how a run stands, or every run there is, by what was last committed to the volume."""
    if run_id is not None:
        print("\n".join(run_status(runs, run_id)))
        return
    for entry in runs.iterdir("/", recursive=False):
        with suppress(InvalidInputError):  # a folder of something else
            print("\n".join(run_status(runs, entry.path.strip("/"))))


def run_status(runs: modal.Volume, run_id: str) -> list[str]:
    manifest = json.loads(_read(runs, run_id, "manifest.json"))
    device, steps = manifest.get("device", "no device yet"), manifest["settings"]["TAGGER_TRAIN_MAX_STEPS"]
    lines = [f"{run_id}: {manifest['status']}, begun {manifest['started']} on {device}"]
    with suppress(InvalidInputError, IndexError):  # no step has been logged yet
        last = json.loads(_read(runs, run_id, "log.jsonl").splitlines()[-1])
        lines.append(f"  step {last['step']} of {steps}, loss {last['loss']:.4f}")
    lines.append("  seconds: " + ", ".join(f"{name} {seconds:g}" for name, seconds in manifest["timings"].items()))
    if manifest.get("published"):
        lines.append(f"  the adapter is at {manifest['published']['url']}")
    return lines


def fetch(runs: modal.Volume, run_id: str, to: Path) -> Path:
    """Bring a run's folder down: whole, or not at all; one that is there is only replaced by the same run, later."""
    import modal

    target = to / run_id
    began = json.loads(_read(runs, run_id, "manifest.json"))["started"]
    if target.exists() and (not (target / "manifest.json").is_file() or read_manifest(target)["started"] != began):
        raise InvalidInputError(
            f"{target} is there already and is not this run; remove it, or name another folder with --to"
        )
    to.mkdir(parents=True, exist_ok=True)
    try:
        with atomic_directory(target) as folder:
            for entry in runs.iterdir(run_id, recursive=True):
                if entry.type == modal.types.FileEntryType.FILE:
                    download_file(runs, entry.path, folder / PurePosixPath(entry.path).relative_to(run_id), entry.size)
    except (FileNotFoundError, modal.exception.NotFoundError) as error:
        raise InvalidInputError(f"{run_id} changed while it was fetched ({error}); fetch it again") from error
    return target


def download_file(runs: modal.Volume, path: str, to: Path, size: int) -> None:
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


def shards(texts: Sequence[str]) -> list[list[str]]:
    """The texts in parts for one container each, in order."""
    return [list(texts[i : i + SHARD]) for i in range(0, len(texts), SHARD)]


def collect(texts: Sequence[str], outcomes: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The answers of all parts, in order; ends as a part that was refused.

    Raises RuntimeError unless there is one answer for each text, and for that very text.
    """
    answers: list[dict[str, Any]] = []
    for outcome in outcomes:
        exit_with(outcome)
        answers += outcome["answers"]
    if [answer["text"] for answer in answers] != list(texts):
        raise RuntimeError("the answers are not those for the texts that were sent; nothing is written")
    return answers


def show_answers(answers: Iterable[Mapping[str, Any]]) -> None:
    """Print a line for each answer, as `tagger-job sample` does."""
    for answer in answers:
        print(TaggedText(**answer))


def save_answers(answers: Sequence[Mapping[str, Any]], output: Path) -> None:
    """Write the answers as JSON lines, whole."""
    atomic_write(output, json_lines(answers))
    print(f"{len(answers)} texts are tagged, in {output}")


def _exit(error: JobError) -> NoReturn:
    print_error(str(error))
    raise SystemExit(error.exit_code)
