"""The job's lines are logged, and the libraries' noise is not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

LINES = """
import logging
from job.system import logging_setup
logging_setup.configure()
logging.getLogger("job.train").info("a line of the job")
logging.getLogger("elsewhere").info("a detail of a library")
logging.getLogger("elsewhere").warning("a warning of a library")
logging.getLogger("httpx2").info("HTTP Request: GET")
logging.getLogger("bitsandbytes.autograd._functions").warning("inputs will be cast")
"""


@pytest.fixture
def stderr() -> str:
    environ = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", LINES], env=environ, capture_output=True, text=True, check=True)
    assert done.stdout == ""
    return done.stderr


def test_the_jobs_lines_and_warnings_are_shown_with_the_time(stderr: str) -> None:
    shown = stderr.splitlines()
    assert [line.partition(" ")[2] for line in shown] == ["a line of the job", "a warning of a library"]
    assert all(len(line.partition(" ")[0]) == len("12:34:56") for line in shown)
