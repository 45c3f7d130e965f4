"""The errors of the job, and the exit codes with what to do on each.

    JobError                  1  a defect or the machine; also the base class of the others
    ├── DivergedError         1  the loss or the weights are not finite
    ├── InvalidInputError     2  settings, data or the machine were refused before training
    ├── GateRejected          3  trained, but not published
    └── PublishError          4  trained and saved, but publishing failed

This module needs only the standard library, so that scripts can read the table of exit codes.
"""

from __future__ import annotations

import errno
import sys
from dataclasses import dataclass
from typing import Literal

from job.config.redaction import redact
from job.system.printable import printable

DONE, CRASHED, INVALID_INPUT, GATE_REJECTED, PUBLISH_FAILED, INTERRUPTED = 0, 1, 2, 3, 4, 75


@dataclass(frozen=True)
class ExitCode:
    """The meaning of an exit code, and how to react to it."""

    meaning: str
    action: str
    """What the user does next."""
    severity: Literal["notice", "warning", "error"]
    """The kind of annotation that CI shows."""


EXIT_CODES = {
    DONE: ExitCode("done", "nothing to do", "notice"),
    CRASHED: ExitCode("crashed: a defect or the machine", "read the last lines of the log", "error"),
    INVALID_INPUT: ExitCode(
        "settings, data or machine refused; nothing was spent",
        "fix what the error names, then run the same command",
        "error",
    ),
    GATE_REJECTED: ExitCode(
        "trained, but the quality gate refused to publish",
        "read report.md; `tagger-job promote --revision BRANCH` publishes it anyway",
        "error",
    ),
    PUBLISH_FAILED: ExitCode(
        "trained and saved, but publishing failed",
        "follow the error message; usually run the same command again",
        "error",
    ),
    INTERRUPTED: ExitCode("interrupted; its state is saved", "run the same command: it resumes", "warning"),
}


class JobError(Exception):
    """Base class of the errors that end the job with a message for the user and an exit code.

    Secrets in the message are masked.
    """

    exit_code = CRASHED

    def __init__(self, message: str) -> None:
        super().__init__(redact(message))


class InvalidInputError(JobError):
    """Settings, data or machine were refused before anything was spent.

    Has every problem that was found, so that the user can fix them all at once.
    """

    exit_code = INVALID_INPUT

    def __init__(self, *problems: str) -> None:
        self.problems = tuple(redact(" ".join(problem.split())) for problem in problems)  # one line each
        super().__init__("\n".join(self.problems))


class DivergedError(JobError):
    """The loss or the weights are not finite, so training cannot continue."""


class GateRejected(JobError):
    """Trained and saved, but rejected by the quality gate."""

    exit_code = GATE_REJECTED


class PublishError(JobError):
    """Trained and saved, but not published."""

    exit_code = PUBLISH_FAILED


DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)


GPU_FAILURES = (
    "uncorrectable ECC error",
    "uncorrectable NVLink error",
    "hardware stack error",
    "busy or unavailable",
    "no CUDA-capable device",
    "device not ready",
    "system not yet initialized",
    "GPU is lost",
    "CUDA error: unknown error",  # what CUDA reports of a GPU that has fallen off the bus
)
"""What CUDA's messages say when the GPU or its driver fails, and not a program; an illegal access is none of these."""


def _describe_gpu_failure(error: Exception) -> str | None:
    """Return the message for an error of PyTorch that a GPU is the cause of; None for others.

    PyTorch's classes are known by name, because importing it takes seconds.
    """
    names = {cls.__name__ for cls in type(error).__mro__}
    first = str(error).partition("\n")[0]
    if "OutOfMemoryError" in names:
        return (
            f"the GPU is out of memory: {first.partition('. ')[0]}. What was saved before is intact: end other "
            "programs on this GPU or use a larger one, then run the same command again"
        )
    if "RuntimeError" in names and any(failure in str(error) for failure in GPU_FAILURES):
        return (
            f"the GPU failed: {first}. What was saved before is intact: run the same command again, which resumes; if "
            "it fails again, use another GPU (`nvidia-smi -q` and the kernel's log show the state of this one)"
        )
    return None


def describe_failure(error: Exception) -> tuple[str, int] | None:
    """Return the message and the exit code for an error that a user can act on; None for a defect of the job."""
    if isinstance(error, JobError):
        return str(error), error.exit_code
    if (message := _describe_gpu_failure(error)) is not None:
        return message, CRASHED
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        return (
            f"{error.filename or 'the disk'} cannot be written: {error.strerror}. What was saved before is intact: "
            "free disk space or change the permissions, then run the same command again"
        ), CRASHED
    return None


def print_error(message: str) -> None:
    """Print a message to standard error, with `error: ` before each line, and without what steers a terminal."""
    print("\n".join(f"error: {line}" for line in printable(redact(message)).split("\n")), file=sys.stderr)
