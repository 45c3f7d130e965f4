"""The script that CI runs passes the exit code on, and reports what it means."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from job.errors import EXIT_CODES

ROOT = Path(__file__).parents[1]
DOCKER = """#!/bin/sh
echo "$@" > "$SEEN"
mkdir -p "$RUNS/tiny" && echo "| adapter | 0.5 |" > "$RUNS/tiny/report.md"
exit $CODE
"""


@pytest.mark.parametrize("code", EXIT_CODES)
def test_retrain_explains_each_exit_code_and_prints_no_secret(tmp_path: Path, code: int) -> None:
    docker = tmp_path / "bin" / "docker"
    docker.parent.mkdir()
    docker.write_text(DOCKER)
    docker.chmod(0o755)
    old = tmp_path / "runs" / "old" / "report.md"
    old.parent.mkdir(parents=True)
    old.write_text("an earlier run")
    os.utime(old, (1, 1))
    environ = {
        "PATH": f"{docker.parent}:{os.environ['PATH']}",
        "SEEN": str(tmp_path / "seen"),
        "RUNS": str(tmp_path / "runs"),
        "CODE": str(code),
        "RETRAIN_IMAGE": "tagger-job",
        "TAGGER_RUN_DIR": str(tmp_path / "runs"),
        "HF_TOKEN": "hf_secret",
        "TAGGER_HUB_REPO": "ada/tagger",
        "GITHUB_ACTIONS": "true",
        **{name: str(tmp_path / name) for name in ("GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY")},
    }
    done = subprocess.run([ROOT / ".ci" / "retrain"], env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    summary = (tmp_path / "GITHUB_STEP_SUMMARY").read_text()
    entry = EXIT_CODES[code]
    assert summary.startswith(f"**{code}**: {entry.meaning}: {entry.action}\n")
    assert "| adapter | 0.5 |" in summary
    assert "an earlier run" not in summary
    assert f"::{entry.severity} title=retrain ended with {code}::{entry.meaning}: {entry.action}\n" in done.stdout
    assert (tmp_path / "GITHUB_OUTPUT").read_text() == f"code={code}\n"
    seen = (tmp_path / "seen").read_text()
    assert seen.endswith("tagger-job retrain\n")
    assert "--env HF_TOKEN --env TAGGER_HUB_REPO" in seen
    assert "hf_secret" not in seen + done.stdout + summary


PYTHON = """#!/bin/sh
echo "$@" >> "$SEEN"
case "$2" in
venv) mkdir "$3/bin" && cp "$0" "$3/bin/python" ;;
modal) mkdir -p "$RUNS/tiny" && echo "| adapter | 0.5 |" > "$RUNS/tiny/report.md" && exit $CODE ;;
esac
"""


@pytest.mark.parametrize("code", [0, 2, 3, 75])
def test_retrain_on_modal_installs_only_the_client(tmp_path: Path, code: int) -> None:
    python = tmp_path / "bin" / "python3"
    python.parent.mkdir()
    python.write_text(PYTHON)
    python.chmod(0o755)
    runs = tmp_path / "runs"
    environ = {"PATH": f"{python.parent}:{os.environ['PATH']}", "SEEN": str(tmp_path / "seen"), "RUNS": str(runs)}
    environ |= {
        "CODE": str(code),
        "RETRAIN_ON": "modal",
        "TAGGER_RUN_DIR": str(runs),
        "MODAL_TOKEN_SECRET": "as-secret",
    }
    done = subprocess.run([ROOT / ".ci" / "retrain"], env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert done.stdout.startswith(f"**{code}**: ")
    assert "| adapter | 0.5 |" in done.stdout
    _, install, retrain, *_ = (tmp_path / "seen").read_text().splitlines()
    assert install == "-m pip install --quiet --no-deps --require-hashes -r requirements-modal.lock"
    assert retrain == f"-m modal run modal_app.py::retrain --to {runs}"
