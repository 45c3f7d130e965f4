"""Trackers get each step of a run once, how it ended, and can neither end it nor hold it up."""

from __future__ import annotations

import importlib.util
import json
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from accelerate.tracking import GeneralTracker

from job.errors import GateRejected, InvalidInputError
from job.runs import attempts, shutdown, tracker_sinks, trackers
from job.runs.run_folder import RunFolder, read_manifest, utc_now
from job.runs.tracker_sinks import Sink, Target
from job.settings import Run, Settings

SCORES = {
    "f1": 0.5,
    "precision": 0.6,
    "recall": 0.4,
    "macro_f1": 0.3,
    "exact_match": 0.1,
    "intervals": {"f1": [0.4, 0.6]},
}
METRICS = {"scores": {"adapter": SCORES}, "gate": {"verdict": "pass", "reason": "the gate is off"}}
ABSENT = "{} is an extra of the package; `make test-trackers` installs it"


class Recorder(GeneralTracker):
    """A tracker that keeps what it is told, or does worse."""

    name, requires_logging_directory, tracker = "recorder", False, None

    def __init__(self, misbehave: Callable[[str], None]) -> None:
        super().__init__()
        self._misbehave = misbehave

    def start(self) -> None:
        self._misbehave("start")

    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        self._misbehave(f"log {step}")
        TOLD.append(("log", step, values))

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        TOLD.append(("settings", None, values))

    def finish(self) -> None:
        self._misbehave("finish")


class RecorderSink(Sink):
    def attempt(self, values: Any, number: int) -> None:
        TOLD.append(("attempt", number, values))

    def summary(self, numbers: Any, texts: Any, step: int) -> None:
        TOLD.append(("summary", step, {**numbers, **texts}))

    def artifact(self, file: Path) -> None:
        TOLD.append(("artifact", None, file.name))

    def end(self, status: str, code: int) -> None:
        super().end(status, code)
        TOLD.append(("end", code, status))


TOLD: list[tuple[str, int | None, Any]] = []
"""What the recorder was told, by all attempts."""


def told(kind: str) -> list[int | None]:
    return [number for name, number, _ in TOLD if name == kind]


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable[[str], None]], None]]:
    """Return a function that puts the recorder, with a way to misbehave, in the place of TensorBoard."""
    TOLD.clear()
    monkeypatch.setattr(tracker_sinks, "load", lambda _: None)
    monkeypatch.setattr(trackers, "LOOK_SECONDS", 0.01)

    def use(misbehave: Callable[[str], None] = lambda _: None, **attributes: Any) -> None:
        def opened(target: Target) -> Sink:
            sink = RecorderSink(Recorder(misbehave))
            for name, value in attributes.items():
                setattr(sink, name, value)
            return sink

        monkeypatch.setitem(tracker_sinks.SINKS, "tensorboard", opened)

    yield use
    monkeypatch.setattr(shutdown._state, "left_behind", False)


def make_run(path: Path) -> RunFolder:
    path.mkdir(parents=True)
    manifest = {
        "schema_version": 1,
        "run_id": path.name,
        "status": "running",
        "started": utc_now(),
        "settings": Settings().values(),
        "dataset": {"fingerprint": "x"},
        "versions": {},
        "timings": {"train": 1.5},
    }
    run = RunFolder(path, manifest)
    run.update()
    return run


def attempt(run: RunFolder, steps: Sequence[int], stop: BaseException | None = None, **options: Any) -> None:
    """Do an attempt of a run, after which log.jsonl has these steps."""
    names = options.get("track", ("tensorboard",))
    ends = () if stop is None else (type(stop),)
    with suppress(*ends), run.released_afterwards(), trackers.tracked(Run(track=names), run), attempts.recorded(run):
        attempts.begin(run, utc_now())
        for step in steps:
            run.record_speed(step, tokens_per_second=100.0)
        run.write_lines("log.jsonl", [{"step": step, "loss": 1 / step, "learning_rate": 1e-3} for step in steps])
        if options.get("until"):
            wait_for(options["until"])
        if stop is not None:
            raise stop
        run.write("metrics.json", json.dumps(METRICS))
        run.write("report.html", "<p>report</p>")


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert condition()


def test_all_attempts_are_one_run_with_no_step_twice(tmp_path: Path, recorder: Any) -> None:
    recorder()
    run = make_run(tmp_path / "r")
    attempt(run, [1, 2, 3], KeyboardInterrupt())
    attempt(run, [1, 2])  # resumed from step 2: step 3 is done again
    run = RunFolder(run.path, read_manifest(run.path))
    attempt(run, [1, 2, 3, 4, 5], GateRejected("no"))
    assert told("log") == [1, 2, 3, 4, 5]
    assert told("settings") == [None]
    assert told("attempt") == [1, 2, 3]
    assert told("summary") == [3]  # once: the scores did not change
    assert [(number, status) for kind, number, status in TOLD if kind == "end"] == [
        (75, "interrupted"),
        (0, "complete"),
        (3, "refused"),
    ]
    figures = next(values for kind, _, values in TOLD if kind == "log")
    assert figures == {"train/loss": 1.0, "train/learning_rate": 1e-3, "train/tokens_per_second": 100.0}
    summary = next(values for kind, _, values in TOLD if kind == "summary")
    assert summary["scores/adapter/micro_f1_low"] == 0.4
    assert summary["verdict"] == "pass"
    assert ("artifact", None, "report.html") in TOLD


def test_steps_are_sent_while_the_run_goes_on(tmp_path: Path, recorder: Any) -> None:
    recorder()
    attempt(make_run(tmp_path / "r"), [1, 2], until=lambda: told("log") == [1, 2])


def test_a_tracker_that_fails_costs_one_warning_and_gets_all_steps_later(
    tmp_path: Path, recorder: Any, caplog: pytest.LogCaptureFixture
) -> None:
    failures = iter(range(2))  # of three attempts, which send once or twice each

    def misbehave(call: str) -> None:
        if call == "log 2" and next(failures, None) is not None:
            raise SystemExit("the server said https://me:password@example.com is no")

    recorder(misbehave)
    run = make_run(tmp_path / "r")
    attempt(run, [1, 2, 3])
    [line] = caplog.messages
    assert line.startswith("track: tensorboard failed (SystemExit: the server said https://***@example.com is no); ")
    attempt(run, [1, 2, 3])
    attempt(run, [1, 2, 3])
    assert told("log") == [1, 2, 3]


def test_a_tracker_that_hangs_costs_a_bounded_time_and_one_warning(
    tmp_path: Path, recorder: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "END_SECONDS", 0.3)
    released = threading.Event()
    recorder(lambda call: released.wait(20) and None if call == "log 2" else None)
    run, started = make_run(tmp_path / "r"), time.monotonic()
    attempt(run, [1, 2, 3])
    assert time.monotonic() - started < 5
    [line] = caplog.messages
    assert line.startswith("track: tensorboard did not take everything within 0.3 s after the end; ")
    assert shutdown.are_threads_left_behind()
    assert read_manifest(run.path)["attempts"][-1]["status"] == "complete"
    released.set()
    wait_for(lambda: "track-tensorboard" not in {thread.name for thread in threading.enumerate()})


def test_a_tracker_that_tells_its_steps_is_asked_after_a_kill(tmp_path: Path, recorder: Any) -> None:
    known = {1, 2}  # sent by an attempt that was killed before it could record that
    recorder(tells_steps=True, known_steps=lambda: known)
    run = make_run(tmp_path / "r")
    attempt(run, [1, 2, 3], KeyboardInterrupt())
    assert told("log") == [3]
    attempt(run, [1, 2, 3, 4])  # it never had 3, whatever is recorded here
    assert told("log") == [3, 3, 4]


def test_the_run_of_another_process_is_not_followed(tmp_path: Path, recorder: Any) -> None:
    recorder()
    run = make_run(tmp_path / "r")
    attempt(run, [1])
    TOLD.clear()
    with suppress(InvalidInputError), trackers.tracked(Run(track=("tensorboard",)), run), attempts.recorded(run):
        run.write_lines("log.jsonl", [{"step": 1}, {"step": 2}])
        raise InvalidInputError("another process works on it")
    assert TOLD == []


def test_without_trackers_nothing_is_written(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r")
    attempt(run, [1], track=())
    assert not (run.path / "tracking").exists()


def test_an_absent_package_is_refused_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(InvalidInputError) as caught:
        trackers.check(Run(track=("mlflow", "trackio")))
    assert [problem.partition(";")[0] for problem in caught.value.problems] == [
        "TAGGER_RUN_TRACK=mlflow needs the package mlflow, which is not installed",
        "TAGGER_RUN_TRACK=trackio needs the package trackio, which is not installed",
    ]
    assert "run `pip install 'tagger-job[mlflow]'`" in caught.value.problems[0]


def test_a_tracker_without_its_key_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: True)
    for name in ("WANDB_API_KEY", "WANDB_MODE", "TRACKIO_SPACE_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    with pytest.raises(InvalidInputError, match="TAGGER_RUN_TRACK=wandb needs WANDB_API_KEY, which is not set"):
        trackers.check(Run(track=("wandb",)))
    monkeypatch.setenv("WANDB_MODE", "offline")
    trackers.check(Run(track=("wandb", "trackio")))
    monkeypatch.setenv("TRACKIO_SPACE_ID", "ada/board")
    with pytest.raises(InvalidInputError, match="needs HF_TOKEN for the Space"):
        trackers.check(Run(track=("trackio",)))


def test_trackers_are_no_part_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAGGER_RUN_TRACK", "wandb, tensorboard")
    settings = Settings()
    assert settings.run.track == ("wandb", "tensorboard")
    monkeypatch.delenv("TAGGER_RUN_TRACK")
    assert settings.digest() == Settings().digest()


@pytest.fixture(params=["tensorboard", "mlflow", "trackio", "wandb"])
def real(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the name of a tracker that is installed, and let it write files below the temporary folder."""
    name: str = request.param
    if importlib.util.find_spec(name) is None:
        pytest.skip(ABSENT.format(name))
    for variable in [variable for variable in os.environ if variable.startswith(("MLFLOW_", "WANDB_", "TRACKIO_"))]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    return name


def read_back(name: str, run: RunFolder) -> list[tuple[int, float]]:
    """Return the losses by step that a tracker has."""
    if name == "tensorboard":
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(run.path / "tracking/local/tensorboard")).Reload()
        return [(event.step, event.value) for event in events.Scalars("train/loss")]
    if name == "mlflow":
        import mlflow

        [found] = mlflow.search_runs(experiment_names=["tagger-job"], output_format="list")
        assert found.info.status == "FINISHED"
        assert found.data.tags["verdict"] == "pass"
        history = mlflow.MlflowClient().get_metric_history(found.info.run_id, "train/loss")
        return [(entry.step, entry.value) for entry in history]
    if name == "trackio":
        with sqlite3.connect(Path(os.environ["TRACKIO_DIR"], "tagger-job.db")) as database:
            rows = database.execute("select run_name, step, metrics from metrics order by id").fetchall()
        assert len({name for name, _, _ in rows}) == 1
        return [(step, json.loads(v)["train/loss"]) for _, step, v in rows if b"train/loss" in bytes(v)]
    files = sorted((run.path / "tracking/local/wandb").glob("offline-run-*/run-*.wandb"))
    assert len({file.name for file in files}) == 1  # one run in both attempts
    return [(step, 1 / step) for step in (1, 2, 3, 4) if b"train/loss" in b"".join(f.read_bytes() for f in files)]


@pytest.mark.filterwarnings("ignore")
def test_a_real_tracker_has_all_steps_of_two_attempts(
    real: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "runs" / "r")
    attempt(run, [1, 2], KeyboardInterrupt(), track=(real,))
    run = RunFolder(run.path, read_manifest(run.path))
    attempt(run, [1, 2, 3, 4], track=(real,))
    assert [(step, pytest.approx(loss)) for step, loss in read_back(real, run)] == [(n, 1 / n) for n in (1, 2, 3, 4)]
    assert caplog.messages == []
    assert capfd.readouterr().out == ""  # results alone are on standard output
