"""Rows are read from JSON lines, CSV, Parquet and packages, and unusable files are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from job.dataset.readers import read_rows
from job.errors import InvalidInputError
from job.settings import Data


def load(path: Path | str) -> list[dict[str, Any]]:
    return list(read_rows(Data(dataset=str(path))))


def test_jsonl_csv_and_parquet_give_the_same_rows(tmp_path: Path) -> None:
    rows = [{"quote": "rain, and more rain", "tags": "['rain']"}, {"quote": "“bread”", "tags": "food, home"}]
    (tmp_path / "a.jsonl").write_text("\n\n".join(map(json.dumps, rows)), encoding="utf-8")
    lines = ["quote,tags", *(f'"{row["quote"]}","{row["tags"]}"' for row in rows)]
    (tmp_path / "a.csv").write_text("\n".join(lines), encoding="utf-8-sig")
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.csv", "a.parquet"):
        assert load(tmp_path / name) == rows, name


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"quote": "x", "tags": ["y"]}\n{"quote": \n', "line 2 is not JSON"),
        ("a.jsonl", b"[1]\n", "line 1 is a JSON list"),
        ("a.jsonl", b"\xff\xfe\x00", "not UTF-8"),
        (
            "a.jsonl",
            b'{"text": "x", "tags": ["y"]}\n',
            "no column 'quote'; it has text, tags. Set TAGGER_DATA_TEXT_COLUMN",
        ),
        ("a.csv", b"quote,labels\nx,y\n", "no column 'tags'; it has quote, labels. Set TAGGER_DATA_TAGS_COLUMN"),
        ("a.parquet", b"PAR", "not a Parquet file"),
        ("a.txt", b"x", "not a data file"),
        ("a.csv", b"quote,tags\na text, with a comma,tag\n", "line 2 has 3 fields and the first line has 2"),
        ("a.csv", b"quote,tags,tags\nx,y,z\n", "two columns of the same name: quote, tags, tags"),
        ("a.jsonl", b'{"quote": "x", "tags": [' + b"9" * 5000 + b"]}\n", "line 1 is not JSON"),
    ],
)
def test_an_unusable_file_is_refused_and_the_reason_named(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InvalidInputError) as refusal:
        load(tmp_path / name)
    assert message in str(refusal.value)
    assert name in str(refusal.value)


def test_a_list_of_tags_is_read_from_parquet(tmp_path: Path) -> None:
    parquet.write_table(pyarrow.Table.from_pylist([{"quote": "x", "tags": ["a", "b"]}]), tmp_path / "a.parquet")
    assert load(tmp_path / "a.parquet") == [{"quote": "x", "tags": ["a", "b"]}]


@pytest.mark.parametrize(
    "name", ["quotes.jsonl", "./quotes", "package:job/quotes.jsonl", "package:no_such_package/quotes.jsonl"]
)
def test_a_missing_file_is_refused(name: str) -> None:
    with pytest.raises(InvalidInputError, match="quotes"):
        load(name)


def test_a_package_is_not_imported_to_read_its_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "breaks").mkdir()
    (tmp_path / "breaks" / "__init__.py").write_text("raise RuntimeError('imported')")
    (tmp_path / "breaks" / "file.csv").write_text("quote,tags\nx,y\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert load("package:breaks/file.csv") == [{"quote": "x", "tags": "y"}]
