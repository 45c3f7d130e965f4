"""The first signal interrupts once, and never within deferred work; a second one ends the process immediately."""

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
    time.sleep(0.05)  # the handler runs here


@pytest.mark.parametrize("number", shutdown.SIGNALS)
def test_a_signal_interrupts_and_handlers_are_restored(number: signal.Signals) -> None:
    before = [signal.getsignal(each) for each in (*shutdown.SIGNALS, signal.SIGUSR1)]
    with shutdown.handled():
        assert signal.getsignal(signal.SIGUSR1) == before[-1], "it is Modal's timeout"
        with pytest.raises(KeyboardInterrupt):
            interrupt(number)
        assert shutdown.received() == number.name
    shutdown.check()  # what comes next in this process was not interrupted
    assert [signal.getsignal(each) for each in (*shutdown.SIGNALS, signal.SIGUSR1)] == before


def test_deferred_work_is_finished_first() -> None:
    done = []

    def step() -> None:
        with shutdown.deferred():
            interrupt()
            done.append("work")

    with shutdown.handled(), pytest.raises(KeyboardInterrupt):
        step()
    assert done == ["work"]


def test_an_interruption_that_a_library_swallowed_is_raised_again() -> None:
    with shutdown.handled():
        shutdown.check()
        with suppress(KeyboardInterrupt):  # as a library would
            interrupt()
        with pytest.raises(KeyboardInterrupt):
            shutdown.check()


@pytest.mark.parametrize("number", shutdown.SIGNALS)
def test_a_program_that_only_waits_is_interrupted_too(number: signal.Signals) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell starts it in the background
    try:
        with shutdown.interrupts(), pytest.raises(KeyboardInterrupt):
            interrupt(number)
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def interrupt_process(
    cleanup: str, *signals: tuple[float, signal.Signals], grace: float = 8.0
) -> tuple[int, float, str]:
    """Send signals, each after a pause, to a process that then runs `cleanup`; return exit code, seconds, stderr."""
    code = (
        "import sys, time\nfrom job.runs import shutdown\n"
        f"shutdown.GRACE_SECONDS = {grace}\n"
        "with shutdown.handled():\n"
        "    try:\n        print('ready', flush=True)\n        time.sleep(30)\n"
        f"    except KeyboardInterrupt:\n        {cleanup}\n        sys.exit(7)\n"
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
        stderr = process.stderr.read()
    return process.returncode, time.monotonic() - started, stderr


COMPUTE = "import hashlib; hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)"  # runs no Python code meanwhile


def test_a_second_signal_ends_even_a_busy_process() -> None:
    code, seconds, stderr = interrupt_process(COMPUTE, (0, signal.SIGTERM), (0.4, signal.SIGINT))
    assert code == 75
    assert seconds < 4
    assert stderr == "interrupted: ended immediately by a second signal; the same command resumes from what is saved\n"


def test_a_ctrl_c_that_arrives_twice_counts_once() -> None:
    code, _, stderr = interrupt_process("time.sleep(0.5)", (0, signal.SIGINT), (0.01, signal.SIGINT))
    assert (code, stderr) == (7, "")


def test_a_process_that_takes_too_long_to_save_is_ended() -> None:
    code, seconds, stderr = interrupt_process(COMPUTE, (0, signal.SIGTERM), grace=0.3)
    assert code == 75
    assert seconds < 4
    assert "work that could not be saved in time is lost" in stderr


@pytest.mark.parametrize("stderr", ["closed", "full"])
def test_a_process_ends_in_time_though_its_last_words_are_not_read(stderr: str) -> None:
    prepare = {
        "closed": "import os; os.close(2)",
        "full": "import os; os.set_blocking(2, False)\ntry:\n    while True: os.write(2, b'x' * 4096)\n"
        "except BlockingIOError: os.set_blocking(2, True)",
    }[stderr]
    code = (
        f"{prepare}\nimport time\nfrom job.runs import shutdown\nshutdown.GRACE_SECONDS = 0.3\n"
        "with shutdown.handled():\n    try:\n        print('ready', flush=True)\n        time.sleep(30)\n"
        f"    except KeyboardInterrupt:\n        {COMPUTE}"
    )
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", code], env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=5) == 75
