"""Kill whole runs at random points, resume them, and compare how they end with one that was never killed.

`make torture`. Each attempt is a process of its own, forked from one that has torch imported already, so
that kills fall on the work and not on imports; it runs the job's real entry point, downloads from and
pushes to a Hub on loopback, and is killed by the kernel: SIGTERM, SIGINT or SIGKILL.
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
from dataclasses import dataclass, field
from pathlib import Path

import conftest  # the Hub's address and an empty cache, before huggingface_hub is imported
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
    "TAGGER_EVAL_GATE": "floor",  # so that it is published by a candidate and its promotion
    "HF_TOKEN": WRITE_TOKEN,
}
SAME = (
    "adapter/adapter_model.safetensors",
    "adapter/adapter_config.json",
    "log.jsonl",
    "predictions.jsonl",
    "samples.jsonl",
)
KILLS = (signal.SIGTERM, signal.SIGINT, signal.SIGKILL)
LONGEST = 120.0
STARTED = 0.05
"""Seconds after which a process has come to the job's entry point."""


@dataclass
class Tally:
    kills: Counter[str] = field(default_factory=Counter)
    chapters: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    """From SIGTERM or SIGINT to the end of the process."""
    wrong: list[str] = field(default_factory=list)


def attempt(folder: Path, repo: str) -> int:
    """Fork a process that runs the job in this folder; returns its id."""
    pid = os.fork()
    if pid:
        return pid
    try:
        os.chdir(folder)
        output = os.open(folder / "output", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.environ.update(SETTINGS, TAGGER_HUB_REPO=repo)
        sys.argv = ["tagger-job"]
        cli.command()
    except SystemExit as end:
        sys.stdout.flush()
        os._exit(int(end.code or 0))
    finally:
        os._exit(99)


def ended(pid: int, seconds: float) -> int | None:
    """The exit code of a process that ends within so many seconds, negative for a signal; None if it goes on."""
    deadline = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            return None
        time.sleep(0.001)


def where(run: Path) -> str:
    """The chapter that a run seems to be in, by its files."""
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


def kill(pid: int, folder: Path, chance: random.Random, longest: float, tally: Tally) -> int:
    """Let a process work for a random time, or until it writes a checkpoint, then kill it; returns its exit code."""
    if chance.random() < 0.25:
        deadline = time.monotonic() + longest
        checkpoints, code = folder / "runs" / "run" / "checkpoints", None
        while code is None and time.monotonic() < deadline and not any(checkpoints.glob("checkpoint-*.tmp")):
            code = ended(pid, 0)
        time.sleep(chance.uniform(0, 0.004))
    else:
        code = ended(pid, chance.uniform(STARTED, longest))
    if code is not None:
        return code
    chapter = where(folder / "runs" / "run")
    by = chance.choice(KILLS)
    started = time.monotonic()
    os.kill(pid, by)
    if by != signal.SIGKILL and chance.random() < 0.15:
        time.sleep(0.15)
        os.kill(pid, chance.choice(KILLS[:2]))
    code = ended(pid, LONGEST)
    if code is None:
        os.kill(pid, signal.SIGKILL)
        ended(pid, LONGEST)
        tally.wrong.append(f"{by.name} did not end it ({chapter})")
        return -1
    if by != signal.SIGKILL:
        tally.seconds.append(time.monotonic() - started)
    tally.kills[by.name] += 1
    tally.chapters[chapter] += 1
    if code != (-by if by == signal.SIGKILL else 75) and not (code == 0 and complete(folder)):
        tally.wrong.append(f"{by.name} ended it with {code} ({chapter})")
    return code


def complete(folder: Path) -> bool:
    return bool(json.loads((folder / "runs" / "run" / "manifest.json").read_text())["status"] == "complete")


def result(folder: Path, hub: Hub, repo: str) -> dict[str, object]:
    """All that must be equal: files, scores, samples, and what was published."""
    run = folder / "runs" / "run"
    metrics = json.loads((run / "metrics.json").read_text())
    del metrics["training"]["seconds"], metrics["gate"]["parent"]
    published = hub.models[repo]
    return {
        **{name: (run / name).read_bytes() for name in SAME},
        "metrics": metrics,
        "the published adapter": published.branches["main"][-1].files["adapter_model.safetensors"],
        "the commits": [title.split()[0] for title in published.titles],  # a promotion names what it promotes
        "the tags": list(published.tags),
        "what is tagged": [published.tags.get("v1") == published.branches["main"][-1].oid],
    }


def torture(kills: int, seed: int) -> Tally:
    """Kill at least so many processes, and compare each run that came through with one that was not killed."""
    chance, tally = random.Random(seed), Tally()
    hub = conftest.SERVER.fresh()
    scratch = Path(tempfile.mkdtemp(prefix="tagger-torture-"))
    publish_base(hub, scratch)

    def begin(name: str) -> Path:
        folder = scratch / name
        folder.mkdir()
        shutil.rmtree(Path(conftest.HF_HOME) / "hub", ignore_errors=True)  # so that each run downloads
        return folder

    folder = begin("reference")
    started = time.monotonic()
    assert ended(attempt(folder, "ada/reference"), LONGEST) == 0, (folder / "output").read_text()
    longest = time.monotonic() - started
    expected = result(folder, hub, "ada/reference")

    trial = equal = 0
    while tally.kills.total() < kills:
        trial += 1
        folder, repo = begin(f"trial-{trial}"), f"ada/trial-{trial}"
        code: int | None = -1
        for attempts in range(12):
            pid = attempt(folder, repo)
            hurt = attempts == 0 or (attempts < 5 and chance.random() < 0.6)
            code = kill(pid, folder, chance, longest, tally) if hurt else ended(pid, LONGEST)
            if code == 0:
                break
        differ = ["it did not end"] if code else differences(expected, result(folder, hub, repo))
        equal += not differ
        if differ:
            tally.wrong.append(f"trial {trial}: {', '.join(differ)}; see {folder}")
        else:
            shutil.rmtree(folder)
        print(
            f"\r{tally.kills.total()} kills, {equal} of {trial} runs ended equal", end="", flush=True, file=sys.stderr
        )
    print(file=sys.stderr)
    print(f"{equal} of {trial} runs ended equal, after {tally.kills.total()} kills: {dict(tally.kills)}")
    print(f"killed in: {dict(tally.chapters)}")
    if tally.seconds:
        print(f"from signal to end: median {statistics.median(tally.seconds):.2f} s, most {max(tally.seconds):.2f} s")
    if not tally.wrong:
        shutil.rmtree(scratch)
    return tally


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
    parser.add_argument("--kills", type=int, default=100, help="kill at least so many processes")
    parser.add_argument("--seed", type=int, default=0, help="of times and signals")
    options = parser.parse_args()
    for name in ("bitsandbytes", "datasets", "sklearn.metrics", "job.pipeline", "job.train", "job.push", "job.merge"):
        importlib.import_module(name)  # before the forks
    torch.set_num_threads(1)
    found = torture(options.kills, options.seed)
    for line in found.wrong:
        print(f"WRONG: {line}")
    sys.exit(bool(found.wrong))
