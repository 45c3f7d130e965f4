"""The script that CI runs passes the exit code on, and reports what it means."""

from __future__ import annotations

import functools
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
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


SAVE = (
    "import os, signal, sys, time\n"
    "def save(number, frame):\n    time.sleep(0.3); open(os.environ['SEEN'], 'a').write(signal.Signals(number).name)\n"
    "    sys.exit(75)\n"
    "for number in (signal.SIGTERM, signal.SIGINT): signal.signal(number, save)\n"
    "open(os.environ['READY'], 'w').close(); time.sleep(30)"
)
"""A job that takes a moment to save its state."""


@pytest.fixture
def tools(tmp_path: Path) -> dict[str, str]:
    """Return an environment with a checkout of the script, and a folder for programs that comes first in PATH."""
    (tmp_path / "checkout" / ".ci").mkdir(parents=True)
    (tmp_path / "checkout" / ".ci" / "retrain").write_bytes((ROOT / ".ci" / "retrain").read_bytes())
    (tmp_path / "checkout" / ".ci" / "retrain").chmod(0o755)
    (tmp_path / "checkout" / "job").symlink_to(ROOT / "job")
    (tmp_path / "bin").mkdir()
    return {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "SEEN": str(tmp_path / "seen"),
        "READY": str(tmp_path / "ready"),
    }


def write_program(path: Path, code: str = SAVE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!{sys.executable}\n{code}\n")
    path.chmod(0o755)


def start(tools: dict[str, str], **environ: str) -> subprocess.Popen[str]:
    script = Path(tools["SEEN"]).parent / "checkout" / ".ci" / "retrain"
    process = subprocess.Popen([script], env=tools | environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not Path(tools["READY"]).exists():
        time.sleep(0.02)
        assert process.poll() is None
    return process


@pytest.mark.parametrize("signalled", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("where", ["plain", "image", "modal"])
def test_retrain_passes_a_signal_on_and_waits(
    tools: dict[str, str], tmp_path: Path, where: str, signalled: signal.Signals
) -> None:
    environ = {"plain": {}, "image": {"RETRAIN_IMAGE": "tagger-job"}, "modal": {"RETRAIN_ON": "modal"}}[where]
    write_program(tmp_path / "bin" / "make", "")
    write_program(tmp_path / "checkout" / ".venv" / "bin" / "tagger-job")
    write_program(tmp_path / "bin" / "docker")
    # `python3 -m venv FOLDER` makes a client whose `python -m modal run` is the job
    write_program(
        tmp_path / "bin" / "python3",
        "import os, pathlib, sys\n"
        f"if sys.argv[1] == '-c': os.execv({sys.executable!r}, sys.argv)\n"
        "python = pathlib.Path(sys.argv[3], 'bin', 'python'); python.parent.mkdir()\n"
        f"python.write_text('#!{sys.executable}\\nimport sys\\nif \"pip\" in sys.argv: sys.exit()\\n' + {SAVE!r})\n"
        "python.chmod(0o755)",
    )
    process = start(tools, **environ)
    process.send_signal(signalled)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, Path(tools["SEEN"]).read_text()) == (75, signalled.name), err
    assert out.startswith(f"**75**: {EXIT_CODES[75].meaning}")


@pytest.mark.parametrize("ends_with", ["2", "143"])
def test_a_signal_during_the_installation_ends_with_75(tools: dict[str, str], tmp_path: Path, ends_with: str) -> None:
    """`make` reports an interruption with 2, which would mean that settings are wrong."""
    code = SAVE.replace("sys.exit(75)", f"os._exit({ends_with})")
    write_program(tmp_path / "bin" / "make", code)
    process = start(tools)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 75, err


@pytest.mark.parametrize("redirection", [">&-", "2>&-", "<&-", ">&- 2>&- <&-", "> >(head -c 0)", "2> >(head -c 0)"])
@pytest.mark.parametrize("code", [0, 3])
def test_whoever_reads_its_output_does_not_change_the_code(
    tools: dict[str, str], tmp_path: Path, redirection: str, code: int
) -> None:
    write_program(tmp_path / "bin" / "docker", f"import sys; print('a line'); sys.exit({code})")
    script = shlex.quote(str(tmp_path / "checkout" / ".ci" / "retrain"))
    environ = {**tools, "RETRAIN_IMAGE": "tagger-job", "GITHUB_ACTIONS": "true", "GITHUB_OUTPUT": str(tmp_path / "out")}
    done = subprocess.run(["bash", "-c", f"{script} {redirection}"], env=environ, capture_output=True, check=False)
    assert done.returncode == code, done.stderr
    assert (tmp_path / "out").read_text() == f"code={code}\n"


def test_a_report_gives_ci_no_commands(tools: dict[str, str], tmp_path: Path) -> None:
    report = tmp_path / "report.md"
    report.write_text(
        "::error::forged\n| \x1b[31mred | ##vso[task.complete] |\r\n  ::add-mask::x\n| caf\u00e9 :: ## |\n"
    )
    write_program(
        tmp_path / "bin" / "docker",
        "import os, shutil, time; os.makedirs('runs/a'); time.sleep(0.02); "
        f"shutil.copy({str(report)!r}, 'runs/a/report.md')",
    )
    script = tmp_path / "checkout" / ".ci" / "retrain"
    environ = {**tools, "RETRAIN_IMAGE": "tagger-job"}
    done = subprocess.run([script], env=environ, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[2:] == [
        ":error::forged",
        "| [31mred | # #vso[task.complete] |",
        "  :add-mask::x",
        "| caf\u00e9 :: ## |",
    ]


@pytest.mark.parametrize(
    ("service", "code", "said"),
    [
        ('{"dependencies": [{"name": "a", "version": "1", "vulns": []}]}', 0, "1 packages, 0 known vulnerabilities"),
        (
            '{"dependencies": [{"name": "a", "version": "1", "vulns": [{"id": "X-1", "fix_versions": ["2"]}]}]}',
            1,
            "a 1 has X-1, fixed in 2",
        ),
        ("", 75, "audit: NOT DONE for requirements.lock, "),
        ("<html>", 75, "not audited: "),
    ],
)
def test_an_audit_that_could_not_be_done_is_not_taken_for_a_clean_one(
    tmp_path: Path, service: str, code: int, said: str
) -> None:
    (tmp_path / "pip_audit.py").write_text(f"import sys; print({service!r}); sys.exit(1)")  # its code for both
    environ = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, ROOT / ".ci" / "audit"]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert said in done.stdout + done.stderr


def torch_index(*arguments: str, **environ: str) -> tuple[str, str]:
    """Return what .ci/torch-index prints: the option for pip, and what it says about it."""
    command = [sys.executable, str(ROOT / ".ci" / "torch-index"), *arguments]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=True, timeout=30)
    return done.stdout.strip(), done.stderr


def test_the_cpu_build_of_torch_is_taken_where_its_index_can_be_reached(tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        index = f"http://127.0.0.1:{server.server_port}"
        option, said = torch_index(index, "/nowhere")
        assert (option, "PyTorch's CPU build is installed" in said) == (f"--extra-index-url {index}", True)
        (tmp_path / "driver").touch()
        assert torch_index(index, str(tmp_path / "driver")) == ("", "")
        assert torch_index(index, "/nowhere", PIP_EXTRA_INDEX_URL="https://example.com") == ("", "")
        server.shutdown()
    started = time.monotonic()
    option, said = torch_index(index, "/nowhere")
    assert (option, "PyTorch comes from the usual index" in said) == ("", True)
    assert time.monotonic() - started < 10
