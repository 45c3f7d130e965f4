"""A process that the job started to train or to tag together with others."""

from __future__ import annotations

import logging
import os
import sys
from typing import Any

from job import inference, pipeline, tag_workers
from job.distributed import launcher, place
from job.distributed.group import PeerLost
from job.distributed.place import Assignment, Place
from job.errors import CRASHED, DONE, INTERRUPTED, describe_failure
from job.runs import shutdown
from job.system import events


def work(assignment: Assignment) -> int:
    """Do this process's part and return its exit code; the process that started it prints the error."""
    place.end_with_parent(assignment.parent)
    rank = assignment.first.rank + int(os.environ["RANK"])
    if rank > 0:  # process 0 logs what all of them do
        logging.getLogger("job").setLevel(logging.WARNING)
    try:
        _take_part(assignment.place(int(os.environ["RANK"])), assignment.inputs)
        shutdown.check()
    except KeyboardInterrupt as stop:
        launcher.leave_error(assignment, rank, None, lost=isinstance(stop, PeerLost))
        return INTERRUPTED
    except Exception as error:
        if shutdown.received() is not None:  # a library may have turned the interruption into an error
            launcher.leave_error(assignment, rank, None)
            return INTERRUPTED
        failure = describe_failure(error)
        if failure is None:
            if not events.is_json():
                print(f"process {rank} of {assignment.first.size}:", file=sys.stderr)
            sys.excepthook(type(error), error, error.__traceback__)  # it masks secrets
        message, code = failure or (None, CRASHED)
        launcher.leave_error(assignment, rank, message)
        return code
    return DONE


def _take_part(place: Place, inputs: dict[str, Any]) -> None:
    if inputs["task"] == tag_workers.TASK:
        tag_workers.take_part(place, inputs, pipeline.load_adapter)
    elif inputs["task"] == inference.TASK:
        inference.take_part(place, inputs)
    else:
        pipeline.take_part(place, inputs)
