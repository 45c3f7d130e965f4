"""The first signal interrupts, once and never in the middle of a step; a second one ends at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from job.runs import shutdown

ROOT = Path(__file__).parents[1]


def interrupt(number: signal.Signals = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0.05)  # where the handler runs


@pytest.mark.parametrize("number", shutdown.SIGNALS)
def test_a_signal_interrupts_and_handlers_are_given_back(number: signal.Signals) -> None:
    before = [signal.getsignal(each) for each in (*shutdown.SIGNALS, signal.SIGUSR1)]
    with shutdown.handled():
        assert signal.getsignal(signal.SIGUSR1) == before[-1], "Modal's end of time comes by it"
        with pytest.raises(KeyboardInterrupt):
            interrupt(number)
        assert shutdown.received() == number.name
    assert [signal.getsignal(each) for each in (*shutdown.SIGNALS, signal.SIGUSR1)] == before


def test_what_must_not_be_cut_in_two_is_finished_first() -> None:
    done = []

    def step() -> None:
        with shutdown.deferred():
            interrupt()
            done.append("all of it")

    with shutdown.handled(), pytest.raises(KeyboardInterrupt):
        step()
    assert done == ["all of it"]


def test_an_interruption_that_was_swallowed_is_raised_again() -> None:
    with shutdown.handled():
        shutdown.check()
        with suppress(KeyboardInterrupt):  # as a library would
            interrupt()
        with pytest.raises(KeyboardInterrupt):
            shutdown.check()


def ends(after: str, *signals: tuple[float, signal.Signals], grace: float = 8.0) -> tuple[int, float, str]:
    """Interrupt a process that sleeps, and then does something: exit code, seconds since, what it said."""
    code = (
        "import sys, time\nfrom job.runs import shutdown\n"
        f"shutdown.GRACE_SECONDS = {grace}\n"
        "with shutdown.handled():\n"
        "    try:\n        print('ready', flush=True)\n        time.sleep(30)\n"
        f"    except KeyboardInterrupt:\n        {after}\n        sys.exit(7)\n"
    )
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", code], env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        started = time.monotonic()
        for pause, number in signals:
            time.sleep(pause)
            process.send_signal(number)
        said = process.stderr.read()
    return process.returncode, time.monotonic() - started, said


COMPUTE = "import hashlib; hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)"  # no Python code runs meanwhile


def test_a_second_signal_ends_at_once_whatever_the_process_is_doing() -> None:
    code, seconds, said = ends(COMPUTE, (0, signal.SIGTERM), (0.4, signal.SIGINT))
    assert code == 75
    assert seconds < 4
    assert said == "interrupted: ended at once, by a second signal; the same command goes on from what is saved\n"


def test_a_ctrl_c_that_arrives_twice_is_one() -> None:
    code, _, said = ends("time.sleep(0.5)", (0, signal.SIGINT), (0.01, signal.SIGINT))
    assert (code, said) == (7, "")


def test_what_takes_longer_than_the_grace_is_ended() -> None:
    code, seconds, said = ends(COMPUTE, (0, signal.SIGTERM), grace=0.3)
    assert code == 75
    assert seconds < 4
    assert "what could not be saved in time is lost" in said
