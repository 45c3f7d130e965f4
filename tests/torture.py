"""Kill runs at random points, resume them, and compare their results with a run that was never killed.

`make torture`. Each attempt is its own process, forked from one that has already imported torch, so that
kills hit the job's work and not its imports. It runs the job's real entry point, downloads from and
pushes to a Hub on loopback, and is killed with a real SIGTERM, SIGINT or SIGKILL.

With `--processes 1 2 3`, each attempt trains with one of these numbers of processes, and the one that is killed is the
one that was started or one of those that it started.

With `--store`, the run is kept in object storage on loopback that fails now and then, and most attempts begin on an
empty disk.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import conftest  # sets the Hub's address and an empty cache, before huggingface_hub is imported
import psutil
import s3
import torch
from hub import WRITE_TOKEN, Hub, Repo

from job import cli

SETTINGS = {
    "TAGGER_BASE_MODEL": "tiny/llama",
    "TAGGER_DATA_DATASET": "tiny/sayings",
    "TAGGER_DATA_LIMIT": "120",
    "TAGGER_DATA_EVAL_SIZE": "24",
    "TAGGER_TRAIN_MAX_STEPS": "40",
    "TAGGER_TRAIN_WARMUP_STEPS": "4",
    "TAGGER_TRAIN_LOGGING_STEPS": "3",
    "TAGGER_TRAIN_SAVE_STEPS": "4",
    "TAGGER_TRAIN_LR_SCHEDULER_TYPE": "constant",
    "TAGGER_TRAIN_WEIGHT_AVERAGING": "0.5",
    "TAGGER_SAMPLE_PROMPTS": '["a song about rain", "two coins"]',
    "TAGGER_SAMPLE_MAX_NEW_TOKENS": "16",
    "TAGGER_RUN_DEVICE": "cpu",
    "TAGGER_RUN_ID": "run",
    "TAGGER_TRAIN_MICRO_BATCH_TOKENS": "200",  # the split then does not depend on the number of processes
    "TAGGER_EVAL_GATE": "floor",  # publish through a candidate and its promotion
    "HF_TOKEN": WRITE_TOKEN,
}
COMPARED_FILES = (
    "adapter/adapter_model.safetensors",
    "adapter/adapter_config.json",
    "log.jsonl",
    "predictions.jsonl",
    "samples.jsonl",
)
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGKILL)
TIMEOUT = 120.0
"""Seconds in which a process must end."""
STARTUP_SECONDS = 0.05
"""The time until a process has reached the job's entry point."""
START_SECONDS = 10.0
"""The time until processes that the job starts have begun to train."""
MAX_ATTEMPTS = 12


@dataclass
class Tally:
    """What was killed, and what went wrong."""

    kills: Counter[str] = field(default_factory=Counter)
    chapters: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    """From SIGTERM or SIGINT to the end of the process."""
    problems: list[str] = field(default_factory=list)


def start_job(folder: Path, repo: str, processes: int = 1) -> int:
    """Fork a process that runs the job in this folder, with several processes; return its process id."""
    pid = os.fork()
    if pid:
        return pid
    try:
        os.chdir(folder)
        output = os.open(folder / "output", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.environ.update(SETTINGS, TAGGER_HUB_REPO=repo, TAGGER_RUN_PROCESSES=str(processes))
        sys.argv = ["tagger-job"]
        cli.command()
    except SystemExit as end:
        sys.stdout.flush()
        os._exit(int(end.code or 0))
    finally:
        os._exit(99)


def wait_for(pid: int, seconds: float) -> int | None:
    """Return the exit code of a process, negative for a signal; None if it has not ended after these seconds."""
    deadline = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            return None
        time.sleep(0.001)


def current_chapter(run: Path) -> str:
    """Guess the chapter of a run from its files."""
    if not (run / "manifest.json").exists():
        return "check, download, load"
    if json.loads((run / "manifest.json").read_text())["status"] == "passed":
        return "push, sample"
    if (run / "metrics.json").exists():
        return "save the adapter"
    if any((run / "checkpoints").glob("*.tmp")):
        return "write a checkpoint"
    if (run / "checkpoints" / "checkpoint-40").exists():
        return "evaluate"
    return "train"


def kill(pid: int, folder: Path, rng: random.Random, run_seconds: float, tally: Tally) -> int:
    """Kill a process after a random time, or while it writes a checkpoint; return its exit code.

    `run_seconds` is the time of a complete run.
    """
    code = _wait_for_moment(pid, folder, rng, run_seconds)
    if code is not None:
        return code
    chapter = current_chapter(folder / "runs" / "run")
    number = rng.choice(SIGNALS)
    children = psutil.Process(pid).children()
    victim = rng.choice([pid, *(child.pid for child in children)])
    started = time.monotonic()
    with suppress(ProcessLookupError):  # a child may have ended
        os.kill(victim, number)
    if victim == pid and number != signal.SIGKILL and rng.random() < 0.15:
        time.sleep(0.15)
        os.kill(pid, rng.choice(SIGNALS[:2]))
    code = wait_for(pid, TIMEOUT)
    if code is None:
        os.kill(pid, signal.SIGKILL)
        wait_for(pid, TIMEOUT)
        tally.problems.append(f"{number.name} did not end the process ({chapter})")
        return -1
    if number != signal.SIGKILL:
        tally.seconds.append(time.monotonic() - started)
    tally.kills[number.name if victim == pid else f"{number.name} of one of {len(children)}"] += 1
    tally.chapters[chapter] += 1
    killed = -number if victim == pid else 1
    if code != (killed if number == signal.SIGKILL else 75) and not (code == 0 and is_complete(folder)):
        who = "the process" if victim == pid else f"one of {len(children)} processes; the job ended"
        tally.problems.append(f"{number.name} ended {who} with code {code} ({chapter})")
    _, alive = psutil.wait_procs(children, timeout=20)
    if alive:
        tally.problems.append(f"{len(alive)} processes outlive {number.name} ({chapter})")
    return code


def _wait_for_moment(pid: int, folder: Path, rng: random.Random, run_seconds: float) -> int | None:
    """Wait for the random moment of a kill; return the exit code if the process ends before it."""
    if rng.random() >= 0.25:
        return wait_for(pid, rng.uniform(STARTUP_SECONDS, run_seconds))
    deadline = time.monotonic() + run_seconds
    checkpoints, code = folder / "runs" / "run" / "checkpoints", None
    while code is None and time.monotonic() < deadline and not any(checkpoints.glob("checkpoint-*.tmp")):
        code = wait_for(pid, 0)
    time.sleep(rng.uniform(0, 0.004))
    return code


def is_complete(folder: Path) -> bool:
    return bool(json.loads((folder / "runs" / "run" / "manifest.json").read_text())["status"] == "complete")


def result(folder: Path, hub: Hub, repo: str) -> dict[str, object]:
    """Return what must be equal for all runs: files, scores, samples, and what was published."""
    run = folder / "runs" / "run"
    metrics = json.loads((run / "metrics.json").read_text())
    del metrics["training"]["seconds"], metrics["gate"]["parent_commit"]
    published = hub.models[repo]
    return {
        **{name: (run / name).read_bytes() for name in COMPARED_FILES},
        "metrics": metrics,
        "the published adapter": published.branches["main"][-1].files["adapter_model.safetensors"],
        "the commits": [title.split()[0] for title in published.titles],  # a promotion's title names its candidate
        "the versions": list(published.tags),
        "the commit of v1": [published.tags.get("v1") == published.branches["main"][-1].oid],
    }


def torture(kills: int, seed: int, processes: Sequence[int] = (1,), store: s3.Store | None = None) -> Tally:
    """Kill processes at least `kills` times, and compare each resumed run with one that was not killed.

    Each attempt has one of these numbers of processes. With a `store`, most attempts lose their disk.
    """
    rng, tally = random.Random(seed), Tally()
    hub = conftest.SERVER.fresh()
    scratch = Path(tempfile.mkdtemp(prefix="tagger-torture-"))
    publish_base(hub, scratch)

    folder = new_folder(scratch, "reference")
    started = time.monotonic()
    assert wait_for(start_job(folder, "ada/reference"), TIMEOUT) == 0, (folder / "output").read_text()
    run_seconds = time.monotonic() - started
    expected = result(folder, hub, "ada/reference")

    trial = equal = 0
    while tally.kills.total() < kills:
        trial += 1
        folder, repo = new_folder(scratch, f"trial-{trial}"), f"ada/trial-{trial}"
        ended = run_with_kills(folder, repo, rng, run_seconds, tally, processes, store)
        different = differences(expected, result(folder, hub, repo)) if ended else ["it did not end"]
        equal += not different
        if different:
            tally.problems.append(f"trial {trial}: {', '.join(different)}; see {folder}")
        else:
            shutil.rmtree(folder)
        progress = f"{tally.kills.total()} kills, {equal} of {trial} runs ended equal"
        print(f"\r{progress}", end="", flush=True, file=sys.stderr)
    print(file=sys.stderr)
    print(f"{equal} of {trial} runs ended equal, after {tally.kills.total()} kills: {dict(tally.kills)}")
    print(f"killed in: {dict(tally.chapters)}")
    if tally.seconds:
        print(f"from signal to end: median {statistics.median(tally.seconds):.2f} s, max {max(tally.seconds):.2f} s")
    if not tally.problems:
        shutil.rmtree(scratch)
    return tally


def new_folder(scratch: Path, name: str) -> Path:
    """Create the folder of a run, and empty the download cache so that the run downloads."""
    folder = scratch / name
    folder.mkdir()
    shutil.rmtree(Path(conftest.HF_HOME) / "hub", ignore_errors=True)
    return folder


def run_with_kills(
    folder: Path,
    repo: str,
    rng: random.Random,
    run_seconds: float,
    tally: Tally,
    processes: Sequence[int],
    store: s3.Store | None,
) -> bool:
    """Start the job until it ends by itself, killing the first and some later attempts; return whether it succeeded."""
    for attempt in range(MAX_ATTEMPTS):
        if store is not None:
            os.environ["TAGGER_RUN_STORE"] = f"s3://{s3.BUCKET}/{folder.name}"
            kinds: list[Any] = ["503", "503", "slow", "lose_answer", "cut"]
            store.faults = [s3.Fault(rng.choice(("PUT", "GET")), rng.choice(kinds)) for _ in range(rng.randrange(4))]
            if rng.random() < 0.7:
                shutil.rmtree(folder / "runs", ignore_errors=True)
        number = rng.choice(processes)
        pid = start_job(folder, repo, number)
        killed = attempt == 0 or (attempt < 5 and rng.random() < 0.6)
        # those that the job starts import torch first, which takes some seconds
        seconds = run_seconds + START_SECONDS * (number > 1)
        code = kill(pid, folder, rng, seconds, tally) if killed else wait_for(pid, TIMEOUT)
        if code == 0:
            return True
    return False


def differences(expected: dict[str, object], found: dict[str, object]) -> list[str]:
    return [f"{name} differs" for name in expected if expected[name] != found[name]]


def publish_base(hub: Hub, scratch: Path) -> None:
    """Put a tiny base model and its data on the Hub."""
    rows = [json.loads(line) for line in conftest.SAYINGS.read_text(encoding="utf-8").splitlines()]
    conftest.make_llama(conftest.make_llama_tokenizer(rows), scratch / "base")
    base = hub.models["tiny/llama"] = Repo("tiny/llama")
    base.commit("main", "weights", {file.name: file.read_bytes() for file in (scratch / "base").iterdir()})
    data = hub.datasets["tiny/sayings"] = Repo("tiny/sayings")
    data.commit("main", "data", {"train.jsonl": conftest.SAYINGS.read_bytes()})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100, help="least number of kills")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random times and signals")
    parser.add_argument("--processes", type=int, nargs="+", default=[1], help="numbers to draw from at each start")
    parser.add_argument("--store", action="store_true", help="keep the runs in object storage, and lose their disks")
    options = parser.parse_args()
    for name in ("bitsandbytes", "datasets", "sklearn.metrics", "job.pipeline", "job.train", "job.push", "job.merge"):
        importlib.import_module(name)  # before the forks
    torch.set_num_threads(1)
    with ExitStack() as stack:
        store = None
        if options.store:
            store, variables = stack.enter_context(s3.serve())
            os.environ.update(variables)
        tally = torture(options.kills, options.seed, options.processes, store)
    for problem in tally.problems:
        print(f"WRONG: {problem}")
    sys.exit(bool(tally.problems))
