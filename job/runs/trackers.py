"""Send a run to experiment trackers (TAGGER_RUN_TRACK), from threads that can neither end nor slow it.

A thread for each tracker follows the files of the run, so nothing is queued in memory, and what a tracker did not take
is sent again from log.jsonl. It works the same where other processes train.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import netrc
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from job.errors import InvalidInputError
from job.runs import shutdown, tracker_sinks
from job.runs.atomic import atomic_write
from job.runs.run_folder import SPEED, TRACKING, TRACKING_HERE, RunFolder
from job.runs.tracker_sinks import Sink, Target
from job.settings import Run, to_env

log = logging.getLogger(__name__)

LOOK_SECONDS = 1.0
"""How often a thread looks for new entries of log.jsonl."""
LONGEST_PAUSE = 60.0
"""Between two tries of a tracker that fails."""
END_SECONDS = 30.0
"""How long the end of the run waits for its trackers, all together."""
INTERRUPTED_SECONDS = 1.5
"""The same after a signal: the process is ended 8 s after that, whatever it does."""
CHUNK = 50
"""Entries that are marked as sent at once."""
LONGEST_VALUE = 500
"""Characters of a setting; MLflow refuses longer ones."""


def check(settings: Run) -> None:
    """Raise InvalidInputError for each tracker that is not installed, or lacks its key."""
    problems = []
    for name in settings.track:
        if importlib.util.find_spec(name) is None:
            problems.append(
                f"TAGGER_RUN_TRACK={name} needs the package {name}, which is not installed; run `pip install "
                f"'tagger-job[{name}]'`, or leave {name} out"
            )
        elif (missing := _missing_key(name)) is not None:
            problems.append(f"TAGGER_RUN_TRACK={name} needs {missing}, or leave {name} out")
    if problems:
        raise InvalidInputError(*problems)


def _missing_key(name: str) -> str | None:
    if name == "wandb" and os.environ.get("WANDB_MODE") not in ("offline", "dryrun", "disabled"):
        host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("://")[-1].split("/")[0]
        if not os.environ.get("WANDB_API_KEY") and not _has_login(host):
            return "WANDB_API_KEY, which is not set; set it, or WANDB_MODE=offline"
    if name == "trackio" and os.environ.get("TRACKIO_SPACE_ID"):
        from huggingface_hub import get_token

        if get_token() is None:
            return "HF_TOKEN for the Space of TRACKIO_SPACE_ID; set it, or unset TRACKIO_SPACE_ID"
    return None


def _has_login(host: str) -> bool:
    """Return whether `wandb login` has left a key on this machine."""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


@contextmanager
def tracked(settings: Run, run: RunFolder) -> Iterator[None]:
    """Send a run to the trackers of TAGGER_RUN_TRACK during this context, and how it ended at its end.

    Whatever a tracker does costs one warning, and END_SECONDS at the end.
    """
    if not settings.track:
        yield
        return
    followers: list[_Follower] = []
    attempts, is_complete = len(run.manifest.get("attempts", [])), run.complete
    # another process that has the run must not be followed, only an attempt of this one
    earlier = -1 if is_complete else attempts

    def start() -> None:
        for name in () if followers else settings.track:
            if is_complete and _read_state(name, run.path).get("ended") == attempts:
                continue  # it has everything
            try:
                tracker_sinks.load(name)
                (run.path / TRACKING_HERE).mkdir(parents=True, exist_ok=True)
                followers.append(_Follower(name, run.path, earlier))
            except Exception as error:
                _warn(name, _failed(error))

    run.on_begun = start
    try:
        yield
    finally:
        run.on_begun = None
        _end(followers)


def _state_file(name: str, path: Path) -> Path:
    """Return where it is recorded what a tracker has: if it has that on this disk only, so is the record."""
    return path / (TRACKING_HERE if tracker_sinks.kept_at(name) == "machine" else TRACKING) / f"{name}.json"


def _end(followers: list[_Follower]) -> None:
    seconds = END_SECONDS if shutdown.received() is None else INTERRUPTED_SECONDS
    deadline = time.monotonic() + seconds
    for follower in followers:
        follower.ending.set()
    for follower in followers:
        if not follower.ended.wait(max(0.0, deadline - time.monotonic())):
            follower.warn(f"did not take everything within {seconds:g} s after the end")
            shutdown.leave_threads_behind()  # what such a library does at the exit of Python would block that too


def _warn(name: str, problem: str) -> None:
    log.warning(
        "track: %s %s; the run does not depend on it, and what is missing there is sent later, or by the same command",
        *(name, problem),
    )


def _failed(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"failed ({type(error).__name__}: {lines[0][:160]})"


def _read_state(name: str, path: Path) -> dict[str, Any]:
    """Return what is recorded of what a tracker has."""
    return _read_json(_state_file(name, path)) or {}


class _Follower:
    """Follows the files of a run in a thread, and sends what is new to one tracker."""

    def __init__(self, name: str, path: Path, earlier: int) -> None:
        self._name, self._path, self._earlier = name, path, earlier
        self.ending, self.ended = threading.Event(), threading.Event()
        """Set when the run has ended, and when that was sent."""
        self._state_file = _state_file(name, path)
        self._state = _read_state(name, path)
        self._sink: Sink | None = None
        self._seen: int | None = None
        self._failures, self._in_doubt, self._warned = 0, True, False
        threading.Thread(target=self._follow, name=f"track-{name}", daemon=True).start()

    def warn(self, problem: str) -> None:
        """Log what happened, once."""
        if not self._warned:
            self._warned = True
            _warn(self._name, problem)

    def _follow(self) -> None:
        try:
            while not self.ending.wait(LOOK_SECONDS if not self._failures else min(LONGEST_PAUSE, 2**self._failures)):
                self._attempt(self._send_new)
            self._attempt(self._finish)
        finally:
            self.ended.set()

    def _attempt(self, step: Callable[[], None]) -> None:
        try:
            step()
        except BaseException as error:  # also what would end a thread silently, such as SystemExit
            self._failures, self._in_doubt, self._seen = self._failures + 1, True, None
            self.warn(_failed(error))
        else:
            self._failures = 0

    def _attempts(self) -> list[dict[str, Any]]:
        """Return the attempts of the run; none before this one has begun."""
        found: list[dict[str, Any]] = (_read_json(self._path / "manifest.json") or {}).get("attempts", [])
        return found if len(found) > self._earlier else []

    @property
    def _sent_through(self) -> int:
        return int(self._state.get("sent_through", 0))

    def _record(self, **entries: Any) -> None:
        self._state.update(entries)
        atomic_write(self._state_file, json.dumps(self._state) + "\n")

    def _opened(self) -> Sink:
        """Return the run in the tracker, opened with its settings if it is not open yet."""
        if self._sink is None:
            manifest = _read_json(self._path / "manifest.json")
            if manifest is None:
                raise FileNotFoundError(f"{self._path}/manifest.json cannot be read")
            target = _target(self._path, manifest, self._sent_through)
            self._sink = tracker_sinks.SINKS[self._name](target)
            if "settings" not in self._state:
                self._sink.settings(target.settings)
                self._record(settings=True)
        return self._sink

    def _send_new(self) -> None:
        """Send the entries of log.jsonl that the tracker does not have, in order, each once.

        Where a tracker cannot tell what it has, they are marked as sent before: a process that is killed in between
        sends none twice.
        """
        with suppress(OSError):
            changed = (self._path / "log.jsonl").stat().st_mtime_ns
            if changed == self._seen or not self._attempts():
                return
            self._seen = changed
        everything = _entries(self._path)
        entries = [entry for entry in everything if entry["step"] > self._sent_through]
        if not everything or not (entries or self._in_doubt):
            return
        sink = self._opened()
        if self._in_doubt and sink.tells_steps:
            known = sink.known_steps()
            entries = [entry for entry in everything if entry["step"] not in known]
        self._in_doubt = False
        for start in range(0, len(entries), CHUNK):
            chunk, done = entries[start : start + CHUNK], self._sent_through
            if not sink.tells_steps:
                self._record(sent_through=chunk[-1]["step"])
            try:
                for entry in chunk:
                    sink.log(_figures(entry), entry["step"])
                    done = max(done, entry["step"])
            finally:
                self._record(sent_through=done)

    def _finish(self) -> None:
        """Send what is left, and how the attempt ended."""
        manifest, attempts = _read_json(self._path / "manifest.json") or {}, self._attempts()
        if not attempts or attempts[-1]["ended"] is None or self._state.get("ended") == len(attempts):
            return
        self._seen = None
        self._send_new()
        sink, last = self._opened(), attempts[-1]
        if self._state.get("attempt") != len(attempts):
            sink.attempt(_of_attempt(manifest), len(attempts))
            self._record(attempt=len(attempts))
        numbers, texts = _summary(self._path, manifest)
        if numbers and self._state.get("summary") != [numbers, texts]:
            sink.summary(numbers, texts, max(1, self._sent_through))
            self._record(summary=[numbers, texts])
            if (self._path / "report.html").is_file():
                sink.artifact(self._path / "report.html")
        sink.end(last["status"], last["exit_code"])
        self._record(ended=len(attempts))


def _read_json(file: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _entries(path: Path) -> list[dict[str, Any]]:
    """Return the entries of log.jsonl, with speed and memory where they were recorded."""
    more: dict[int, dict[str, Any]] = {}
    with suppress(OSError, ValueError), (path / SPEED).open(encoding="utf-8") as file:
        for line in file:
            more[json.loads(line)["step"]] = json.loads(line)
    try:
        with (path / "log.jsonl").open(encoding="utf-8") as file:
            return [{**json.loads(line), **more.get(json.loads(line)["step"], {})} for line in file]
    except (OSError, ValueError):
        return []


def _target(path: Path, manifest: dict[str, Any], sent_through: int) -> Target:
    # a run that was deleted and is made again under the same name is another one
    digest = hashlib.sha256(f"{path.name} {manifest.get('started')}".encode()).hexdigest()[:8]
    settings: dict[str, bool | int | float | str] = {}
    for name, value in manifest["settings"].items():
        settings[name] = value if isinstance(value, (bool, int, float)) else to_env(value, name)[:LONGEST_VALUE]
    return Target(
        id=f"{path.name[:48]}-{digest}",
        name=path.name,
        folder=path / TRACKING_HERE,
        runs=path.parent,
        settings=settings,
        sent_through=sent_through,
    )


def _figures(entry: dict[str, Any]) -> dict[str, float]:
    return {f"train/{name}": float(value) for name, value in entry.items() if name != "step"}


def _of_attempt(manifest: dict[str, Any]) -> dict[str, float]:
    """Return seconds and memory by chapter, as of the end of an attempt."""
    figures = {f"seconds/{chapter}": float(value) for chapter, value in manifest["timings"].items()}
    for chapter, peaks in manifest.get("peak_memory_by_chapter", {}).items():
        figures |= {f"memory/{chapter}_{name}": float(value) for name, value in peaks.items()}
    return figures


def _summary(path: Path, manifest: dict[str, Any]) -> tuple[dict[str, float], dict[str, str]]:
    """Return the scores with their intervals, and verdict and commit as texts."""
    metrics = _read_json(path / "metrics.json") or {}
    numbers: dict[str, float] = {}
    texts: dict[str, str] = {}
    for tagger, scores in metrics.get("scores", {}).items():
        low, high = scores["intervals"]["f1"]
        found = {"micro_f1": scores["f1"], "micro_f1_low": low, "micro_f1_high": high}
        found |= {name: scores[name] for name in ("precision", "recall", "macro_f1", "exact_match")}
        numbers |= {f"scores/{tagger}/{name}": float(value) for name, value in found.items()}
    if gate := metrics.get("gate"):
        texts |= {"verdict": gate["verdict"], "verdict_reason": gate["reason"]}
    if published := manifest.get("published"):
        texts["commit"] = published["url"]
    return numbers, texts
