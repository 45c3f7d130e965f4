"""Parts and seals: the same bytes for any number of workers, in any order, whatever was killed or damaged."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet
from stub_tagger import StubTagger, job, tag

from job.errors import InvalidInputError
from job.tagging.plan import PLAN, SUCCESS, open_parts, restart
from job.tagging.progress import Progress
from job.tagging.worker import open_data, tag_part, work

ROWS = [{"id": i, "quote": f"text {i}" + ' with "quotes", a comma' * (i % 3 == 0)} for i in range(95)]
FORMATS = ["jsonl", "csv", "parquet", "jsonl.gz", "csv.zst", "parquet.gz"]


@pytest.fixture
def given(tmp_path: Path) -> Path:
    return write(tmp_path / "in.jsonl", ROWS)


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def unpacked(path: Path) -> bytes:
    content = path.read_bytes()
    if path.suffix == ".gz":
        return gzip.decompress(content)
    return pa.CompressedInputStream(pa.BufferReader(content), "zstd").read() if path.suffix == ".zst" else content


def rows_of(path: Path) -> list[dict[str, Any]]:
    content = unpacked(path)
    if ".parquet" in path.name:
        return list(parquet.read_table(pa.BufferReader(content)).to_pylist())
    if ".csv" in path.name:
        return list(csv.DictReader(io.StringIO(content.decode(), newline="")))
    return [json.loads(line) for line in content.splitlines()]


@pytest.fixture
def expected(given: Path, tmp_path: Path) -> dict[str, bytes]:
    """What one worker writes into a folder."""
    tag(job(given, f"{tmp_path}/expected/"))
    return contents(tmp_path / "expected")


def test_each_row_is_answered_in_order(given: Path, tmp_path: Path) -> None:
    success = tag(job(given, tmp_path / "out.jsonl"))
    found = lines(tmp_path / "out.jsonl")
    assert [(row["id"], row["quote"]) for row in found] == [(row["id"], row["quote"]) for row in ROWS]
    assert all(list(row) == ["id", "quote", "tags", "confidences", "error"] for row in found)
    assert all(len(row["tags"]) == len(row["confidences"]) and row["error"] is None for row in found)
    assert (success["rows"], success["errors"]) == (95, {})
    assert success["tags"] == sum(len(row["tags"]) for row in found)


@pytest.mark.parametrize("suffix", FORMATS)
def test_parts_after_one_another_are_the_one_file(given: Path, tmp_path: Path, suffix: str) -> None:
    tag(job(given, tmp_path / f"one.{suffix}"))
    tag(job(given, f"{tmp_path}/parts.{suffix}/"))
    parts = sorted((tmp_path / f"parts.{suffix}").glob("part-*"))
    assert len(parts) > 5 and all(part.name.endswith(suffix) for part in parts)
    one = tmp_path / f"one.{suffix}"
    if "parquet" in suffix:  # the row groups are, the bytes cannot be
        assert [row for part in parts for row in rows_of(part)] == rows_of(one)
        groups = parquet.ParquetFile(pa.BufferReader(unpacked(one))).metadata
        assert groups.num_row_groups == len(parts)
    else:
        assert b"".join(part.read_bytes() for part in parts) == one.read_bytes()
    found = rows_of(one)
    assert [str(row["id"]) for row in found] == [str(row["id"]) for row in ROWS]
    plain = [StubTagger().answers([row["quote"]]) for row in ROWS]
    tags = [list(next(answer)[1].tags) for answer in plain]
    assert [row["tags"] if isinstance(row["tags"], list) else json.loads(row["tags"]) for row in found] == tags
    assert not list((tmp_path / f".one.{suffix}.parts").glob("part-*")), "they are in the file"


@pytest.mark.parametrize("count", [2, 3, 7, 20])
def test_any_number_of_workers_writes_the_same_bytes(
    given: Path, tmp_path: Path, expected: dict[str, bytes], count: int
) -> None:
    workers = random.Random(count).sample(range(count), count)
    what = job(given, f"{tmp_path}/out/")
    for worker in workers[1:]:  # each does its own and dies before it helps
        data = open_data(what)
        parts = open_parts(what, data)
        for part in reversed(range(worker * len(parts) // count, (worker + 1) * len(parts) // count)):
            tag_part(parts, data, part, StubTagger(), Progress())
    tag(what, f"{workers[0]}/{count}")
    assert contents(tmp_path / "out") == expected


def test_a_worker_helps_with_what_is_unsealed(given: Path, tmp_path: Path, expected: dict[str, bytes]) -> None:
    tag(job(given, f"{tmp_path}/out/"), "4/5")
    assert contents(tmp_path / "out") == expected


def test_what_is_sealed_is_not_done_again(given: Path, tmp_path: Path) -> None:
    what = job(given, f"{tmp_path}/out/")
    data = open_data(what)
    parts = open_parts(what, data)
    for part in (0, 3):
        tag_part(parts, data, part, StubTagger(), Progress())
    tagger = StubTagger()
    work(what, lambda: tagger, Progress())
    done = {row["quote"] for part in (0, 3) for row in lines(tmp_path / "out" / parts.file(part))}
    assert sorted(tagger.texts) == sorted(row["quote"] for row in ROWS if row["quote"] not in done)
    for output in (f"{tmp_path}/out/", tmp_path / "one.jsonl"):
        tag(job(given, output))
        work(job(given, output), lambda: pytest.fail("there is nothing to do"), Progress())


@pytest.mark.parametrize("output", ["out/", "out.jsonl"])
def test_killed_workers_leave_the_same_bytes(given: Path, tmp_path: Path, output: str) -> None:
    tag(job(given, f"{tmp_path}/expected{output.removeprefix('out')}"))
    rng = random.Random(output)
    what = job(given, f"{tmp_path}/{output}", rows=3)
    tag(job(given, f"{tmp_path}/expected-{output}", rows=3))
    kills = 0
    while kills < 4:
        pids = [fork_worker(what, f"{i}/3") for i in range(3)]
        time.sleep(rng.uniform(0.01, 0.12))
        for pid in pids[: rng.choice((1, 3))]:
            os.kill(pid, signal.SIGKILL)
        kills += 1
        for pid in pids:
            os.waitpid(pid, 0)
    tag(what)
    if output.endswith("/"):
        assert contents(tmp_path / "out") == contents(tmp_path / "expected-out")
    else:
        assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "expected-out.jsonl").read_bytes()
        assert set(contents(tmp_path / ".out.jsonl.parts")) == {PLAN, SUCCESS}


def fork_worker(what: Any, shard: str) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        tag(what, shard, seconds=0.002)
    finally:
        os._exit(0)


@pytest.mark.parametrize("damage", ["part torn", "part changed", "part missing", "seal torn", "seal of another slice"])
@pytest.mark.parametrize("output", ["out/", "out.jsonl"])
def test_a_damaged_part_is_done_again(
    given: Path, tmp_path: Path, expected: dict[str, bytes], damage: str, output: str
) -> None:
    what = job(given, f"{tmp_path}/{output}")
    parts = work(what, StubTagger, Progress())
    file, seal = parts.folder.path / parts.file(2), parts.folder.path / parts.seal_file(2)  # type: ignore[attr-defined]
    content = file.read_bytes()
    {
        "part torn": lambda: file.write_bytes(content[:-9]),
        "part changed": lambda: file.write_bytes(content.replace(b"tag", b"gat")),
        "part missing": file.unlink,
        "seal torn": lambda: seal.write_bytes(seal.read_bytes()[:40]),
        "seal of another slice": lambda: seal.write_bytes(seal.read_bytes().replace(b'"start"', b'"began"')),
    }[damage]()
    tag(what)
    if output == "out/":
        assert contents(tmp_path / "out") == expected
    else:
        assert (tmp_path / "out.jsonl").read_bytes() == b"".join(
            content for name, content in sorted(expected.items()) if name.startswith("part-")
        )


def test_a_changed_answer_file_is_made_again(given: Path, tmp_path: Path) -> None:
    tag(job(given, tmp_path / "out.jsonl"))
    content = (tmp_path / "out.jsonl").read_bytes()
    for damage in (Path.unlink, lambda path: path.write_bytes(content[:100])):
        damage(tmp_path / "out.jsonl")
        tag(job(given, tmp_path / "out.jsonl"))
        assert (tmp_path / "out.jsonl").read_bytes() == content


@pytest.mark.parametrize("output", ["out/", "out.jsonl"])
@pytest.mark.parametrize("complete", [True, False])
def test_parts_of_another_adapter_are_refused(given: Path, tmp_path: Path, output: str, complete: bool) -> None:
    old = job(given, f"{tmp_path}/{output}")
    if complete:
        tag(old)
    else:
        data = open_data(old)
        tag_part(open_parts(old, data), data, 4, StubTagger(), Progress())
    before = contents(tmp_path)
    new = job(given, f"{tmp_path}/{output}", tagger={"adapter": "ada/tagger@2", "threshold": 0.4})
    with pytest.raises(InvalidInputError) as refusal:
        tag(new)
    assert "adapter was 'ada/tagger@1' and is 'ada/tagger@2'; threshold was 0.3 and is 0.4" in str(refusal.value)
    assert "--restart" in str(refusal.value)
    assert contents(tmp_path) == before
    restart(new)
    success = tag(new)
    assert (success["tagger"]["threshold"], success["rows"]) == (0.4, len(ROWS))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": 20}, "TAGGER_TAG_PART_ROWS was 10 and is 20"),
        ({"columns": ("id",)}, "TAGGER_TAG_COLUMNS was None and is ['id']"),
        ({"text_column": "id"}, "TAGGER_DATA_TEXT_COLUMN was 'quote' and is 'id'"),
    ],
)
def test_parts_with_other_settings_are_refused(
    given: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    tag(job(given, f"{tmp_path}/out/"))
    with pytest.raises(InvalidInputError) as refusal:
        tag(job(given, f"{tmp_path}/out/", **change))
    assert message in str(refusal.value)


def test_a_changed_input_is_refused(given: Path, tmp_path: Path) -> None:
    what = job(given, f"{tmp_path}/out/")
    tag(what)
    given.touch()
    tag(what)
    write(given, ROWS[::-1])
    with pytest.raises(InvalidInputError, match="in.jsonl are not what they were.*--restart"):
        tag(what)
    restart(what)
    tag(what)
    assert lines(tmp_path / "out" / "part-00000.jsonl")[0]["id"] == 94


def test_an_input_that_grows_meanwhile_is_refused(given: Path, tmp_path: Path) -> None:
    class Growing(StubTagger):
        def answers(self, texts: Any) -> Iterator[Any]:
            given.write_bytes(given.read_bytes() + b'{"quote": "more"}\n')
            return super().answers(texts)

    with pytest.raises(InvalidInputError, match="was changed while it was read"):
        work(job(given, f"{tmp_path}/out/"), Growing, Progress())


def test_a_restart_that_was_killed_can_be_repeated(given: Path, tmp_path: Path) -> None:
    what = job(given, tmp_path / "out.jsonl")
    tag(what)
    expected = (tmp_path / "out.jsonl").read_bytes()
    restart(what)
    assert (tmp_path / "out.jsonl").read_bytes() == expected, "the old answers stay until there are new ones"
    tag(what)
    assert (tmp_path / "out.jsonl").read_bytes() == expected


def test_a_folder_with_other_files_is_refused(given: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    what = job(given, f"{tmp_path}/out/")
    restart(what)
    with pytest.raises(InvalidInputError, match="out holds notes.txt and no parts of this job"):
        tag(what)
    assert contents(tmp_path / "out") == {"notes.txt": b"mine"}
    (tmp_path / "out" / "_parts").mkdir()
    (tmp_path / "out" / PLAN).write_text('{"schema_version": 9}')
    with pytest.raises(InvalidInputError, match="parts.json is not a plan of this version"):
        tag(what)


def test_defects_of_rows_are_errors_of_rows(tmp_path: Path) -> None:
    content = (
        b'{"quote": "fine"}\n{"quote": ""}\n{"id": 1}\n{"quote": null}\n{"quote": 7}\n{"quote": ["a"]}\nno JSON\n[]\n'
        b'{"quote": "\xff"}\n{"quote": "\\ud83d"}\n{"quote": "a long text"}\n{"quote": "an open one"}\n'
        b'{"quote": "open, long"}\n{"quote": "nan"}\n'
    )
    (tmp_path / "in.jsonl").write_bytes(content)
    success = tag(job(tmp_path / "in.jsonl", tmp_path / "out.jsonl", rows=3))
    found = lines(tmp_path / "out.jsonl")
    errors = [None, *["no text"] * 5, "not JSON", "not JSON", "not valid Unicode", "not valid Unicode"]
    cut, not_closed = "text cut to 512 tokens", "list not closed"
    assert [row["error"] for row in found] == [*errors, cut, not_closed, f"{cut}; {not_closed}", "no text"]
    assert [bool(row["tags"]) for row in found] == [True, *[False] * 9, True, True, True, False]
    assert success["errors"] == {cut: 2, not_closed: 2, "no text": 6, "not JSON": 2, "not valid Unicode": 2}
    assert (success["untagged"], success["rows"]) == (10, 14)
    for limit in (0.5, 9, 0):
        with pytest.raises(InvalidInputError, match=r"10 of 14 rows could not be tagged \(no text: 6, "):
            tag(job(tmp_path / "in.jsonl", f"{tmp_path}/more/", rows=3), max_errors=limit)
        assert not (tmp_path / "more" / SUCCESS).exists()
    tag(job(tmp_path / "in.jsonl", f"{tmp_path}/more/", rows=3), max_errors=0.9)


def test_columns_of_the_output_win_over_those_of_the_input(tmp_path: Path) -> None:
    given = write(tmp_path / "in.jsonl", [{"tags": ["gold"], "quote": "a", "error": "mine", "x": {"y": [1.50, None]}}])
    tag(job(given, tmp_path / "out.jsonl"))
    [row] = lines(tmp_path / "out.jsonl")
    assert list(row) == ["quote", "x", "tags", "confidences", "error"]
    assert (row["x"], row["error"]) == ({"y": [1.5, None]}, None)
    assert row["tags"] != ["gold"]
    tag(job(given, tmp_path / "few.csv", columns=("x.y", "x")))
    header, row = csv.reader((tmp_path / "few.csv").read_text().splitlines())
    assert (header[:3], row[:2]) == (["x.y", "x", "tags"], ["[1.5, null]", '{"y": [1.5, null]}'])


def test_parquet_columns_keep_their_types(tmp_path: Path) -> None:
    table = pa.table(
        {
            "quote": ["a", "b", None],
            "when": pa.array([0, 10**15, None], pa.timestamp("us", tz="UTC")),
            "price": pa.array([1, 2, None], pa.decimal128(9, 2)),
            "vector": pa.array([[1.5], [], None], pa.list_(pa.float32())),
            "raw": pa.array([b"\xff", b"text", None]),
        }
    )
    parquet.write_table(table, tmp_path / "in.parquet")
    tag(job(tmp_path / "in.parquet", tmp_path / "out.parquet"))
    found = parquet.read_table(tmp_path / "out.parquet")
    for name in ("quote", "when", "price", "vector"):
        assert found[name].to_pylist() == table[name].to_pylist()
        assert found.schema.field(name).type == table.schema.field(name).type
    assert found["error"].to_pylist() == [None, None, "no text"]
    tag(job(tmp_path / "in.parquet", tmp_path / "out.jsonl"))
    row = lines(tmp_path / "out.jsonl")[1]
    assert (row["when"], row["price"], row["raw"]) == ("2001-09-09T01:46:40+00:00", "2.00", "text")


def test_output_folders_can_be_tagged_again(given: Path, tmp_path: Path) -> None:
    tag(job(given, f"{tmp_path}/out/"))
    tag(job(tmp_path / "out", tmp_path / "again.jsonl"))
    assert [row["id"] for row in lines(tmp_path / "again.jsonl")] == [row["id"] for row in ROWS]
