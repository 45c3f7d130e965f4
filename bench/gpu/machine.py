"""The GPU itself: driver, compute capability, memory, MIG, ECC errors, other processes, and what the job says of it."""

from __future__ import annotations

import os
import shutil
import subprocess

import torch

from bench.gpu.harness import Row, Rows, installed
from bench.gpu.models import Work
from job.system.device import has_kernels

OPTIONAL = {
    "bitsandbytes": "int8 and nf4",
    "pydantic_settings": "the training loop, the recipe as written",
    "trl": "TRL's best",
}
"""What needs a package that may be missing, other than a check as a whole."""
QUERY = ("driver_version", "mig.mode.current", "ecc.errors.uncorrected.volatile.total", "memory.used", "memory.total")


def check_machine(work: Work) -> Rows:
    """Show what the GPU is, and check that PyTorch has kernels for it and that the job would use it."""
    yield Row("versions", None, f"torch {torch.__version__}, CUDA {torch.version.cuda}; {_job_device(work)}")
    missing = [f"{name} ({use})" for name, use in OPTIONAL.items() if not installed(name)]
    yield Row("packages", None, f"skipped without: {', '.join(missing)}" if missing else "all are installed")
    if work.device.type == "cpu":
        return
    properties = torch.cuda.get_device_properties(work.device)
    capability = (properties.major, properties.minor)
    kernels = torch.cuda.get_arch_list()
    free, total = torch.cuda.mem_get_info(work.device)
    yield Row(
        "capability",
        has_kernels(capability, kernels),
        f"{properties.name}, {capability[0]}.{capability[1]}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free, "
        f"{properties.multi_processor_count} multiprocessors; PyTorch has kernels for {', '.join(kernels)}",
    )
    yield Row(
        "visible GPUs",
        None,
        f"{torch.cuda.device_count()}; CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES', 'not set')}",
    )
    yield Row("nvidia-smi", None, _nvidia_smi())


def _job_device(work: Work) -> str:
    return f"the job computes on {work.compute()}"


def _nvidia_smi() -> str:
    """Return driver, MIG, ECC errors, memory and the number of processes, as nvidia-smi reports them."""
    if shutil.which("nvidia-smi") is None:
        return "no nvidia-smi here"
    values = _query(["--query-gpu=" + ",".join(QUERY)])
    processes = _query(["--query-compute-apps=pid,used_memory"])
    found = ", ".join(f"{name} {value.strip()}" for name, value in zip(QUERY, values.split(","), strict=False))
    return f"{found}; {len(processes.splitlines())} processes on the GPU"


def _query(arguments: list[str]) -> str:
    words = ["nvidia-smi", *arguments, "--format=csv,noheader"]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=20)
    return done.stdout.strip()
