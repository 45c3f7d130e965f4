"""Several processes of one command tag the parts of a job: each part once, and the same bytes as one process."""

from __future__ import annotations

import json
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from stub_tagger import StubTagger, job, tag
from test_tag import TEXTS, tiny, trained  # noqa: F401 - fixtures

from job import tag_workers
from job.cli import main
from job.distributed.place import Place
from job.settings import Settings
from job.tagging.plan import Job
from job.tagging.worker import finish, open_job
from job.types import TaggedText

ROWS = [{"id": i, "quote": f"text {i}"} for i in range(60)]


@pytest.fixture
def given(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return path


class NotedTagger(StubTagger):
    """Notes each text that it is given, in a file that other processes append to as well."""

    def __init__(self, file: Path) -> None:
        super().__init__(seconds=0.002)
        self._file = file

    def answers(self, texts: Sequence[str]) -> Iterator[tuple[int, TaggedText]]:
        with self._file.open("a") as file:
            file.write("".join(f"{text}\n" for text in texts))
        return super().answers(texts)


def fork(what: Job, folder: Path, settings: Settings, ranks: Sequence[int]) -> list[int]:
    """Start processes that take part in a job, without the time to import torch; return their ids."""
    _, parts = open_job(what)
    inputs = {
        "settings": settings.model_dump(mode="json"),
        "adapter": "none",
        "job": json.loads(json.dumps(what.as_json())),
        "todo": parts.unsealed(),
        "folder": str(folder),
    }
    folder.mkdir()
    pids = []
    for rank in ranks:
        if (pid := os.fork()) == 0:
            place = Place(rank, len(ranks), len(ranks), "127.0.0.1", 0)
            tag_workers.take_part(place, inputs, lambda *_: NotedTagger(folder.parent / "noted"))
            os._exit(0)
        pids.append(pid)
    return pids


@pytest.mark.parametrize("suffix", ["jsonl", "csv/", "parquet/"])
def test_each_part_is_tagged_by_one_process(given: Path, tmp_path: Path, settings: Settings, suffix: str) -> None:
    tag(job(given, f"{tmp_path}/expected.{suffix}", columns=("id",), rows=3))
    what = job(given, f"{tmp_path}/out.{suffix}", columns=("id",), rows=3)
    assert all(os.waitpid(pid, 0)[1] == 0 for pid in fork(what, tmp_path / "shared", settings, range(3)))
    _, parts = open_job(what)
    assert finish(parts, None) is not None
    assert Counter((tmp_path / "noted").read_text().splitlines()) == Counter(row["quote"] for row in ROWS)
    expected, found = tmp_path / f"expected.{suffix}", tmp_path / f"out.{suffix}"
    if suffix.endswith("/"):
        for file in sorted(expected.glob("part-*")):
            assert (found / file.name).read_bytes() == file.read_bytes()
    else:
        assert found.read_bytes() == expected.read_bytes()
    reports = [json.loads(file.read_text()) for file in (tmp_path / "shared").glob("progress-*.json")]
    assert [sum(numbers) for numbers in zip(*reports, strict=True)] == [len(ROWS), len(parts)]


def test_what_a_killed_process_has_sealed_is_not_done_again(given: Path, tmp_path: Path, settings: Settings) -> None:
    what = job(given, f"{tmp_path}/out/", rows=3)
    pids = fork(what, tmp_path / "shared", settings, range(2))
    deadline = time.monotonic() + 30
    while not list((tmp_path / "out").glob("part-*")):
        assert time.monotonic() < deadline
        time.sleep(0.001)
    os.kill(pids[0], signal.SIGKILL)
    for pid in pids:
        os.waitpid(pid, 0)
    _, parts = open_job(what)
    left = parts.unsealed()
    assert len(left) <= 1, "the other process has done all but what the killed one had claimed"
    before = len((tmp_path / "noted").read_text().splitlines())
    for pid in fork(what, tmp_path / "again", settings, range(2)):
        assert os.waitpid(pid, 0)[1] == 0
    after = len((tmp_path / "noted").read_text().splitlines())
    assert parts.unsealed() == []
    seals = [parts.seal(part) for part in left]
    assert after - before == sum(seal.rows for seal in seals if seal is not None)


def test_one_command_starts_processes_that_write_the_same_bytes(
    tiny: pytest.MonkeyPatch,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    for name, value in {"VOCABULARY": "seen", "THRESHOLD": "0"}.items():
        tiny.setenv(f"TAGGER_SAMPLE_{name}", value)
    assert main(["tag"]) == 0
    expected = Path("out.jsonl").read_bytes()
    assert all(json.loads(line)["confidences"] for line in expected.splitlines())
    tiny.setenv("OMP_NUM_THREADS", "1")  # as in this process: other numbers of threads may round differently
    tiny.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    tiny.setenv("TAGGER_RUN_PROCESSES", "2")
    tiny.setenv("TAGGER_TAG_OUTPUT", "together.jsonl")
    capsys.readouterr()
    assert main(["tag"]) == 0
    assert Path("together.jsonl").read_bytes() == expected
    assert f"{len(TEXTS)} rows here in" in capsys.readouterr().out
    assert "tag: 2 processes" in caplog.text
