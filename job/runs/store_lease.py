"""The lease of a run in a store: who owns it, across machines; a lock only works on one file system."""

from __future__ import annotations

import json
import logging
import os
import platform
import re
import secrets
import threading
import time
from typing import Any

from job.errors import JobError
from job.runs import shutdown
from job.runs.objects import StoreError
from job.runs.ownership import Owner, has_ended, process_identity, refused
from job.runs.stored_run import StoredRun, generation_of

log = logging.getLogger(__name__)

RENEW_SECONDS = 60.0
LEASE_SECONDS = 150.0
"""An owner who has not renewed a lease for this long has lost it; others measure it with their own clock."""
POLL_SECONDS = 2.0
RELEASE_SECONDS = 10.0
"""How long the end waits for the store to release a lease: others wait LEASE_SECONDS then, and take it over."""
LEASE_NAME = re.compile(r"lease/(\d{6})\.json")


class StoreLease(Owner):
    """The right to write a generation of a stored run, renewed by a thread until `release`."""

    def __init__(self, stored: StoredRun) -> None:
        """Become the owner; waits up to LEASE_SECONDS for the end of one that does not renew its lease any more.

        Raises InvalidInputError if another process owns the run, and StoreError.
        """
        self._stored = stored
        self._content = {
            "token": secrets.token_hex(8),
            "host": platform.node(),
            "pid": os.getpid(),
            "process": process_identity(os.getpid()),
            "renewals": 0,
        }
        self.lost = False
        """Whether another process has taken the run over."""
        self._ended = threading.Event()
        self.generation = self._acquire()
        self._thread = threading.Thread(target=self._renew_until_released, daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise JobError if another process has taken the run over; does not wait for the store."""
        if self.lost:
            raise JobError(
                f"another process has taken over {self._stored.name}, because this one had not renewed its lease for "
                f"{LEASE_SECONDS:g} s; the other one continues the run"
            )

    def check_store(self) -> None:
        """Look into the store, then do as `check`."""
        self.lost = self.lost or (self._newest() or 0) > self.generation or not self._is_ours()
        self.check()

    def _is_ours(self) -> bool:
        """Return whether the lease names no other process: two may write it where conditional writes are ignored."""
        return self._read(self.generation).get("token") in (None, self._content["token"])

    def release(self) -> None:
        """End the lease, so that another process need not wait."""
        if self._ended.is_set():
            return
        self._ended.set()
        ending = threading.Thread(target=self._end, daemon=True)
        ending.start()
        ending.join(RELEASE_SECONDS)
        if ending.is_alive():
            log.warning("run: the lease of %s is not released (the store does not answer)", self._stored.name)
            shutdown.leave_threads_behind()

    def _end(self) -> None:
        self._thread.join()
        try:
            if not self.lost:
                self._write(released=True)
        except StoreError as error:
            log.warning("run: the lease of %s is not released (%s)", self._stored.name, error)

    def _acquire(self) -> int:
        while True:
            newest = self._newest()
            if newest is not None:
                self._wait_for_end(newest)
            seals = self._stored.seals()
            generation = 1 + max(newest or 0, seals[0].generation if seals else 0)
            if self._stored.put_if_absent(_name(generation), json.dumps(self._content).encode()):
                found = self._read(generation)
                if found.get("token") != self._content["token"]:
                    raise refused(self._stored.name, found)
                self._delete_before(generation - 1)
                return generation

    def _delete_before(self, generation: int) -> None:
        """Delete older leases: of owners that have ended, or that find out with the newest one."""
        former = [name for name in self._stored.names("lease/") if (generation_of(name) or generation) < generation]
        self._stored.delete(former)

    def _newest(self) -> int | None:
        found = [int(match[1]) for name in self._stored.names("lease/") if (match := LEASE_NAME.fullmatch(name))]
        return max(found, default=None)

    def _wait_for_end(self, generation: int) -> None:
        """Return when an owner has ended; raises InvalidInputError when it renews its lease, or another one comes."""
        seen = self._read(generation)
        if seen.get("released") or has_ended(seen):
            return
        log.info(
            "run: %s was left by process %s on %s; waiting up to %.0f s to see whether that still works on it",
            *(self._stored.name, seen.get("pid", "?"), seen.get("host", "another machine"), LEASE_SECONDS),
        )
        deadline = time.monotonic() + LEASE_SECONDS
        while time.monotonic() < deadline:
            time.sleep(min(POLL_SECONDS, LEASE_SECONDS / 10))
            shutdown.check()
            now = self._read(generation)
            if now.get("released"):
                return
            if now != seen:
                raise refused(self._stored.name, now)

    def _read(self, generation: int) -> dict[str, Any]:
        try:
            found = json.loads(self._stored.get(_name(generation)) or b"")
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}

    def _write(self, *, released: bool = False) -> None:
        self._content["renewals"] += 1  # type: ignore[operator]
        content = self._content | ({"released": True} if released else {})
        self._stored.put(_name(self.generation), json.dumps(content).encode())

    def _renew_until_released(self) -> None:
        while not self._ended.wait(RENEW_SECONDS):
            try:
                self.check_store()
                self._write()
            except JobError:
                return
            except Exception as error:  # whatever it is, the next renewal may work
                log.warning("run: the lease of %s is not renewed (%s)", self._stored.name, error)


def _name(generation: int) -> str:
    return f"lease/{generation:06d}.json"
