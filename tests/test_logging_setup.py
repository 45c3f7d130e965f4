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
logging.getLogger("job.data").info("%s", "a\\r\\x1b[31m\\n::error::b")
library = logging.StreamHandler()
logging.getLogger("own").addHandler(library)
logging.getLogger("own").propagate = False
logging.getLogger("own").warning("##vso[task.complete]")
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
    assert [line.partition(" ")[2] for line in shown[:2]] == ["a line of the job", "a warning of a library"]
    assert all(len(line.partition(" ")[0]) == len("12:34:56") for line in shown[:2])


def test_what_a_line_quotes_steers_no_terminal_or_ci(stderr: str) -> None:
    assert stderr.splitlines()[2].endswith(r" a\r\x1b[31m")
    assert stderr.splitlines()[3:] == [r"\x3a:error::b", r"\x23#vso[task.complete]"]


def test_tracebacks_and_warnings_steer_no_terminal_or_ci() -> None:
    code = (
        "import warnings; from job.system import logging_setup; logging_setup.configure()\n"
        "warnings.warn('careful \\x1b[31m'); raise ValueError('::error::a\\r\\x1b[31m\\n::error::b')"
    )
    environ = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, check=False)
    assert done.returncode == 1
    assert rb"careful \x1b[31m" in done.stderr
    assert rb"ValueError: ::error::a\r\x1b[31m" in done.stderr
    assert b"\n\\x3a:error::b" in done.stderr
    assert b"\x1b" not in done.stderr
