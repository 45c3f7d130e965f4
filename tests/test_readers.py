"""Files are read right, whatever wrote them, or refused with file, row and reason."""

import csv
import gzip
import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
from pyarrow import parquet

from job.dataset.rows import read_rows
from job.errors import InvalidInputError
from job.settings import Data

ROWS = [{"quote": f"text {i}, with a comma; and more", "tags": f"a{i},b"} for i in range(60)]


def values(path: Path | str, **knobs: Any) -> list[dict[str, Any]]:
    return [dict(row.values) for row in read_rows(Data(dataset=str(path), **knobs))]


def refused(path: Path | str, **knobs: Any) -> str:
    with pytest.raises(InvalidInputError) as refusal:
        values(path, **knobs)
    return str(refusal.value)


def as_csv(rows: list[dict[str, Any]], **dialect: Any) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), **dialect)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def as_json_lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def zstd(content: bytes) -> bytes:
    return bytes(pa.Codec("zstd").compress(content, asbytes=True))


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.json"])
@pytest.mark.parametrize("write", [as_json_lines, json.dumps], ids=["lines", "array"])
def test_json_is_told_by_its_content(tmp_path: Path, name: str, write: Callable[[Any], str]) -> None:
    (tmp_path / name).write_text(write(ROWS))
    assert values(tmp_path / name) == ROWS


@pytest.mark.parametrize("suffix", ["gz", "zst"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_compressed_files_are_read(tmp_path: Path, name: str, suffix: str) -> None:
    content = (as_csv(ROWS) if name == "a.csv" else as_json_lines(ROWS)).encode()
    (tmp_path / f"{name}.{suffix}").write_bytes(gzip.compress(content) if suffix == "gz" else zstd(content))
    assert values(tmp_path / f"{name}.{suffix}") == ROWS


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_any_table_comes_back_the_same(tmp_path: Path, encoding: str, delimiter: str, line_end: str) -> None:
    rng = random.Random(f"{encoding}{delimiter}{line_end}")

    def noise(length: int) -> str:
        return "".join(rng.choices("ab \"',;|\té\n中", k=length))

    rows = [{"id": str(i), "quote": f"q{noise(12)}q", "tags": f"t{noise(5)}t"} for i in range(80)]
    content = as_csv(rows, delimiter=delimiter, lineterminator=line_end).encode(encoding)
    mark = {"utf-16-le": b"\xff\xfe", "utf-16-be": b"\xfe\xff"}.get(encoding, b"")
    (tmp_path / "a.csv").write_bytes(mark + content)
    assert values(tmp_path / "a.csv") == [{"quote": row["quote"], "tags": row["tags"]} for row in rows]


@pytest.mark.parametrize(
    "text",
    [
        "sep=;\nquote;tags\nq;a,b\n",
        "quote;tags\nq;a,b\n",
        'quote, tags\nq, "a,b"\n',
        'quote,tags,,\nq,"a,b",,\n',
        'quote,tags,,\nq,"a,b"\n',
        'x,quote,x,tags\n1,q,2,"a,b"\n',
        'quote,tags\n\nq,"a,b"\n\n',
        'quote,tags\r\nq,"a,b"\r\n',
        '\n\nquote,tags\nq,"a,b"\n',
    ],
)
def test_tables_as_spreadsheets_write_them_are_read(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.csv").write_text(text, newline="")
    assert values(tmp_path / "a.csv") == [{"quote": "q", "tags": "a,b"}]


def test_a_tsv_is_cut_at_tabs(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("quote\ttags\na, b; c\tx,y\n")
    assert values(tmp_path / "a.tsv") == [{"quote": "a, b; c", "tags": "x,y"}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "# exported\nquote,tags\nq,a\n", "begins with a comment ('# exported')"),
        ("a.csv", "quote,tags\nq,a,b\n", "line 2 has 3 fields and the header 2"),
        ("a.csv", "quote,tags\nq\n", "line 2 has 1 fields and the header 2"),
        ("a.csv", "quote,tags,tags\nq,a,b\n", "has 2 columns named 'tags'"),
        ("a.csv", 'quote,tags\n"q,a\n', "is not CSV"),
        ("a.csv", "text,label\nq,a\n", "has no columns 'quote' and 'tags'; it has 'text', 'label'"),
        ("a.csv", "Quote,tags\nq,a\n", "'quote' may be 'Quote': names must match exactly"),
        ("a.jsonl", '{"quote": "q"}\n{broken\n', "line 2 is not JSON"),
        ("a.jsonl", '{"quote": "q"}\n["x"]\n', "line 2 is a JSON array; expected an object"),
        ("a.json", "[1, 2]", "row 1 is a JSON number; expected an object"),
        ("a.jsonl", b"\xff\xfe\xfa", "is not UTF-8 text"),
        ("a.csv", b"quote,tags\ncaf\xe9,a\n", "is not UTF-8 text"),
        ("a.parquet", b"PAR1 and nothing else", "is not Parquet"),
        ("a.jsonl.gz", b"not compressed", "cannot be read"),
        ("a.jsonl", "version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "is a pointer of Git LFS"),
        ("a.xlsx", b"PK", "is not a data file; expected one that ends in"),
        ("a.csv", b"PK\x03\x04and more", "is a ZIP or Excel file by its content"),
        ("a.csv", gzip.compress(b"quote,tags\nq,a\n", mtime=0), "is a gzip file by its content"),
        ("a.csv", "quote,tags\nq,a\nquote,tags\nr,b\n", "line 3 repeats the header"),
        ("a.csv", "quote,tags\nq,a\n".encode("utf-16-le"), "UTF-16 or UTF-32 text without the mark"),
        ("a.jsonl", json.dumps(ROWS[0]).encode("utf-32"), "UTF-16 or UTF-32 text without the mark"),
    ],
)
def test_a_damaged_or_foreign_file_is_named_with_the_reason(
    tmp_path: Path, name: str, content: str | bytes, message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert message in refused(path)
    assert "network" not in refused(path)


def test_of_parquet_only_the_used_columns_count(tmp_path: Path) -> None:
    table = pa.table(
        [pa.array(["q"]), pa.array([["a", "b"]]), pa.array([1]), pa.array([2])], names=["quote", "tags", "x", "x"]
    )
    parquet.write_table(table, tmp_path / "a.parquet")
    assert values(tmp_path / "a.parquet") == [{"quote": "q", "tags": ["a", "b"]}]
    parquet.write_table(table.rename_columns(["quote", "tags", "tags", "x"]), tmp_path / "b.parquet")
    assert "has several columns named 'tags'" in refused(tmp_path / "b.parquet")


def labelled() -> datasets.Dataset:
    features = datasets.Features(
        {"quote": datasets.Value("string"), "tags": datasets.List(datasets.ClassLabel(names=["life", "love"]))}
    )
    return datasets.Dataset.from_dict({"quote": ["a", "b"], "tags": [[0, 1], [1]]}, features=features)


NAMED = [{"quote": "a", "tags": ["life", "love"]}, {"quote": "b", "tags": ["love"]}]


def test_class_labels_of_parquet_get_their_names(tmp_path: Path) -> None:
    labelled().to_parquet(str(tmp_path / "a.parquet"))
    assert values(tmp_path / "a.parquet") == NAMED


def test_class_labels_in_records_get_their_names_and_unknown_ids_are_refused(tmp_path: Path) -> None:
    label = datasets.ClassLabel(names=["life", "love"])
    features = datasets.Features({"quote": datasets.Value("string"), "m": {"tags": datasets.List({"l": label})}})
    records = [{"tags": [{"l": 1}, {"l": 0}]}]
    datasets.Dataset.from_dict({"quote": ["a"], "m": records}, features=features).to_parquet(
        str(tmp_path / "a.parquet")
    )
    [row] = read_rows(Data(dataset=str(tmp_path / "a.parquet"), tags_column="m.tags.l"))
    assert row.values["m"] == {"tags": [{"l": "love"}, {"l": "life"}]}
    table = parquet.read_table(tmp_path / "a.parquet")
    wrong = pa.table({"quote": ["a"], "m": [{"tags": [{"l": 7}]}]}).replace_schema_metadata(table.schema.metadata)
    parquet.write_table(wrong, tmp_path / "b.parquet")
    assert "has the label id 7, and there are names for 0 to 1" in refused(
        tmp_path / "b.parquet", tags_column="m.tags.l"
    )


def test_compressed_parquet_is_read(tmp_path: Path) -> None:
    table = pa.BufferOutputStream()
    parquet.write_table(pa.Table.from_pylist(ROWS), table)
    (tmp_path / "a.parquet.gz").write_bytes(gzip.compress(table.getvalue().to_pybytes()))
    assert values(tmp_path / "a.parquet.gz") == ROWS


def test_what_save_to_disk_wrote_is_read(tmp_path: Path) -> None:
    labelled().save_to_disk(str(tmp_path / "one"))
    assert values(tmp_path / "one") == NAMED
    datasets.DatasetDict(train=labelled(), test=labelled().select([1])).save_to_disk(str(tmp_path / "splits"))
    assert values(tmp_path / "splits") == NAMED
    assert values(tmp_path / "splits", split="test") == NAMED[1:]
    assert "has no split 'dev'; it has 'train', 'test'" in refused(tmp_path / "splits", split="dev")


def test_a_folder_a_glob_and_several_files_are_read_in_order(tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_text(as_json_lines(ROWS[:1]))
    (tmp_path / "a.csv").write_text(as_csv(ROWS[1:2]))
    (tmp_path / "notes.txt").write_text("not data")
    assert values(tmp_path) == [ROWS[1], ROWS[0]]
    assert values(f"{tmp_path}/*.jsonl") == ROWS[:1]
    assert values(f"{tmp_path}/b.jsonl,{tmp_path}/a.csv") == ROWS[:2]
    assert "matches no file" in refused(f"{tmp_path}/*.parquet")
    (tmp_path / "empty").mkdir()
    assert "holds no data file" in refused(tmp_path / "empty")


def test_linked_folders_are_read_once_and_hidden_files_not(tmp_path: Path) -> None:
    data, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    for folder, name, row in ((data, "a.jsonl", 0), (elsewhere, "b.jsonl", 1), (data / ".cache", "c.jsonl", 2)):
        folder.mkdir(parents=True)
        (folder / name).write_text(as_json_lines([ROWS[row]]))
    (data / "_d.jsonl").write_text(as_json_lines([ROWS[3]]))
    (data / "linked").symlink_to(elsewhere)
    (data / "loop").symlink_to(data)
    assert values(data) == [ROWS[0], ROWS[1]]


@pytest.mark.parametrize("knobs", [{"split": "train"}, {"config": "en"}, {"revision": "main"}])
def test_settings_that_a_file_cannot_have_are_refused(tmp_path: Path, knobs: dict[str, str]) -> None:
    (tmp_path / "a.jsonl").write_text(as_json_lines(ROWS))
    [(name, value)] = knobs.items()
    assert f"TAGGER_DATA_{name.upper()}={value}: files have none" in refused(tmp_path / "a.jsonl", **knobs)


def test_only_the_rows_that_are_asked_for_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(as_json_lines(ROWS) + "{broken\n")
    rows = read_rows(Data(dataset=str(tmp_path / "a.jsonl")))
    assert [dict(next(rows).values) for _ in ROWS] == ROWS


@pytest.mark.parametrize(
    "name", ["quotes.jsonl", "./quotes", "package:job/quotes.jsonl", "package:no_such_package/quotes.jsonl"]
)
def test_a_missing_file_is_refused(name: str) -> None:
    assert "quotes" in refused(name)


def test_a_package_is_not_imported_to_read_its_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "breaks").mkdir()
    (tmp_path / "breaks" / "__init__.py").write_text("raise RuntimeError('imported')")
    (tmp_path / "breaks" / "file.csv").write_text("quote,tags\nx,y\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert values("package:breaks/file.csv") == [{"quote": "x", "tags": "y"}]
