"""Kill workers of `tagger-job tag` at random moments; the answers must be the same bytes as without a kill.

`make torture-tag`. Each worker is a process of its own, forked from one that has already imported torch, and runs the
job's real entry point with a real model. Several share the parts of a job, and all or some are killed with SIGKILL or
SIGTERM. Some parts and seals are torn in between. A trial ends when a last worker has done what is left.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import conftest
import torch

from job import cli

ROWS, PART_ROWS, WORKERS = 240, 8, 3
TIMEOUT = 120.0
OUTPUTS = ("out/", "out.jsonl.gz", "out.csv", "out.parquet/")


def start(folder: Path, output: str, shard: str) -> int:
    """Fork a worker; return its process id."""
    pid = os.fork()
    if pid:
        return pid
    try:
        os.chdir(folder)
        log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ.update(TAGGER_TAG_OUTPUT=output, TAGGER_TAG_SHARD=shard)
        sys.argv = ["tagger-job", "tag"]
        cli.command()
    except SystemExit as end:
        os._exit(int(end.code or 0))
    finally:
        os._exit(99)


def wait_for(pid: int) -> int | None:
    """Return the exit code of a process, negative for a signal; None if it does not end."""
    deadline = time.monotonic() + TIMEOUT
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    return None


def answers(folder: Path, output: str) -> dict[str, bytes]:
    """Return the files of a job, without temporary ones: there must be none."""
    place = folder / output
    if not output.endswith("/"):
        return {output: place.read_bytes()}
    return {str(path.relative_to(place)): path.read_bytes() for path in place.rglob("*") if path.is_file()}


def tear(folder: Path, output: str, rng: random.Random) -> bool:
    """Damage a part or a seal that is there; return whether there was one."""
    place = folder / (output if output.endswith("/") else f".{output}.parts")
    found = sorted(path for path in place.rglob("part-*") if path.is_file() and path.suffix != ".tmp")
    if not found:
        return False
    victim = rng.choice(found)
    content = victim.read_bytes()
    victim.write_bytes(content[: rng.randrange(len(content))])
    return True


def trial(folder: Path, output: str, rng: random.Random, tally: Counter[str]) -> str | None:
    """Run workers and kill them, three rounds; return what was wrong in the end."""
    for _ in range(3):
        pids = [start(folder, output, f"{index}/{WORKERS}") for index in range(WORKERS)]
        time.sleep(rng.uniform(0.02, 1.2))
        for pid in pids:
            name = rng.choice(("SIGKILL", "SIGKILL", "SIGTERM"))
            os.kill(pid, getattr(signal, name))
            code = wait_for(pid)
            if code is None:
                return f"a worker did not end after {name}"
            if code not in (0, 75, -signal.SIGKILL, -signal.SIGTERM):  # before the handler is there, SIGTERM ends it
                return f"a worker ended with {code} after {name}"
            tally[name if code else "ended before"] += 1
        tally["torn files"] += rng.random() < 0.5 and tear(folder, output, rng)
    code = wait_for(start(folder, output, "0/1"))
    return None if code == 0 else f"the last worker ended with {code}"


def prepare(scratch: Path) -> None:
    """Train a tiny tagger, and write the texts."""
    rows = [json.loads(line) for line in conftest.SAYINGS.read_text(encoding="utf-8").splitlines()]
    conftest.make_llama(conftest.make_llama_tokenizer(rows), scratch / "llama")
    texts = [{"id": i, "quote": f"{rows[i % len(rows)]['quote']} ({i})"} for i in range(ROWS)]
    (scratch / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts), encoding="utf-8")
    os.environ.update(
        TAGGER_BASE_MODEL=str(scratch / "llama"),
        TAGGER_DATA_DATASET=str(conftest.SAYINGS),
        TAGGER_DATA_LIMIT="60",
        TAGGER_DATA_EVAL_SIZE="8",
        TAGGER_TRAIN_MAX_STEPS="3",
        TAGGER_TRAIN_WARMUP_STEPS="1",
        TAGGER_SAMPLE_MAX_NEW_TOKENS="12",
        TAGGER_RUN_DEVICE="cpu",
        TAGGER_RUN_DIR=str(scratch / "runs"),
        TAGGER_RUN_ID="tiny",
        TAGGER_TAG_INPUT=str(scratch / "in.jsonl"),
        TAGGER_TAG_PART_ROWS=str(PART_ROWS),
    )
    assert cli.main(["run"]) == 0


def torture(kills: int, seed: int) -> list[str]:
    """Kill at least so many workers; return what was wrong."""
    rng, tally, problems = random.Random(seed), Counter[str](), []
    scratch = Path(tempfile.mkdtemp(prefix="tagger-torture-tag-"))
    prepare(scratch)
    expected = {}
    for output in OUTPUTS:
        folder = scratch / f"expected-{output.rstrip('/')}"
        folder.mkdir()
        assert wait_for(start(folder, output, "0/1")) == 0, (folder / "log").read_text()
        expected[output] = answers(folder, output)
    number = 0
    while tally["SIGKILL"] + tally["SIGTERM"] < kills:
        output = OUTPUTS[number % len(OUTPUTS)]
        number += 1
        folder = scratch / f"trial-{number}"
        folder.mkdir()
        problem = trial(folder, output, rng, tally)
        if problem is None and answers(folder, output) != expected[output]:
            problem = "the answers differ"
        if problem is None:
            shutil.rmtree(folder)
        else:
            problems.append(f"trial {number}, {output}: {problem}; see {folder}")
        print(f"\r{dict(tally)}, {number - len(problems)} of {number} equal", end="", flush=True, file=sys.stderr)
    print(file=sys.stderr)
    print(f"{number - len(problems)} of {number} jobs ended with the same bytes: {dict(tally)}")
    if not problems:
        shutil.rmtree(scratch)
    return problems


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100, help="least number of kills")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random times and signals")
    options = parser.parse_args()
    for name in ("bitsandbytes", "datasets", "sklearn.metrics", "job.pipeline", "job.train", "job.tag", "job.sample"):
        importlib.import_module(name)  # before the forks
    torch.set_num_threads(1)
    found = torture(options.kills, options.seed)
    for problem in found:
        print(f"WRONG: {problem}")
    sys.exit(bool(found))
