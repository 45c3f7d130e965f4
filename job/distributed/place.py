"""The place of a process among the processes of its run: from a launcher's variables, or from the job's own launch."""

from __future__ import annotations

import ctypes
import json
import os
import signal
from collections.abc import Mapping, MutableMapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from job.errors import INTERRUPTED, InvalidInputError

WORKER = "_TAGGER_WORKER"
"""Set by the job for the processes that it starts: the file with what they need to know."""
DEFAULT_PORT = 29500
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Place:
    """One process among `size` that train together, and where they meet."""

    rank: int
    size: int
    local_size: int
    """The number of processes on this machine."""
    address: str
    """Where the store is in which the processes find each other."""
    port: int
    hosts_store: bool = False
    attempt: str = "0"
    """Distinguishes attempts that meet in the same store."""


@dataclass(frozen=True)
class Machines:
    """The machines of a run, on each of which the job was started once."""

    count: int = 1
    number: int = 0
    """The number of this machine."""
    address: str = "127.0.0.1"
    port: int = 0
    processes: int | None = None
    """The number of processes on this machine, where the launcher sets it."""


def from_launcher(environ: Mapping[str, str] = os.environ) -> Place | None:
    """Return the place that a launcher such as torchrun gave this process; None if it trains alone or starts others.

    Raises InvalidInputError for variables that contradict each other.
    """
    if WORKER in environ or not {"RANK", "WORLD_SIZE"} & environ.keys():
        return None
    rank, size = _number(environ, "RANK"), _number(environ, "WORLD_SIZE")
    if rank >= size:
        raise InvalidInputError(f"RANK={rank} is not below WORLD_SIZE={size}; number the processes from 0")
    if size == 1:
        return None
    if not environ.get("MASTER_ADDR"):
        raise InvalidInputError(
            f"WORLD_SIZE={size} and MASTER_ADDR is not set; set it to the address of the process with RANK=0"
        )
    return Place(
        rank,
        size,
        _number(environ, "LOCAL_WORLD_SIZE", size),
        environ["MASTER_ADDR"],
        _number(environ, "MASTER_PORT", DEFAULT_PORT),
        hosts_store=rank == 0 and environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
        attempt=environ.get("TORCHELASTIC_RESTART_COUNT", "0"),
    )


def machines(environ: Mapping[str, str] = os.environ) -> Machines:
    """Return the machines of this run: from NNODES, NODE_RANK and MASTER_ADDR, or torchrun's PET_ variables.

    In an Indexed Job of Kubernetes, JOB_COMPLETION_INDEX is the number of the machine.
    Raises InvalidInputError for variables that are missing or contradict each other.
    """
    names = {name: next((n for n in (name, f"PET_{name}") if environ.get(n)), name) for name in _VARIABLES}
    processes = environ.get(names["NPROC_PER_NODE"], "")
    own = int(processes) if processes.isascii() and processes.isdigit() and int(processes) else None
    count = _number(environ, names["NNODES"], 1)
    if count <= 1:
        return Machines(processes=own)
    if not environ.get(names["NODE_RANK"]) and environ.get("JOB_COMPLETION_INDEX"):
        names["NODE_RANK"] = "JOB_COMPLETION_INDEX"
    if not environ.get(names["MASTER_ADDR"]):
        raise InvalidInputError(
            f"{names['NNODES']}={count} and MASTER_ADDR is not set; set it to the address of machine 0"
        )
    number = _number(environ, names["NODE_RANK"])
    if number >= count:
        raise InvalidInputError(
            f"{names['NODE_RANK']}={number} is not below {names['NNODES']}={count}; number the machines from 0"
        )
    address = environ[names["MASTER_ADDR"]]
    return Machines(count, number, address, _number(environ, names["MASTER_PORT"], DEFAULT_PORT), own)


_VARIABLES = ("NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "NPROC_PER_NODE")


def _number(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    value = environ.get(name, "")
    if not value and default is not None:
        return default
    first, _, last = value.partition(":")  # torchrun's NNODES may be a range
    if value and last in ("", first) and first.isascii() and first.isdigit():
        return int(first)
    found = f"is {value!r}" if value else "is not set"
    raise InvalidInputError(f"{name} {found}; expected a whole number, as the launcher of several processes sets it")


@dataclass(frozen=True)
class Assignment:
    """What the job tells the processes that it starts, in a file of JSON."""

    first: Place
    """The place of this machine's first process."""
    parent: int
    """Id of the process that started them."""
    folder: Path
    """Where a process leaves the error that it ended with."""
    inputs: dict[str, Any]
    """The checked inputs of the run."""

    def write(self, file: Path) -> None:
        """Write the file that WORKER names."""
        values = {"first": asdict(self.first), "parent": self.parent, "folder": str(self.folder), "inputs": self.inputs}
        file.write_text(json.dumps(values), encoding="utf-8")

    @classmethod
    def read(cls, file: Path) -> Assignment:
        """Read the file that WORKER names."""
        values = json.loads(file.read_text(encoding="utf-8"))
        return cls(Place(**values["first"]), values["parent"], Path(values["folder"]), values["inputs"])

    def place(self, local_rank: int) -> Place:
        """Return the place of one of this machine's processes."""
        return Place(**asdict(self.first) | {"rank": self.first.rank + local_rank})


def assignment(environ: Mapping[str, str] = os.environ) -> Assignment | None:
    """Return what the job told this process when it started it; None if it did not."""
    return Assignment.read(Path(environ[WORKER])) if environ.get(WORKER) else None


def choose_gpu(environ: MutableMapping[str, str] = os.environ) -> None:
    """Show this process only the GPU of its LOCAL_RANK, unless the launcher did; before PyTorch uses a GPU.

    With several visible GPUs, bitsandbytes and the libraries' own data parallelism take the wrong ones.
    """
    visible, local_rank = environ.get("CUDA_VISIBLE_DEVICES"), environ.get("LOCAL_RANK", "")
    if not local_rank.isdigit():
        return
    if visible is None:
        environ["CUDA_VISIBLE_DEVICES"] = local_rank
    elif int(local_rank) < len(gpus := visible.split(",")) and len(gpus) > 1:
        environ["CUDA_VISIBLE_DEVICES"] = gpus[int(local_rank)]


def has_others(environ: Mapping[str, str] = os.environ) -> bool:
    """Return whether this process trains with others, whose connections may keep it from ending."""
    return WORKER in environ or environ.get("WORLD_SIZE", "1") != "1"


def end_with_parent(parent: int) -> None:
    """Let the kernel send SIGTERM to this process when its parent ends, however that ends; exit if it has ended."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        os._exit(INTERRUPTED)


def error_file(folder: Path, rank: int) -> Path:
    """Return the file in which process `rank` leaves the error that it ended with."""
    return folder / f"error-{rank}.json"
