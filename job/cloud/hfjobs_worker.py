"""The container's side of Hugging Face Jobs: run a command of the job, and leave its outcome in the store.

Jobs repeats whatever fails and does not report an exit code. So what must not be repeated ends there as a success, and
the caller reads the real exit code from the outcome.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from job import cli
from job.cloud.outcome import describe
from job.config import environment
from job.errors import CRASHED, DONE, GATE_REJECTED, INVALID_INPUT, PUBLISH_FAILED, JobError, print_error
from job.runs.objects import StoreError, open_objects
from job.settings import Settings
from job.system import streams

FINAL = (DONE, INVALID_INPUT, GATE_REJECTED, PUBLISH_FAILED)
"""Exit codes that another attempt would not change."""
OUTCOMES = "outcomes"


def run_command(arguments: Sequence[str]) -> int:
    """Run a command as `tagger-job` does; return the exit code for Jobs."""
    started = time.monotonic()
    try:
        code = cli.main(arguments)
    except Exception:  # a defect must leave its outcome too, or it would look like a job that was killed
        traceback.print_exc()
        code = CRASHED
    outcome = {"exit_code": code, "seconds": round(time.monotonic() - started, 1)}
    try:
        settings = environment.load()
        if settings.run.store is not None and (job := os.environ.get("JOB_ID")):
            content = json.dumps(outcome | _describe_run(settings), ensure_ascii=False)
            open_objects(settings.run.store).put(outcome_name(job), content.encode())
    except (JobError, StoreError) as error:
        print_error(f"the outcome of this job could not be stored: {error}")
        return code  # nobody could read it from there
    return DONE if code in FINAL else code


def outcome_name(job: str) -> str:
    """Return the name of the object with the outcome of a job, below TAGGER_RUN_STORE."""
    return f"{OUTCOMES}/{job}.json"


def _describe_run(settings: Settings) -> dict[str, Any]:
    """Return what is known of the run that was written last; empty if there is none."""
    manifests = sorted(settings.run.dir.glob("*/manifest.json"), key=lambda manifest: manifest.stat().st_mtime)
    with suppress(Exception):  # what a defect has left must not hide the outcome
        return describe(manifests[-1].parent)
    return {}


if __name__ == "__main__":
    streams.protect()
    code = run_command(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # without waiting for the threads of libraries
