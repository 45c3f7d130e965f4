"""Train on two network namespaces that stand for two machines: `make two-machines`, as root on Linux.

Each has one end of a virtual cable. Machine 1 starts late and has no run folder; the cable is pulled in the middle of a
run; both machines get one number; the settings differ. What completes must be bitwise what one process trains, as must
what several processes train in a container: the one that starts them has number 1, and the root is read-only.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import conftest
import psutil

from job.distributed.group import LOST_SECONDS

ROOT = Path(__file__).parents[1]
ADDRESSES = ("10.213.77.1", "10.213.77.2")
SETTINGS = {
    "TAGGER_BASE_QUANTIZE": "none",
    "TAGGER_DATA_DATASET": str(conftest.SAYINGS),
    "TAGGER_DATA_LIMIT": "60",
    "TAGGER_DATA_EVAL_SIZE": "20",
    "TAGGER_TRAIN_MAX_STEPS": "60",
    "TAGGER_TRAIN_WARMUP_STEPS": "1",
    "TAGGER_TRAIN_LOGGING_STEPS": "2",
    "TAGGER_TRAIN_SAVE_STEPS": "1000",
    "TAGGER_TRAIN_MICRO_BATCH_TOKENS": "120",
    "TAGGER_SAMPLE_MAX_NEW_TOKENS": "8",
    "TAGGER_RUN_DEVICE": "cpu",
    "TAGGER_RUN_ID": "run",
    "TAGGER_HUB_PUSH": "never",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT),
}
COMPARED = ("adapter/adapter_model.safetensors", "log.jsonl", "predictions.jsonl", "samples.jsonl")


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


@contextmanager
def machines() -> Iterator[list[str]]:
    """Make two network namespaces with a cable between them; yield their names."""
    names = [f"tagger-{os.getpid()}-{number}" for number in range(2)]
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", "cable0", "netns", names[0], "type", "veth", "peer", "name", "cable1", "netns", names[1])
        for number, name in enumerate(names):
            ip("-n", name, "addr", "add", f"{ADDRESSES[number]}/24", "dev", f"cable{number}")
            ip("-n", name, "link", "set", f"cable{number}", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False)


class Trial:
    """Two machines that work on one run."""

    def __init__(self, names: list[str], folder: Path, base: Path) -> None:
        self._names, self._folder, self._base = names, folder, base
        for number in range(2):
            (folder / str(number)).mkdir(parents=True)

    def start(self, machine: int, *, number: int | None = None, **more: str) -> subprocess.Popen[str]:
        """Start the job on a machine that believes to be `number`."""
        environ = os.environ | SETTINGS | {"TAGGER_BASE_MODEL": str(self._base), "NNODES": "2"}
        environ |= {"NODE_RANK": str(machine if number is None else number), "MASTER_ADDR": ADDRESSES[0], **more}
        command = ["ip", "netns", "exec", self._names[machine], sys.executable, "-m", "job", "run"]
        folder = self._folder / str(machine)
        return subprocess.Popen(command, cwd=folder, env=environ, stderr=subprocess.PIPE, text=True)

    def wait_for_steps(self, steps: int) -> None:
        log, deadline = self._folder / "0" / "runs" / "run" / "log.jsonl", time.monotonic() + 120
        while not log.exists() or json.loads(log.read_text().splitlines()[-1])["step"] < steps:
            assert time.monotonic() < deadline, "no step was logged"
            time.sleep(0.02)

    def result(self) -> dict[str, bytes]:
        return {name: (self._folder / "0" / "runs" / "run" / name).read_bytes() for name in COMPARED}


def end(*processes: subprocess.Popen[str], seconds: float = 180) -> list[tuple[int, str]]:
    return [(process.communicate(timeout=seconds)[1], process.returncode)[::-1] for process in processes]


def alone(folder: Path, base: Path) -> dict[str, bytes]:
    folder.mkdir()
    environ = os.environ | SETTINGS | {"TAGGER_BASE_MODEL": str(base)}
    subprocess.run([sys.executable, "-m", "job", "run"], cwd=folder, env=environ, check=True, capture_output=True)
    return {name: (folder / "runs" / "run" / name).read_bytes() for name in COMPARED}


CONTAINER = """
set -e
mount --make-rprivate /
mount -t proc proc /proc
mount --bind "$0" "$0"
mount --bind / / || true
mount -o remount,ro,bind /
cd "$0"
if touch "$1/not-read-only" 2> /dev/null; then echo "the root is not read-only"; exit 9; fi
exec "$2" -m job run
"""
"""Runs the job as process 1, with a read-only root and one writable folder."""


def in_a_container(folder: Path, base: Path, expected: dict[str, bytes]) -> None:
    """Train with three processes in a container, interrupt that, and resume with two."""
    folder.mkdir()
    environ = os.environ | SETTINGS | {"TAGGER_BASE_MODEL": str(base), "HF_HOME": str(folder / "cache")}
    environ |= {"TMPDIR": str(folder), "HOME": str(folder)}
    command = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", CONTAINER]
    arguments = [str(folder), str(folder.parent), sys.executable]

    def start(processes: int) -> subprocess.Popen[str]:
        more = {"TAGGER_RUN_PROCESSES": str(processes)}
        return subprocess.Popen([*command, *arguments], env=environ | more, stderr=subprocess.PIPE, text=True)

    first = start(3)
    log, deadline = folder / "runs" / "run" / "log.jsonl", time.monotonic() + 120
    while not log.exists():
        assert time.monotonic() < deadline and first.poll() is None, first.communicate()[1]
        time.sleep(0.02)
    [job] = psutil.Process(first.pid).children()
    job.terminate()
    started = time.monotonic()
    [(code, errors)] = end(first)
    assert code == 75, errors
    print(f"in a container, process 1 had SIGTERM: ended with 75 after {time.monotonic() - started:.1f} s")
    [(code, errors)] = end(start(2))
    assert code == 0, errors
    assert {name: (folder / "runs" / "run" / name).read_bytes() for name in COMPARED} == expected
    print("and resumed with fewer processes, the result of one process")


def main() -> None:
    scratch = Path(tempfile.mkdtemp(prefix="tagger-two-machines-"))
    rows = [json.loads(line) for line in conftest.SAYINGS.read_text(encoding="utf-8").splitlines()]
    base = scratch / "base"
    conftest.make_llama(conftest.make_llama_tokenizer(rows), base)
    expected = alone(scratch / "alone", base)
    in_a_container(scratch / "container", base, expected)
    with machines() as names:
        late = Trial(names, scratch / "late", base)
        first = late.start(0)
        time.sleep(5)
        ended = end(first, late.start(1, TAGGER_RUN_PROCESSES="1"))
        assert [code for code, _ in ended] == [0, 0], ended
        assert late.result() == expected
        assert not (scratch / "late" / "1" / "runs").exists()
        print("machine 1 started late, without a run folder: the result of one process")

        again = end(late.start(0), late.start(1))
        assert [code for code, _ in again] == [0, 0], again
        print("a complete run: both end with 0")

        cut = Trial(names, scratch / "cut", base)
        many = {"TAGGER_RUN_PROCESSES": "2"}
        running = [cut.start(machine, **many) for machine in range(2)]
        cut.wait_for_steps(6)
        ip("-n", names[0], "link", "set", "cable0", "down")
        started = time.monotonic()
        ended = end(*running)
        assert [code for code, _ in ended] == [75, 75], ended
        print(f"the cable was pulled: both ended with 75 after {time.monotonic() - started:.1f} s")
        assert time.monotonic() - started < 3 * LOST_SECONDS
        ip("-n", names[0], "link", "set", "cable0", "up")
        ended = end(*(cut.start(machine) for machine in range(2)))
        assert [code for code, _ in ended] == [0, 0], ended
        assert "resuming after step" in ended[0][1], ended
        assert cut.result() == expected
        print("and was plugged in again: resumed with fewer processes, the result of one process")

        wrong = Trial(names, scratch / "wrong", base)
        ended = end(wrong.start(0), wrong.start(1, number=0))
        assert [code for code, _ in ended] == [2, 2], ended
        assert any("two machines have the number 0" in errors for _, errors in ended), ended
        ended = end(wrong.start(0), wrong.start(1, TAGGER_LORA_R="4"))
        assert [code for code, _ in ended] == [2, 2], ended
        assert all("TAGGER_LORA_R is 4 and not 16" in errors for _, errors in ended), ended
        print("one number for both machines, and other settings: refused on both with code 2")
    shutil.rmtree(scratch)


if __name__ == "__main__":
    if os.geteuid() != 0 or shutil.which("ip") is None:
        sys.exit("two-machines: skipped, it needs root and the program `ip` (iproute2) to make network namespaces")
    main()
