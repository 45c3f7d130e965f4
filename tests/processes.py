"""Processes that train together, forked from the test so that they need not import torch again."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from job.distributed.group import Group
from job.distributed.place import Place

LOST = 75
"""The exit code of a process that lost another one."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Processes:
    """Forked processes: each runs `work(group)` and leaves its result, a JSON value, in a file."""

    def __init__(
        self,
        size: int,
        work: Callable[[Group], Any],
        folder: Path,
        *,
        facts: Callable[[int], dict[str, str]] | None = None,
    ) -> None:
        self._folder, port = folder, free_port()
        folder.mkdir(parents=True, exist_ok=True)
        self.pids = []
        for rank in range(size):
            place = Place(rank, size, size, "127.0.0.1", port, hosts_store=rank == 0)
            sys.stdout.flush()
            sys.stderr.flush()
            pid = os.fork()
            if pid == 0:
                os._exit(self._run(place, work, {} if facts is None else facts(rank)))
            self.pids.append(pid)

    def _run(self, place: Place, work: Callable[[Group], Any], facts: dict[str, str]) -> int:
        try:
            group = Group.meet(place, facts, seconds=60)
            group.start()
            result = work(group)
            (self._folder / f"{place.rank}.tmp").write_text(json.dumps(result))
            (self._folder / f"{place.rank}.tmp").rename(self._folder / f"{place.rank}.json")
            group.close()
        except KeyboardInterrupt:
            return LOST
        except BaseException as error:
            (self._folder / f"{place.rank}.error").write_text(f"{type(error).__name__}: {error}")
            traceback.print_exc()
            return 1
        return 0

    def wait(self, seconds: float = 60.0) -> list[int]:
        """Return the exit codes, negative for a signal; kill those that do not end in time."""
        deadline, codes = time.monotonic() + seconds, dict[int, int]()
        while len(codes) < len(self.pids):
            for pid in set(self.pids) - codes.keys():
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    codes[pid] = os.waitstatus_to_exitcode(status)
            if time.monotonic() > deadline:
                for pid in set(self.pids) - codes.keys():
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)
        return [codes[pid] for pid in self.pids]

    def result(self, rank: int = 0) -> Any:
        return json.loads((self._folder / f"{rank}.json").read_text())

    def error(self, rank: int) -> str:
        return (self._folder / f"{rank}.error").read_text()


def run_together(size: int, work: Callable[[Group], Any], folder: Path) -> Any:
    """Run `work` in some processes, all of which must succeed; return the result of process 0."""
    processes = Processes(size, work, folder)
    codes = processes.wait()
    assert codes == [0] * size, codes
    return processes.result()
