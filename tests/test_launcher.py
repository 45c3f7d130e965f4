"""The job starts its own processes, or takes part in those of a launcher; its exit code stays the contract."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from conftest import SAYINGS
from processes import free_port

from job import cli, pipeline
from job.config import environment
from job.distributed import launcher
from job.distributed.place import WORKER, Place
from job.errors import InvalidInputError, JobError
from job.types import Summary

ROOT = Path(__file__).parents[1]


@pytest.fixture
def tiny(llama: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Set the variables of a run that several processes train in a second; return the environment."""
    variables = {
        "TAGGER_BASE_MODEL": str(llama),
        "TAGGER_BASE_QUANTIZE": "none",
        "TAGGER_DATA_DATASET": str(SAYINGS),
        "TAGGER_DATA_LIMIT": "60",
        "TAGGER_DATA_EVAL_SIZE": "20",
        "TAGGER_TRAIN_MAX_STEPS": "60",
        "TAGGER_TRAIN_WARMUP_STEPS": "1",
        "TAGGER_TRAIN_LOGGING_STEPS": "2",
        "TAGGER_TRAIN_SAVE_STEPS": "1000",
        "TAGGER_TRAIN_MICRO_BATCH_TOKENS": "120",
        "TAGGER_SAMPLE_MAX_NEW_TOKENS": "8",
        "TAGGER_SAMPLE_BATCH_SIZE": "4",
        "TAGGER_RUN_DEVICE": "cpu",
        "TAGGER_RUN_ID": "tiny",
        "TAGGER_HUB_PUSH": "never",
        "HF_HUB_OFFLINE": "1",
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    # one thread, as in the test itself: matrix products of several threads may round differently
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def start(folder: Path, environ: dict[str, str], **more: str) -> subprocess.Popen[str]:
    folder.mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, "-m", "job"], cwd=folder, env=environ | more, stderr=subprocess.PIPE, text=True
    )


def end(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, errors = process.communicate(timeout=120)
    return process.returncode, errors


def wait_for_steps(folder: Path, steps: int, process: subprocess.Popen[str]) -> list[psutil.Process]:
    """Wait until this many steps are logged; return the processes that the job has started."""
    log, deadline = folder / "runs" / "tiny" / "log.jsonl", time.monotonic() + 90
    while not log.exists() or json.loads(log.read_text().splitlines()[-1])["step"] < steps:
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    return psutil.Process(process.pid).children()


def test_progress_that_cannot_be_stored_ends_the_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "WATCH_SECONDS", 0.02)
    other = subprocess.Popen(["sleep", "30"])
    monkeypatch.setenv(WORKER, "assignment.json")

    def notify() -> None:
        raise JobError("another process has taken over the run")

    def train() -> None:
        with launcher._repeated(notify):
            assert subprocess.Popen(["sleep", "30"]).wait(10) == -signal.SIGTERM
            raise KeyboardInterrupt  # as it is raised when a process was interrupted

    with pytest.raises(JobError, match="another process has taken over"):
        train()
    assert other.poll() is None
    other.kill()
    other.wait()


RESULTS = ("adapter/adapter_model.safetensors", "log.jsonl", "predictions.jsonl", "samples.jsonl")


def results(folder: Path) -> dict[str, bytes]:
    return {name: (folder / "runs" / "tiny" / name).read_bytes() for name in RESULTS}


def newest(checkpoints: Path) -> int:
    return max((int(path.name.rpartition("-")[2]) for path in checkpoints.glob("checkpoint-*")), default=0)


def test_killed_and_interrupted_processes_lose_no_complete_step(tiny: dict[str, str], tmp_path: Path) -> None:
    """And the run that is resumed with other numbers of processes ends bitwise like one that was not interrupted.

    `make torture` also kills the process that started them.
    """
    folder, checkpoints = tmp_path / "together", tmp_path / "together" / "runs" / "tiny" / "checkpoints"
    process = start(folder, tiny, TAGGER_RUN_PROCESSES="2")
    children = wait_for_steps(folder, 2, process)
    assert sorted(child.environ()["RANK"] for child in children) == ["0", "1"]
    next(child for child in children if child.environ()["RANK"] == "1").kill()
    code, errors = end(process)
    assert code == 1, errors
    assert "process 1 of 2 was killed by SIGKILL" in errors
    saved = newest(checkpoints)
    assert saved, errors

    process = start(folder, tiny, TAGGER_RUN_PROCESSES="3")
    children = wait_for_steps(folder, 10, process)
    process.send_signal(signal.SIGTERM)
    started = time.monotonic()
    code, errors = end(process)
    assert code == 75, errors
    assert time.monotonic() - started < 10
    assert not any(child.is_running() for child in children)
    assert errors.count("interrupted by SIGTERM") == 1, errors
    assert newest(checkpoints) > saved

    for name in ("together", "alone"):
        (tmp_path / name).mkdir(exist_ok=True)
        os.chdir(tmp_path / name)
        pipeline.run(environment.load())
    assert results(folder) == results(tmp_path / "alone")


def test_a_launchers_processes_train_together(tiny: dict[str, str], tmp_path: Path) -> None:
    meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    # only process 0 needs the folder of the run
    started = [start(tmp_path / str(rank), tiny, RANK=str(rank), **meeting) for rank in range(2)]
    ended = [end(process) for process in started]
    assert [code for code, _ in ended] == [0, 0], ended
    assert not (tmp_path / "1" / "runs").exists()
    (tmp_path / "alone").mkdir()
    os.chdir(tmp_path / "alone")
    pipeline.run(environment.load())
    assert results(tmp_path / "0") == results(tmp_path / "alone")


def test_several_processes_give_the_answers_of_one(
    tiny: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A problem of the adapter, which they find, still is one sentence and code 2."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("TAGGER_TRAIN_MAX_STEPS", "2")
    run = pipeline.run(environment.load())
    assert isinstance(run, Summary)
    printed = {}
    for processes in ("1", "2"):
        monkeypatch.setenv("TAGGER_RUN_PROCESSES", processes)
        capsys.readouterr()
        assert cli.main(["evaluate"]) == 0
        printed[processes] = capsys.readouterr().out
    assert printed["1"] == printed["2"]
    (run.folder / "adapter" / "adapter_model.safetensors").write_bytes(b"cut off")
    assert cli.main(["evaluate"]) == 2
    assert "the weights of the adapter in" in capsys.readouterr().err


def failure(code: int, seconds: int) -> Any:
    return SimpleNamespace(exitcode=code, timestamp=seconds)


def test_the_first_failure_decides_the_exit_code(tmp_path: Path) -> None:
    first = Place(4, 8, 2, "127.0.0.1", 1)

    def raised(*codes: int, left: dict[int, dict[str, object]] | None = None) -> BaseException:
        for rank in (4, 5):
            launcher.error_file(tmp_path, rank).unlink(missing_ok=True)
        for rank, content in (left or {}).items():
            launcher.error_file(tmp_path, rank).write_text(json.dumps(content))
        with pytest.raises((JobError, KeyboardInterrupt)) as caught:
            launcher.raise_failure({i: failure(code, 100) for i, code in enumerate(codes)}, first, tmp_path)
        return caught.value

    refused = raised(2, 75, left={4: {"time": 7.0, "message": "no\nnot"}, 5: {"time": 8.0, "message": None}})
    assert isinstance(refused, InvalidInputError)
    assert refused.problems == ("no", "not")
    crashed = raised(75, -9, left={4: {"time": 99.0, "message": None, "lost": True}})
    assert isinstance(crashed, launcher.ProcessError)
    assert (crashed.exit_code, str(crashed)[:40]) == (1, "process 5 of 8 was killed by SIGKILL, us")
    assert isinstance(raised(75, 75, left={4: {"time": 1.0, "message": None}}), KeyboardInterrupt)
    assert isinstance(raised(-15, 1, left={5: {"time": 101.0, "message": None}}), KeyboardInterrupt)
    diverged = raised(1, 75, left={4: {"time": 1.5, "message": "diverged"}, 5: {"time": 1.6, "message": None}})
    assert str(diverged) == "diverged"
