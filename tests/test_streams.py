"""Closed streams, readers that are gone, full disks and other encodings change no exit code and stop no publishing."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hub import Hub
from tiny_run import REPO, move_to_hub, set_tiny_environment

ROOT = Path(__file__).parents[1]
JOB = f"{shlex.quote(sys.executable)} -m job"


def run(script: str, **environ: str) -> subprocess.CompletedProcess[bytes]:
    variables = {**os.environ, "PYTHONPATH": str(ROOT), **environ}
    return subprocess.run(["bash", "-c", script], env=variables, capture_output=True, check=False)


@pytest.mark.parametrize(
    "redirection", [">&-", "2>&-", "<&-", ">&- 2>&- <&-", "> >(head -c 0)", "> /dev/full", "1< /dev/null"]
)
def test_a_command_ends_with_0_whatever_becomes_of_its_output(redirection: str) -> None:
    done = run(f"{JOB} settings {redirection}")
    assert done.returncode == 0, done.stderr
    assert b"Traceback" not in done.stderr
    assert b"Exception ignored" not in done.stderr


@pytest.mark.parametrize("redirection", ["2>&-", "2> >(head -c 0)", "2> /dev/full", ">&- 2>&-"])
def test_a_refusal_ends_with_2_though_nobody_reads_it(redirection: str) -> None:
    done = run(f"{JOB} {redirection}", TAGGER_LORA_RANK="8")
    assert (done.returncode, done.stdout) == (2, b"")


def test_output_that_a_full_disk_lost_is_said() -> None:
    assert b"standard output cannot be written (No space left on device)" in run(f"{JOB} --help > /dev/full").stderr


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252:strict"])
def test_characters_that_the_output_cannot_hold_are_escapes(encoding: str) -> None:
    done = run(f"{JOB} settings", PYTHONIOENCODING=encoding, TAGGER_SAMPLE_PROMPTS='["日本"]')
    assert done.returncode == 0, done.stderr
    assert rb'TAGGER_SAMPLE_PROMPTS=["\u65e5\u672c"]' in done.stdout


def test_a_full_pipe_that_does_not_block_is_waited_for() -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    code = "from job.system import streams; streams.protect(); print('x' * 300_000)"
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    with (
        subprocess.Popen([sys.executable, "-c", code], stdout=writer, env=environ) as process,
        os.fdopen(reader, "rb") as end,
    ):
        os.close(writer)
        time.sleep(0.3)
        assert len(end.read()) == 300_001
    assert process.returncode == 0


def test_a_run_is_published_though_nobody_reads_its_output(
    monkeypatch: pytest.MonkeyPatch, loopback_hub: Hub, llama: Path, tmp_path: Path
) -> None:
    move_to_hub(set_tiny_environment(monkeypatch, llama), loopback_hub, llama)
    environ = {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "ascii", "TAGGER_SAMPLE_PROMPTS": '["日本"]'}
    done = run(f"{JOB} > >(head -c 0) 2> >(head -c 1) <&-", **environ)
    assert done.returncode == 0
    assert loopback_hub.models[REPO].titles == ["initial commit", "basic training"]
