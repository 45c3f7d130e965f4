"""JSON lines: every event has a documented name, and standard error has nothing else."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hub import Hub
from tiny_run import REPO, move_to_hub, set_tiny_environment
from webhook import SECRET, Hook, webhook

from job.system.events import EVENTS

ROOT = Path(__file__).parents[1]
LINES = """
import logging, sys, warnings
from job.system import logging_setup
from job.system.events import event
logging_setup.configure("json")
log = logging.getLogger("job.train")
log.info("train: %s", "step 1", extra=event("train_step", step=1, loss=float("nan"), token="hf_Abcdefgh1234"))
log.debug("nobody needs this line", extra=event("chapter_started", chapter="train"))
library = logging.getLogger("own")
library.addHandler(logging.StreamHandler())
library.propagate = False
library.warning("two\\nlines")
warnings.warn("careful")
1 / 0
"""


def python(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environ}
    return subprocess.run([sys.executable, *arguments], env=variables, capture_output=True, text=True, check=False)


def events(stderr: str) -> list[dict[str, Any]]:
    """Return the events on standard error; every line must be one."""
    found = [json.loads(line) for line in stderr.splitlines()]
    for entry in found:
        assert entry["event"] in EVENTS
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", entry["time"])
    return found


def test_lines_warnings_and_crashes_are_json_with_secrets_masked() -> None:
    done = python("-c", LINES)
    step, started, library, warning, crash = events(done.stderr)
    assert (step["event"], step["level"], step["message"]) == ("train_step", "info", "train: step 1")
    assert (step["step"], step["loss"], step["token"]) == (1, None, "***")
    assert (started["event"], started["chapter"]) == ("chapter_started", "train")
    assert (library["logger"], library["message"]) == ("own", "two\nlines")
    assert "careful" in warning["message"]
    assert (crash["event"], crash["message"]) == ("crash", "ZeroDivisionError: division by zero")
    assert "Traceback" in crash["traceback"]
    assert done.returncode == 1


def test_a_run_logs_its_events_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, loopback_hub: Hub, llama: Path
) -> None:
    move_to_hub(set_tiny_environment(monkeypatch, llama), loopback_hub, llama)
    with webhook() as hook:
        Path(".env").write_text(f"TAGGER_RUN_LOG=json\nTAGGER_RUN_NOTIFY={hook.url}\n")
        done = python("-m", "job")
    assert done.returncode == 0, done.stderr
    assert_notified(hook, done.stderr)
    found = events(done.stderr)
    names = [entry["event"] for entry in found]
    assert names.count("train_step") == 3
    for name in ("run_started", "chapter_started", "checkpoint_saved", "scores", "gate", "published", "run_ended"):
        assert name in names, name
    [train] = [entry for entry in found if entry["event"] == "chapter_ended" and entry["chapter"] == "train"]
    assert train["completed"] is True
    last = next(entry for entry in reversed(found) if entry["event"] == "train_step")
    assert (last["step"], last["max_steps"], last["seconds_left"], last["chapter"]) == (3, 3, 0, "train")
    assert last["tokens_per_second"] > 0
    assert found[-1]["event"] == "run_ended"
    assert (found[-1]["status"], found[-1]["exit_code"]) == ("complete", 0)
    assert REPO in done.stdout  # results stay on standard output


def assert_notified(hook: Hook, stderr: str) -> None:
    """Check what the webhook was told about a run, and that its URL is nowhere."""
    [told] = hook.received
    assert (told["status"], told["exit_code"], told["run_id"]) == ("complete", 0, "tiny")
    assert told["verdict"]["verdict"] == "pass"
    assert told["commit"] in told["text"]
    assert f"micro-F1 {told['scores']['adapter']['micro_f1']:.3f}" in told["text"]
    assert told["seconds"] > 0
    assert SECRET not in stderr
    for file in Path("runs").rglob("*"):
        assert file.is_dir() or SECRET.encode() not in file.read_bytes(), file


def test_a_refusal_of_settings_is_an_event_too() -> None:
    done = python("-m", "job", TAGGER_RUN_LOG="json", TAGGER_LORA_R="0")
    [error] = events(done.stderr)
    assert (error["event"], error["exit_code"], done.returncode) == ("error", 2, 2)
    assert error["message"] == "TAGGER_LORA_R=0: expected a value of at least 1."


def test_a_style_that_is_none_is_refused() -> None:
    done = python("-m", "job", TAGGER_RUN_LOG="xml")
    assert done.returncode == 2
    assert done.stderr == "error: TAGGER_RUN_LOG=xml: expected 'text' or 'json'.\n"


def test_every_event_is_documented() -> None:
    page = (ROOT / "docs" / "logs.md").read_text(encoding="utf-8")
    for name, meaning in EVENTS.items():
        assert f"| `{name}` | {meaning} |" in page, name
