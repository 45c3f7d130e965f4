"""The processes of a run: they meet, compare what they see, and exchange messages, tensors and signs of life."""

from __future__ import annotations

import ipaddress
import json
import logging
import math
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from job.distributed.place import Place
from job.errors import InvalidInputError

log = logging.getLogger(__name__)

JOIN_SECONDS = 600.0
"""How long processes wait for each other at the start: images may still be pulled, and data downloaded."""
BEAT_SECONDS = 1.0
LOST_SECONDS = 15.0
"""A process that has shown no sign of life for so long is lost; one whose connection closes is lost at once."""
LOADING_SECONDS = 120.0
"""LOST_SECONDS while models are loaded, which may keep a process from running its threads."""
HEAR_SECONDS = 5.0
"""How long process 0 stays so that the others hear why it ends."""
HEADER = 4096
"""Bytes of a message that are sent at once."""
FOREVER = timedelta(days=30)
"""gloo's own time-outs are not used: process 0 may compute alone for hours while the others wait for it."""


class PeerLost(KeyboardInterrupt):
    """Another process of the run has ended or no longer responds.

    It interrupts the job like a signal: the last complete step is saved, and the same command resumes.
    """


class Group:
    """A process among those that train together: process 0 sends, the others receive (`training.exchange`)."""

    def __init__(self, place: Place, store: Store) -> None:
        self.rank, self.size, self.local_size = place.rank, place.size, place.local_size
        self._place, self._store = place, store
        self._lost: str | None = None
        self._patience = LOADING_SECONDS
        self._watched = math.inf
        """When the thread that watches the others last had an answer of the store."""
        self._closed = threading.Event()
        self.trains = True
        """Whether there is something to train."""

    @classmethod
    def meet(cls, place: Place, facts: Mapping[str, str], seconds: float = JOIN_SECONDS) -> Group:
        """Wait for all processes, and check that they see the same `facts`.

        Raises InvalidInputError when one is missing after `seconds`, has the same number or other facts.
        """
        deadline = time.monotonic() + seconds
        connected = connect(place.address, place.port, hosts=place.hosts_store, seconds=seconds)
        group = cls(place, PrefixStore(f"tagger-{place.attempt}", connected))
        compare(group._store, "process", place.rank, place.size, facts, deadline)
        return group

    def decide(self, train: bool) -> None:
        """Set whether there is something to train, which process 0 knows."""
        with self._lost_peers():
            if self.rank == 0:
                self._store.set("train", str(train))
            self._wait_until(lambda: self._store.check(["train"]))
            self.trains = self._store.get("train") == b"True"
            if not self.trains:
                wait_until_heard(self._store, self.rank, self.size)

    def start(self) -> None:
        """Connect the processes, once all have loaded what they need."""
        with self._lost_peers():
            self._start()

    def _start(self) -> None:
        store: Any = self._store  # the type stubs of torch 2.13 lack `clone`
        store.set(f"beat-{self.rank}", "0")
        store.set(f"loaded-{self.rank}", "")
        self._watched = time.monotonic()
        threading.Thread(target=self._watch, args=(store.clone(),), daemon=True).start()
        self._wait_until(lambda: store.check([f"loaded-{rank}" for rank in range(self.size)]))
        if "GLOO_SOCKET_IFNAME" not in os.environ and (interface := self._interface()):
            os.environ["GLOO_SOCKET_IFNAME"] = interface
        dist.init_process_group(
            "gloo", store=PrefixStore("gloo", store), rank=self.rank, world_size=self.size, timeout=FOREVER
        )
        self._patience = LOST_SECONDS

    def _interface(self) -> str | None:
        """Return the network interface to use: that on the way to process 0; gloo would look up the machine's name."""
        if self.local_size == self.size:
            return "lo"
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, suppress(OSError):
            probe.connect((self._place.address, self._place.port))  # sends nothing
            own = probe.getsockname()[0]
            if not ipaddress.ip_address(own).is_loopback:
                found = psutil.net_if_addrs().items()
                return next((name for name, entries in found if own in {entry.address for entry in entries}), None)
        return None

    def _watch(self, store: Store) -> None:
        """Show a sign of life every second, and look for those of the others; runs in a thread."""
        watched = range(1, self.size) if self.rank == 0 else range(1)
        newest: dict[int, bytes] = {}
        changed = dict.fromkeys(watched, time.monotonic())
        store.set_timeout(timedelta(seconds=LOST_SECONDS))
        beats = 0
        while not self._closed.wait(BEAT_SECONDS):
            beats += 1
            try:
                store.set(f"beat-{self.rank}", str(beats))
                for rank in watched:
                    if store.check([f"beat-{rank}"]) and (beat := store.get(f"beat-{rank}")) != newest.get(rank):
                        newest[rank], changed[rank] = beat, time.monotonic()
                self._watched = time.monotonic()
            except RuntimeError as error:
                self._lost = f"the processes' store at {self._place.address} does not respond ({_first_line(error)})"
                return
            for rank, when in changed.items():
                if (silent := time.monotonic() - when) > self._patience:
                    self._lost = f"process {rank} has not responded for {silent:.0f} s"
                    return

    def _wait_until(self, done: Callable[[], bool]) -> None:
        """Wait so that signals are handled; raises PeerLost when another process is lost."""
        pause = 0.0001
        while not done():
            if self._lost is None and time.monotonic() - self._watched > self._patience:
                self._lost = f"the processes' store at {self._place.address} does not respond"
            if self._lost is not None:
                self._raise_lost(self._lost)
            time.sleep(pause)
            pause = min(1.5 * pause, 0.002)

    def _complete(self, work: dist.Work) -> None:
        self._wait_until(work.is_completed)
        try:
            work.wait()
        except RuntimeError as error:
            self._raise_lost(f"a connection to another process has closed ({_first_line(error)})")

    def _raise_lost(self, why: str) -> None:
        log.error("process %d of %d: %s; the last complete step is kept", self.rank, self.size, why)
        raise PeerLost(why)

    @contextmanager
    def _lost_peers(self) -> Iterator[None]:
        """Turn the error of a closed connection into PeerLost, also where an operation does not even start."""
        try:
            yield
        except RuntimeError as error:
            self._raise_lost(f"a connection to another process has closed ({_first_line(error)})")

    def broadcast(self, tensor: torch.Tensor) -> None:
        """Overwrite a tensor on the CPU with that of process 0."""
        with self._lost_peers():
            work = dist.broadcast(tensor, 0, async_op=True)
        self._complete(work)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the sum of an int64 tensor over all processes, on process 0; on the others, an arbitrary tensor."""
        staged = tensor.cpu()
        with self._lost_peers():
            work = dist.reduce(staged, 0, async_op=True)
        self._complete(work)
        return staged

    def send(self, message: Mapping[str, Any]) -> None:
        """Send a message of JSON types from process 0 to all others."""
        content = json.dumps(message).encode()
        packet = torch.frombuffer(bytearray(content.ljust(HEADER - 8, b"\0")), dtype=torch.uint8)
        header = torch.cat([torch.tensor([len(content)]).view(torch.uint8), packet[: HEADER - 8]])
        self.broadcast(header)
        if len(content) > HEADER - 8:
            self.broadcast(packet[HEADER - 8 :].clone())

    def receive(self) -> dict[str, Any]:
        """Return the next message of process 0."""
        header = torch.empty(HEADER, dtype=torch.uint8)
        self.broadcast(header)
        length = int(header[:8].clone().view(torch.int64))
        content = header[8:]
        if length > len(content):
            rest = torch.empty(length - len(content), dtype=torch.uint8)
            self.broadcast(rest)
            content = torch.cat([content, rest])
        message: dict[str, Any] = json.loads(content[:length].numpy().tobytes())
        return message

    def gather(self, value: Any) -> list[Any]:
        """Return the values of JSON types of all processes, in order, on process 0; an empty list on the others."""
        content = bytearray(json.dumps(value).encode())
        lengths = torch.zeros(self.size, dtype=torch.int64)
        lengths[self.rank] = len(content)
        with self._lost_peers():
            work = dist.all_reduce(lengths, async_op=True)
        self._complete(work)
        longest = int(lengths.max())
        own = torch.frombuffer(content.ljust(longest, b"\0"), dtype=torch.uint8)
        parts = [torch.empty(longest, dtype=torch.uint8) for _ in range(self.size if self.rank == 0 else 0)]
        with self._lost_peers():
            work = dist.gather(own, parts or None, 0, async_op=True)
        self._complete(work)
        return [
            json.loads(part[:length].numpy().tobytes()) for part, length in zip(parts, lengths.tolist(), strict=False)
        ]

    def close(self) -> None:
        """Disconnect."""
        self._closed.set()
        if dist.is_initialized():
            dist.destroy_process_group()


@contextmanager
def joined(place: Place, facts: Mapping[str, str], *, train: bool) -> Iterator[Group]:
    """Meet the other processes, and disconnect at the end of the block.

    `train` says whether there is something to train; only that of process 0 counts.
    """
    group = Group.meet(place, facts)
    group.decide(train)
    yield group
    group.close()  # not after an error: it would wait for a lost process, and this one ends anyway


def prefixed(store: Store, prefix: str) -> Store:
    """Return a view of a store in which all keys have a prefix."""
    return PrefixStore(prefix, store)


def connect(address: str, port: int, *, hosts: bool, seconds: float) -> TCPStore:
    """Return the store at an address, hosted by this process or by another one that may start later.

    Raises InvalidInputError when it cannot be hosted, or does not respond within `seconds`.
    """
    started = time.monotonic()
    while True:
        try:
            # short attempts: a signal is only handled between them
            return TCPStore(
                address, port, is_master=hosts, timeout=timedelta(seconds=5), wait_for_workers=False, multi_tenant=True
            )
        except (RuntimeError, ValueError) as error:
            waited = time.monotonic() - started
            if hosts:
                raise InvalidInputError(
                    f"process 0 cannot listen on port {port} ({_first_line(error)}); set MASTER_PORT to a free port"
                ) from None
            if waited >= seconds:
                raise InvalidInputError(
                    f"{address}:{port} did not respond within {waited:.0f} s; check that process 0 is running there, "
                    "MASTER_ADDR and MASTER_PORT, and the firewall between the machines"
                ) from None
            time.sleep(min(1.0, max(0.0, seconds - waited)))


def compare(store: Store, what: str, number: int, count: int, facts: Mapping[str, str], deadline: float) -> None:
    """Wait for `count` processes (or machines), and raise InvalidInputError unless all have the facts of number 0.

    All of them raise it, so that none waits for one that has ended.
    """
    try:
        _compare(store, what, number, count, facts, deadline)
    except InvalidInputError:
        wait_until_heard(store, number, count)
        raise
    except RuntimeError as error:
        log.error("%s %d of %d: the store of %s 0 has closed (%s)", what, number, count, what, _first_line(error))
        raise PeerLost from None


def wait_until_heard(store: Store, number: int, count: int) -> None:
    """Mark that this process has heard what was decided; number 0, which hosts the store, waits for the others."""
    store.set(f"heard-{number}", "")
    until = time.monotonic() + HEAR_SECONDS
    while number == 0 and time.monotonic() < until and not store.check([f"heard-{other}" for other in range(count)]):
        time.sleep(0.02)


def _compare(store: Store, what: str, number: int, count: int, facts: Mapping[str, str], deadline: float) -> None:
    if store.add(f"present-{number}", 1) > 1:
        _refuse(store, f"two {_plural(what)} have the number {number}; give each a RANK (or NODE_RANK) of its own")
    store.set(f"facts-{number}", json.dumps(dict(facts)))
    _await(store, [f"facts-{other}" for other in range(count)], what, deadline)
    expected = json.loads(store.get("facts-0"))
    differences = [
        f"{name} is {facts.get(name)} and not {expected.get(name)}"
        for name in sorted(expected.keys() | facts.keys())
        if expected.get(name) != facts.get(name)
    ]
    if differences:
        _refuse(store, f"{what} {number} does not see what {what} 0 sees: {'; '.join(differences)}. Make them equal")
    store.set(f"agreed-{number}", "")
    _await(store, [f"agreed-{other}" for other in range(count)], what, deadline)


def _await(store: Store, keys: list[str], what: str, deadline: float) -> None:
    started = time.monotonic()
    while not store.check(keys):
        if store.check(["refused"]):
            raise InvalidInputError(store.get("refused").decode())
        if time.monotonic() > deadline:
            missing = [key.rpartition("-")[2] for key in keys if not store.check([key])]
            waited = time.monotonic() - started
            _refuse(store, f"{what} {', '.join(missing)} did not start within {waited:.0f} s; look at its log")
        time.sleep(0.02)
    if store.check(["refused"]):
        raise InvalidInputError(store.get("refused").decode())


def _refuse(store: Store, problem: str) -> None:
    store.set("refused", problem)
    raise InvalidInputError(problem)


def _plural(what: str) -> str:
    return f"{what}es" if what.endswith("s") else f"{what}s"


def _first_line(error: Exception) -> str:
    """Return the first line of a library's error, without the place in its source that it begins with."""
    lines = str(error).splitlines() or [type(error).__name__]
    return " ".join(re.sub(r"^\[[^]]*\] *", "", lines[0]).split())[:120]
