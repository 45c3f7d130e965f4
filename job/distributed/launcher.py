"""Launch the processes of a run on this machine, with torch's own engine (that of torchrun)."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from job.distributed.place import WORKER, Assignment, Machines, Place, error_file
from job.errors import CRASHED, GATE_REJECTED, INTERRUPTED, INVALID_INPUT, PUBLISH_FAILED, InvalidInputError, JobError

if TYPE_CHECKING:
    from torch._C._distributed_c10d import TCPStore
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

log = logging.getLogger(__name__)

SHUTDOWN_SECONDS = 9
"""From SIGTERM to SIGKILL for the processes: each ends by itself within 8 s, and docker kills after 10 s."""
WATCH_SECONDS = 1.0
"""How often the launching process looks for newer progress on disk."""


IDLE_SECONDS = 60.0
"""How long the other machines have to hear that there is nothing to train."""


class ProcessError(JobError):
    """A process of the run ended with an error; its exit code is that of the run."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def meet(machines: Machines, facts: Mapping[str, str], *, train: bool) -> TCPStore | None:
    """Wait for the other machines, and compare what they see; return the store in which the processes will meet.

    Returns None if there is nothing to train, which machine 0 knows.
    Raises InvalidInputError when a machine is missing, has the same number or other facts.
    """
    from job.distributed import group

    leads = machines.number == 0
    seconds = group.JOIN_SECONDS if train or not leads else IDLE_SECONDS
    deadline = time.monotonic() + seconds
    store = group.connect(machines.address, machines.port, hosts=leads, seconds=seconds)
    shared = group.prefixed(store, "machines")
    if leads:
        shared.set("train", str(train))
    try:
        group.compare(shared, "machine", machines.number, machines.count, facts, deadline)
    except InvalidInputError:
        if train or not leads:
            raise
        return None  # the others have ended before, so they wait for nobody
    if shared.get("train") == b"True":
        return store
    group.wait_until_heard(shared, machines.number, machines.count)
    return None


def launch(
    processes: int,
    inputs: Mapping[str, Any],
    *,
    machines: Machines,
    store: TCPStore | None = None,
    virtual_gpus: bool,
    offline: bool = True,
    on_progress: Callable[[], None] | None = None,
) -> None:
    """Run `processes` copies of the job on this machine with these `inputs`, and wait for their end.

    They meet in `store`, if they work together. `offline` means that they may not use the Hub.
    `on_progress` is called every second from another thread.
    Raises ProcessError with the exit code of the process that failed first, and KeyboardInterrupt if that was
    interrupted.
    """
    first = Place(
        rank=machines.number * processes,
        size=machines.count * processes,
        local_size=processes,
        address=machines.address,
        port=0 if store is None else store.port,
    )
    with tempfile.TemporaryDirectory(prefix="tagger-") as folder:
        assignment = Assignment(first, os.getpid(), Path(folder), dict(inputs))
        assignment.write(Path(folder, "assignment.json"))
        with _environment(processes, Path(folder, "assignment.json"), offline=offline), _repeated(on_progress):
            _run_agent(processes, first, Path(folder), virtual_gpus=virtual_gpus)


def _run_agent(processes: int, first: Place, folder: Path, *, virtual_gpus: bool) -> None:
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id="tagger",
        rdzv_backend="static",
        rdzv_endpoint="127.0.0.1:0",
        rdzv_configs={"rank": 0},
        local_addr="127.0.0.1",
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(log_dir=str(folder / "logs")),
        # the job handles SIGTERM and SIGINT itself: torch would replace its handlers, and those of Modal
        signals_to_handle="SIGHUP",
        shutdown_timeout=SHUTDOWN_SECONDS,
        virtual_local_rank=virtual_gpus,
    )
    config.numa_options = None  # binding needs rights that containers do not have
    for name in ("torch.distributed.elastic", "torch.distributed.launcher"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # the job says itself what went wrong
    try:
        elastic_launch(config, sys.executable)("-m", "job", "run")
    except ChildFailedError as error:
        raise_failure(error.failures, first, folder)


@contextmanager
def _environment(processes: int, assignment: Path, *, offline: bool) -> Iterator[None]:
    """Set the variables that the processes inherit, until the end of the block."""
    import torch

    variables = {
        WORKER: str(assignment),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(max(1, torch.get_num_threads() // processes)),
    }
    if offline:  # everything is downloaded and resolved
        variables["HF_HUB_OFFLINE"] = "1"
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _repeated(function: Callable[[], None] | None) -> Iterator[None]:
    """Call a function every WATCH_SECONDS in another thread, and once more at the end of the block.

    If it fails, the processes of the run are interrupted, and its error is raised once they have ended.
    """
    if function is None:
        yield
        return
    ended = threading.Event()
    failures: list[Exception] = []

    def watch() -> None:
        try:
            while not ended.wait(WATCH_SECONDS):
                function()
        except Exception as error:
            failures.append(error)
            _interrupt_workers(ended)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        if failures:
            raise failures[0]
        function()


def _interrupt_workers(ended: threading.Event) -> None:
    """Interrupt the processes that there are or will be, until the event is set."""
    interrupted: set[int] = set()  # a second signal would end a process before it has saved
    while not ended.wait(WATCH_SECONDS / 10):
        for process in _workers() - interrupted:
            interrupted.add(process)
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGTERM)


def _workers() -> set[int]:
    """Return the processes that this one has started to take part in the run."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended, or is another user's
            parent = int((folder / "stat").read_text(errors="replace").rpartition(")")[2].split()[1])
            if parent == os.getpid() and f"\0{WORKER}=".encode() in b"\0" + (folder / "environ").read_bytes():
                found.add(int(folder.name))
    return found


def leave_error(assignment: Assignment, rank: int, message: str | None, *, lost: bool = False) -> None:
    """Leave the error of this process for the one that started it, which prints it.

    `message` is None if it is printed already, and `lost` says that another process failed before.
    """
    content = json.dumps({"time": time.time(), "message": message, "lost": lost})
    error_file(assignment.folder, rank).write_text(content, encoding="utf-8")


def raise_failure(failures: Mapping[int, ProcessFailure], first: Place, folder: Path) -> None:
    """Raise the error of the process that failed first, as ProcessError, or as KeyboardInterrupt with exit code 75.

    A process that lost another one failed because of that one.
    """
    ended: list[tuple[bool, float, int, str]] = []
    for local_rank, failure in failures.items():
        rank = first.rank + local_rank
        file = error_file(folder, rank)
        left = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        code = _exit_code(failure.exitcode)
        message = left.get("message") or f"process {rank} of {first.size} {_describe(failure.exitcode)}"
        ended.append((left.get("lost", False), left.get("time", failure.timestamp), code, message))
    _, _, code, message = min(ended, key=lambda entry: entry[:2])
    if code == INTERRUPTED:
        raise KeyboardInterrupt
    raise InvalidInputError(*message.splitlines()) if code == INVALID_INPUT else ProcessError(message, code)


def _exit_code(code: int) -> int:
    if code in (-signal.SIGTERM, -signal.SIGINT):  # before the process could handle them
        return INTERRUPTED
    return code if code in (INVALID_INPUT, GATE_REJECTED, PUBLISH_FAILED, INTERRUPTED) else CRASHED


def _describe(code: int) -> str:
    if code == -signal.SIGKILL:
        return (
            "was killed by SIGKILL, usually because the machine ran out of memory. What was saved is kept: run "
            "the same command again, with fewer TAGGER_RUN_PROCESSES or more memory"
        )
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}; run the same command again, it resumes"
    return f"ended with code {code}; its error is above"
