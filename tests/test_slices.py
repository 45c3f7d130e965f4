"""Slices, one after another, are the rows of the plain reader: none is missing, none is read twice."""

from __future__ import annotations

import csv
import gzip
import io
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
from hub import Hub, Repo
from pyarrow import parquet

from job.dataset.readers import Reading, Row, Span, read_file
from job.dataset.slices import SlicedData
from job.dataset.sources import SourceFile
from job.errors import InvalidInputError
from job.settings import Data

READING = Reading(("quote",), every=True, keep_defects=True)
TEXTS = [
    "a",
    "two words",
    "with \n a line feed",
    'a "quote", and a comma',
    "中文 é 😀",
    "x" * 300,
    " ",
    "\r\n \u2028 end",
]
ROWS = [{"id": str(i), "quote": f"{TEXTS[i % len(TEXTS)]} {i}"} for i in range(57)]


def as_csv(rows: Sequence[dict[str, Any]], **dialect: Any) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), **dialect)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def as_lines(rows: Sequence[dict[str, Any]], end: str = "\n") -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + end for row in rows).encode()


def source(path: Path) -> SourceFile:
    return SourceFile(str(path), str(path))


def read(path: Path | str, rows: int, columns: Sequence[str] | None = None, **knobs: Any) -> list[Row]:
    data = SlicedData(Data(dataset=str(path), **knobs), columns)
    return [row for piece in data.slices(rows) for row in data.read(piece)]


def values(rows: Iterator[Row] | Sequence[Row]) -> list[Any]:
    return [row.defect or dict(row.values) for row in rows]


@pytest.mark.parametrize(
    "content",
    [
        as_lines(ROWS[:9]),
        as_lines(ROWS[:9], "\r\n"),
        b"\xef\xbb\xbf" + as_lines(ROWS[:9]) + b"\n\n" + as_lines(ROWS[:2]).rstrip(),
        b"\n" + as_lines(ROWS[:3]) + b"not JSON\n" + b'{"quote": "\xff"}\n[1]\n',
    ],
    ids=["lines", "CRLF", "mark, blank lines, no last line feed", "defects"],
)
def test_byte_ranges_are_the_lines_at_all_offsets(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    file = source(tmp_path / "a.jsonl")
    plain = values(read_file(file, READING))
    assert len(plain) >= 6
    for offset in range(len(content) + 1):
        two = [Span("bytes", 0, offset), Span("bytes", offset, len(content))]
        assert [value for span in two for value in values(read_file(file, READING, span))] == plain, offset
    for step in (1, 2, 3, 7, 64, len(content)):
        spans = [Span("bytes", start, min(start + step, len(content))) for start in range(0, len(content), step)]
        assert [value for span in spans for value in values(read_file(file, READING, span))] == plain, step


@pytest.mark.parametrize("rows", [1, 2, 10, 1000])
@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.json", "a.csv", "a.tsv", "a.jsonl.gz", "a.csv.gz", "a.csv.zst", "a.parquet"]
)
def test_slices_are_the_rows_of_the_plain_reader(tmp_path: Path, name: str, rows: int) -> None:
    path = tmp_path / name
    kind = name.split(".")[1]
    if kind == "parquet":
        parquet.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=13)
    else:
        content = {
            "jsonl": as_lines(ROWS),
            "json": json.dumps(ROWS).encode(),
            "csv": as_csv(ROWS, lineterminator="\r\n"),
            "tsv": as_csv(ROWS, delimiter="\t"),
        }[kind]
        codec = {"gz": gzip.compress, "zst": lambda data: pa.Codec("zstd").compress(data, asbytes=True)}
        path.write_bytes(codec[name.split(".")[2]](content) if name.count(".") == 2 else content)
    plain = values(read_file(source(path), READING))
    assert [value["quote"] for value in plain] == [
        row["quote"].lstrip(" ") if kind in ("csv", "tsv") else row["quote"] for row in ROWS
    ]
    found = read(path, rows)
    assert values(found) == plain
    assert len(SlicedData(Data(dataset=str(path)), None).slices(rows)) >= len(ROWS) // max(rows, 2) or rows == 1000


def test_slices_can_be_read_in_any_order(tmp_path: Path) -> None:
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(as_csv(ROWS)))
    parquet.write_table(pa.Table.from_pylist(ROWS), tmp_path / "b.parquet", row_group_size=13)
    (tmp_path / "c.jsonl").write_bytes(as_lines(ROWS))
    data = SlicedData(Data(dataset=str(tmp_path)), None)
    pieces = data.slices(5)
    expected = [values(data.read(piece)) for piece in pieces]
    assert sum(map(len, expected)) == 3 * len(ROWS)
    order = random.Random(1).sample(range(len(pieces)), len(pieces))
    assert [values(data.read(pieces[i])) for i in order] == [expected[i] for i in order]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
@pytest.mark.parametrize("head", ["", "\n\n", "sep=;\n"])
def test_a_table_is_divided_between_records(tmp_path: Path, encoding: str, head: str) -> None:
    rows = [row for row in ROWS if "\r" not in row["quote"]]
    text = as_csv(rows, delimiter=";").decode()
    (tmp_path / "a.csv").write_bytes((head + text).encode(encoding))
    for count in (1, 3, 100):
        assert values(read(tmp_path / "a.csv", count)) == values(read_file(source(tmp_path / "a.csv"), READING))


def test_a_row_that_cannot_be_read_keeps_its_place(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b'id,quote\n1,a\n2\n3,"b" c\n4,d,e\nid,quote\n5,\xff\n6,"open\n')
    expected = [{"id": "1", "quote": "a"}, *["not CSV"] * 4, {"id": "5", "quote": "\udcff"}, "not CSV"]
    for rows in (1, 2, 100):
        assert values(read(tmp_path / "a.csv", rows)) == expected


def test_a_large_array_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.json").write_text(json.dumps(ROWS, indent=1), encoding="utf-8")
    expected = values(read(tmp_path / "a.json", 10))
    for characters in (1, 7, 200):
        monkeypatch.setattr("job.dataset.readers.ARRAY_CHARACTERS", max(characters, 400))
        assert values(read(tmp_path / "a.json", 10)) == expected
    for broken in (json.dumps(ROWS)[:-1], json.dumps(ROWS)[:-40], json.dumps(ROWS).replace("}, {", "} {", 9), "[{}"):
        (tmp_path / "a.json").write_text(broken + " " * 900, encoding="utf-8")
        with pytest.raises(InvalidInputError, match="a.json is not JSON"):
            read(tmp_path / "a.json", 10)


def test_a_data_set_is_divided_too(tmp_path: Path, loopback_hub: Hub) -> None:
    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved"))
    assert values(read(tmp_path / "saved", 10)) == ROWS
    repo = loopback_hub.datasets["tiny/rows"] = Repo("tiny/rows")
    repo.commit("main", "data", {"rows.jsonl": as_lines(ROWS)})
    assert values(read("tiny/rows", 10)) == ROWS
    assert values(read("hf://datasets/tiny/rows/rows.jsonl", 10)) == ROWS


def test_columns_are_chosen(tmp_path: Path) -> None:
    rows = [{**row, "more": [1], "data": {"text": "t"}} for row in ROWS]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert set(read(tmp_path / "a.parquet", 10, ["id"])[0].values) == {"quote", "id"}
    assert set(read(tmp_path / "a.parquet", 10, [], text_column="data.text")[0].values) == {"data"}
    assert set(read(tmp_path / "a.parquet", 10)[0].values) == {"quote", "id", "more", "data"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n', "a.jsonl has no column 'quote'; it has 'text'. Set TAGGER_DATA_TEXT_COLUMN"),
        ("a.csv", b"text,id\na,1\n", "a.csv has no column 'quote'; it has 'text', 'id'. Set TAGGER_DATA_TEXT_COLUMN"),
        ("a.jsonl", b"plain\ntext\n", "a.jsonl in the lines from byte 0 on is not JSON, like all of the first 2 rows"),
        ("a.jsonl", b"", "a.jsonl has no rows; expected at least one text"),
        ("a.csv", b"quote\n", "a.csv has no rows; expected at least one text"),
        ("a.parquet", b"PAR1", "a.parquet is not Parquet"),
    ],
)
def test_what_cannot_be_tagged_is_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InvalidInputError) as refusal:
        read(tmp_path / name, 10)
    assert message in str(refusal.value)
    assert "TAGS" not in str(refusal.value)


def test_a_change_is_noticed_by_content(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(as_lines(ROWS))
    data = SlicedData(Data(dataset=str(path)), None)
    found = data.fingerprint()
    path.touch()
    assert data.difference(found) is None
    path.write_bytes(as_lines(ROWS).replace(b"two words", b"2wo words"))
    assert "a.jsonl are not what they were" in (data.difference(found) or "")
    path.write_bytes(as_lines(ROWS[1:]))
    assert "bytes and has" in (data.difference(found) or "")


def test_types_of_a_table_are_found_in_all_rows(tmp_path: Path) -> None:
    rows = [
        {"quote": "a", "n": 1, "x": 1, "big": 2**70, "flag": True, "mixed": 1, "list": ["a"]},
        {"x": 0.5, "mixed": "b"},
    ]
    rows.append({"late": None, "list": None, "record": {"a": 1}})
    (tmp_path / "a.jsonl").write_bytes(as_lines(rows))
    data = SlicedData(Data(dataset=str(tmp_path / "a.jsonl")), None)
    schema = data.schema(data.slices(1))
    assert dict(zip(schema.names, map(str, schema.types), strict=True)) == {
        "quote": "string",
        "n": "int64",
        "x": "double",
        "big": "string",
        "flag": "bool",
        "mixed": "string",
        "list": "list<item: string>",
        "late": "string",
        "record": "string",
    }
