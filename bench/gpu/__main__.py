"""Check the job on a GPU: `python -m bench.gpu`, or `make gpu-check`.

Needs torch, transformers, peft and accelerate, no network and no Hub. A check that needs another package is skipped,
with the name of the package. `--device cpu` makes each check with tiny models, to see that it runs.
"""

from __future__ import annotations

import argparse
import datetime
import json
import logging
import os
import shutil
import sys
import tempfile
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench.gpu.harness import HEADER, Check, line, run_checks
from bench.gpu.models import Work
from bench.measure import describe

LOOP = ("pydantic_settings", "psutil")
"""What the training loop and the settings need in addition."""


JOB = (*LOOP, "datasets", "httpx2", "regex", "jinja2", "scipy", "sklearn", "matplotlib", "pyarrow", "gguf")
"""What the complete job needs in addition."""


def checks(recipe_steps: int = 200) -> list[Check]:
    """Return every check, in order: first what shows where the time goes."""
    from bench.gpu import alternatives, decoding, gradients, machine, memory, processes, recipe, speed, training

    return [
        Check("machine", machine.check_machine, seconds=10),
        Check("profile", speed.check_profile, seconds=25),
        Check("kernels", gradients.check_kernels, seconds=15),
        Check("speed", speed.check_speed, seconds=100),
        Check("gradients", gradients.check_gradients, seconds=150),
        Check("alternatives", alternatives.check_alternatives, seconds=40),
        Check("memory", memory.check_memory, seconds=15),
        Check("overflow", training.check_overflow, seconds=15),
        Check("out-of-memory", training.check_out_of_memory, LOOP, seconds=20),
        Check("recipe", recipe.check_recipe, JOB, seconds=50 + recipe_steps // 2),
        Check("processes", processes.check_processes, JOB, seconds=45),
        Check("resume", training.check_resume, LOOP, seconds=25),
        Check("decoding", decoding.check_decoding, JOB, seconds=40),
    ]


def main() -> int:
    """Run the checks that are chosen, print the table, and return the exit code: 1 if one failed."""
    options = _parser([check.name for check in checks()]).parse_args()
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        print("PyTorch sees no GPU here; --device cpu makes a dry run with tiny models", file=sys.stderr)
        return 2
    _quiet()
    by_name = {check.name: check for check in checks(options.recipe_steps)}
    chosen = [by_name[name] for name in options.only or by_name if name not in options.skip]
    seconds = 60 * options.minutes - seconds_so_far()
    if device.type == "cpu":  # slower, even with tiny models
        chosen, seconds = [replace(check, seconds=4 * check.seconds) for check in chosen], 4 * seconds
    torch.backends.cuda.enable_cudnn_sdp(False)  # as job.system.device does
    with tempfile.TemporaryDirectory(dir=_memory_folder()) as folder:
        sizes = {"steps": options.steps, "rounds": options.rounds, "complete_steps": options.recipe_steps}
        work = Work(device, Path(folder), device.type == "cpu", **sizes)
        head = {"when": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")}
        head["machine"] = describe(work.compute())
        print(f"{head['when']}; {head['machine']}\n\n{HEADER}", flush=True)
        record: list[dict[str, Any]] = []

        def report(row: dict[str, Any]) -> None:
            print(line(row), flush=True)
            record.append(row)
            if options.json:
                options.json.write_text(json.dumps({**head, "checks": record}, indent=1) + "\n", encoding="utf-8")

        rows = run_checks(chosen, work, seconds=seconds, report=report)
    counts = {status: sum(row["status"] == status for row in rows) for status in ("pass", "FAIL", "figure", "skipped")}
    print(f"\n{', '.join(f'{n} {status}' for status, n in counts.items())}")
    return int(counts["FAIL"] > 0)


def seconds_so_far() -> float:
    """Return the seconds since this process started; importing the libraries takes some of them."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def _memory_folder() -> str | None:
    """Return a folder in memory if there is room for a model: a slow disk would be measured otherwise."""
    folder = Path("/dev/shm")
    roomy = folder.is_dir() and os.access(folder, os.W_OK) and shutil.disk_usage(folder).free > 4 * 2**30
    return str(folder) if roomy else None


def _quiet() -> None:
    """Keep the libraries' progress bars, and their warnings at every step, out of the table."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)


def _parser(names: list[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.partition("\n\n")[2])
    parser.add_argument("--device", choices=["cuda", "cpu"], help="cpu: a dry run with tiny models; default: a GPU")
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help=f"in this order: {', '.join(names)}")
    parser.add_argument("--skip", nargs="+", choices=names, metavar="NAME", default=[])
    parser.add_argument(
        "--minutes", type=float, default=8, help="since the start; checks that may end later are skipped"
    )
    parser.add_argument("--steps", type=int, default=4, help="steps that the speed is measured over in a round (4)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds in which all ways to train take turns (3)")
    parser.add_argument("--recipe-steps", type=int, default=200, help="steps of the complete recipe (200)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the record to FILE, after each row")
    return parser


if __name__ == "__main__":
    sys.exit(main())
