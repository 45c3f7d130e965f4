"""Progress: bars with rate and time left on a terminal, else a few lines, and never a bar among JSON lines."""

from __future__ import annotations

import json
import logging
import os
import pty
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from job.system import progress
from job.system.progress import Progress

ROOT = Path(__file__).parents[1]
SCRIPT = """
import sys, time
from job.system import logging_setup
from job.system.progress import Progress
logging_setup.configure(sys.argv[1])
with Progress("quick", 1, "texts", bar_after=60) as hidden:
    hidden.add()
with Progress("evaluate", 4, "texts", bar_after=0.05) as shown:
    for _ in range(4):
        time.sleep(0.2)
        shown.add()
    shown.write("a line above")
"""


def on_a_terminal(*arguments: str, **environ: str) -> str:
    """Return what a program writes to standard error where that is a terminal."""
    reader, writer = pty.openpty()
    termios.tcsetwinsize(writer, (24, 100))
    variables = {**os.environ, "PYTHONPATH": str(ROOT), **environ}
    variables.pop("TQDM_DISABLE")
    with subprocess.Popen([sys.executable, *arguments], stderr=writer, env=variables) as process:
        os.close(writer)
        output = b""
        while True:
            try:
                chunk = os.read(reader, 4096)
            except OSError:  # how a terminal ends whose program has gone
                break
            if not chunk:
                break
            output += chunk
    os.close(reader)
    assert process.returncode == 0, output
    return output.decode()


def test_a_terminal_shows_a_bar_with_rate_and_time_left() -> None:
    shown = on_a_terminal("-c", SCRIPT, "text")
    assert "evaluate:  75%" in shown
    assert " 3/4 [00:00<00:00, " in shown
    assert "texts/s" in shown
    assert "a line above" in shown
    assert "quick" not in shown  # a chapter that takes no seconds has no bar


def test_a_terminal_shows_no_bar_among_json_lines() -> None:
    assert on_a_terminal("-c", SCRIPT, "json") == ""


def test_a_pipe_gets_a_line_every_30_seconds_at_most(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = 100.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    caplog.set_level(logging.INFO)
    with Progress("download", 10_000_000, "B", initial=1_000_000) as bar:
        for _ in range(7):
            now += 10
            bar.add(1_000_000)
    assert caplog.messages == [
        "download: 4.0 of 10.0 MB, 0.1 MB/s, 60 s left",
        "download: 7.0 of 10.0 MB, 0.1 MB/s, 30 s left",
    ]
    fields = caplog.records[0].fields  # type: ignore[attr-defined]
    assert fields["what"] == "download"
    assert fields["rate"] == pytest.approx(100_000)
    assert json.dumps(fields)


def test_unknown_totals_have_no_time_left() -> None:
    bar = Progress("download", None, "B")
    bar.add(5)
    assert bar.seconds_left is None
    assert "left" not in str(bar)
