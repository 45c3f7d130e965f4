"""The container's side of Hugging Face Jobs: run a command of the job, and leave its outcome in the store.

Jobs repeats whatever fails and does not report an exit code. So what must not be repeated ends there as a success, and
the caller reads the real exit code from the outcome. What has no outcome in the store ends with its own code.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from job import cli
from job.cloud.hfjobs import outcome_name
from job.cloud.outcome import describe
from job.config import environment
from job.errors import CRASHED, DONE, GATE_REJECTED, INVALID_INPUT, PUBLISH_FAILED, JobError, print_error
from job.runs.objects import StoreError, open_objects
from job.runs.stored_run import StoredRun
from job.system import import_hooks, streams

FINAL = (DONE, INVALID_INPUT, GATE_REJECTED, PUBLISH_FAILED)
"""Exit codes that another attempt would not change."""


def run_command(arguments: Sequence[str]) -> int:
    """Run a command as `tagger-job` does; return the exit code for Jobs."""
    started = time.monotonic()
    try:
        outcome = Outcome()
    except (JobError, StoreError) as error:
        print_error(f"the outcome of this job cannot be stored: {error}")
        return CRASHED
    code = _run(arguments)
    if code == PUBLISH_FAILED and not outcome.has_run():
        print_error("the run is not in the store, and this disk is lost: the next attempt resumes from what is stored")
        code = CRASHED
    try:
        is_stored = outcome.store(code, round(time.monotonic() - started, 1))
    except StoreError as error:
        print_error(f"the outcome of this job could not be stored: {error}")
        return code or CRASHED  # another attempt finds its work done, and stores the outcome
    return DONE if code in FINAL and is_stored else code


def _run(arguments: Sequence[str]) -> int:
    try:
        return cli.main(arguments)
    except Exception:  # a defect must leave its outcome too, or it would look like a job that was killed
        traceback.print_exc()
        return CRASHED


class Outcome:
    """The outcome of an attempt in TAGGER_RUN_STORE; without that, or a job of Jobs, nothing is stored."""

    def __init__(self) -> None:
        """Replace what an earlier attempt has left, which must not pass for the outcome of this one if it is killed.

        Raises InvalidInputError for a store that cannot be used, and StoreError.
        """
        # not from the settings: also what refuses them has an outcome
        self._job, store = os.environ.get("JOB_ID"), os.environ.get(environment.RUN_STORE)
        self._objects = open_objects(store) if store and self._job else None
        if self._objects is not None:
            self._name = outcome_name(str(self._job))
            earlier = json.loads(self._objects.get(self._name) or b"{}")
            self._attempt = earlier.get("attempt", 0) + 1
            self._put({})

    def _put(self, content: dict[str, Any]) -> None:
        assert self._objects is not None
        content = {"attempt": self._attempt} | content
        self._objects.put(self._name, json.dumps(content, ensure_ascii=False).encode())

    def store(self, code: int, seconds: float) -> bool:
        """Store the outcome, if there is a place for it; return whether there is. Raises StoreError."""
        if self._objects is None:
            return False
        description = {}
        if (run := _newest_run()) is not None:
            with suppress(Exception):  # what a defect has left must not hide the outcome
                description = describe(run)
        self._put({"exit_code": code, "seconds": seconds} | description)
        return True

    def has_run(self) -> bool:
        """Return whether the store has the run that was written last as this disk has it."""
        run = _newest_run()
        if self._objects is None or run is None:
            return True
        with suppress(StoreError):
            return StoredRun(self._objects, run.name).read("manifest.json") == (run / "manifest.json").read_bytes()
        return False


def _newest_run() -> Path | None:
    """Return the folder of the run that was written last; None if there is none."""
    with suppress(JobError):
        manifests = environment.load().run.dir.glob("*/manifest.json")
        newest = max(manifests, key=lambda manifest: manifest.stat().st_mtime, default=None)
        return None if newest is None else newest.parent
    return None


if __name__ == "__main__":
    streams.protect()
    import_hooks.install()
    code = run_command(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # without waiting for the threads of libraries
