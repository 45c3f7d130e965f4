"""Measure what several processes cost: `python -m bench.processes`, or `make bench-processes`.

On the cores of one machine there is nothing to gain, so two processes of one thread against one process of two threads
show the overhead. The second table is the exchange alone: the weights to the others, and the exact sums back.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.bases import SMOLLM2
from bench.measure import describe
from job.distributed.group import Group
from job.distributed.place import Place
from job.system.device import ComputeSpec
from job.training.gradients import ExactSum

ADAPTERS = {"bloomz-560m, attention, r=16": 1_572_864, "SmolLM2-135M, all layers, r=16": 4_884_480}


def main() -> None:
    """Print both tables as Markdown."""
    parser = argparse.ArgumentParser(prog="python -m bench.processes", description=__doc__)
    parser.add_argument("--base", default=SMOLLM2, help="a TAGGER_BASE_MODEL")
    parser.add_argument("--steps", type=int, default=4, help="measured steps, after one to warm up")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    options = parser.parse_args()
    print(f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}; {describe(ComputeSpec.resolve('cpu', 'fp32'))}\n")
    print("| processes | threads for each | seconds a step, median (all rounds) | one process = 1 |\n|---|---|---|---|")
    measured: dict[int, list[float]] = {number: [] for number in options.processes}
    for _ in range(options.rounds):
        for number in options.processes:  # alternating, so that a machine that slows down slows all
            measured[number].append(seconds_per_step(number, options.base, options.steps))
    for number, seconds in measured.items():
        ratios = [mine / one for mine, one in zip(seconds, measured[options.processes[0]], strict=True)]
        rounds = ", ".join(f"{second:.2f}" for second in seconds)
        threads = torch.get_num_threads() // number
        print(
            f"| {number} | {threads} | {statistics.median(seconds):.2f} ({rounds}) | {statistics.median(ratios):.2f} |"
        )
    print("\n| adapter parameters | | exact sum of a micro-batch, ms | exchange of a step, ms |\n|---|---|---|---|")
    for name, parameters in ADAPTERS.items():
        exchanged = in_processes(max(options.processes), lambda group, n=parameters: exchange(group, n))
        print(f"| {parameters:,} | {name} | {1000 * exact_sum(parameters):.1f} | {1000 * exchanged:.1f} |")


def seconds_per_step(processes: int, base: str, steps: int) -> float:
    """Run the job and return the seconds of a step after the first."""
    with tempfile.TemporaryDirectory() as folder:
        environ = os.environ | {
            "TAGGER_BASE_MODEL": base,
            "TAGGER_DATA_DATASET": "package:job/dataset/sayings.jsonl",
            "TAGGER_DATA_EVAL_SIZE": "2",
            "TAGGER_LORA_TARGETS": "all-linear",
            "TAGGER_TRAIN_MAX_STEPS": str(1 + steps),
            "TAGGER_TRAIN_WARMUP_STEPS": "1",
            "TAGGER_TRAIN_LOGGING_STEPS": "1",
            "TAGGER_SAMPLE_MAX_NEW_TOKENS": "2",
            "TAGGER_RUN_DEVICE": "cpu",
            "TAGGER_RUN_PROCESSES": str(processes),
            "TAGGER_RUN_DIR": folder,
            "TAGGER_HUB_PUSH": "never",
        }
        command, quiet = [sys.executable, "-m", "job"], subprocess.DEVNULL
        log = subprocess.run(command, env=environ, stdout=quiet, stderr=subprocess.PIPE, text=True, check=True)
    seconds = [float(found) for found in re.findall(r"([\d.]+) s a step", log.stderr)]
    return statistics.median(seconds[1:])


def exact_sum(parameters: int) -> float:
    """Return the seconds in which one micro-batch's gradient is added."""
    exact = ExactSum([torch.nn.Parameter(torch.randn(parameters))], torch.device("cpu"))
    exact.reset()
    return _median(lambda: exact.add(torch.tensor(1.0), count=4, loss_scale=1.0, fraction_bits=50))


def exchange(group: Group, parameters: int) -> float:
    """Return the seconds in which weights are sent and sums are received."""
    weights, sums = torch.zeros(parameters), torch.zeros(parameters, dtype=torch.int64)

    def step() -> None:
        group.broadcast(weights)
        group.sum(sums)

    return _median(step)


def _median(work: Callable[[], object], times: int = 15) -> float:
    seconds = []
    for _ in range(times):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def in_processes(size: int, work: Callable[[Group], Any]) -> Any:
    """Return what `work` returns in process 0 of some forked processes."""
    from job.distributed.group import connect

    store = connect("127.0.0.1", 0, hosts=True, seconds=10)
    with tempfile.TemporaryDirectory() as folder:
        file, pids = Path(folder, "result.json"), []
        for rank in range(size):
            if (pid := os.fork()) == 0:
                torch.set_num_threads(1)
                group = Group.meet(Place(rank, size, size, "127.0.0.1", store.port), {})
                group.start()
                result = work(group)
                if rank == 0:
                    file.write_text(json.dumps(result))
                os._exit(0)
            pids.append(pid)
        for pid in pids:
            os.waitpid(pid, 0)
        return json.loads(file.read_text())


if __name__ == "__main__":
    main()
