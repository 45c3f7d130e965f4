"""Two processes that share one GPU train the adapter that one process trains."""

from __future__ import annotations

import json
import socket
import subprocess

from safetensors.torch import load_file

from bench.gpu.harness import Row, Rows
from bench.gpu.models import Work
from bench.gpu.recipe import command
from bench.gpu.training import largest_difference

TOLERANCE = 1e-5


def check_processes(work: Work) -> Rows:
    """Start a process alone, and two that meet as a launcher would start them that does not count GPUs."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    settings = {"train_max_steps": 4, "train_warmup_steps": 1, "data_limit": 60, "data_eval_size": 8}
    settings |= {"train_micro_batch_tokens": 300, "sample_max_new_tokens": 12}
    work.release()
    started, folders = {}, {}
    for name, more in {"alone": {}, "0": {"RANK": "0", **meeting}, "1": {"RANK": "1", **meeting}}.items():
        folders[name] = work.folder / "processes" / name
        words, environment = command(work, folders[name], **settings)
        started[name] = subprocess.Popen(
            words,
            cwd=folders[name],
            env=environment | more,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
    try:
        errors = {name: process.communicate()[1] for name, process in started.items()}
    finally:
        for process in started.values():
            process.kill()
    codes = [process.returncode for process in started.values()]
    if codes != [0, 0, 0]:
        ends = "; ".join(" ".join(error.split())[-300:] for error in errors.values())
        yield Row("", False, f"ended with {codes}: {ends}")
        return
    runs = [folders[name] / "runs" / "check" for name in ("alone", "0")]
    alone, together = (load_file(run / "adapter" / "adapter_model.safetensors") for run in runs)
    apart = largest_difference(alone, together)
    losses = [[json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines()] for run in runs]
    figure = f"largest difference of the adapters {apart:.1e}; last loss {losses[1][-1]:.4f}, alone {losses[0][-1]:.4f}"
    yield Row("two on one GPU", apart <= TOLERANCE, figure, {"difference": apart, "losses": losses})
