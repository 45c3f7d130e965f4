"""Usable rows become examples, and unusable ones are skipped and counted."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import datasets
import pandas
import pytest

from job import data
from job.errors import InvalidInputError
from job.settings import Data, Sample
from job.types import Example

ROWS: list[dict[str, Any]] = [
    {"quote": f"{word} is a thing of its own, said number {i}", "tags": [word, "thing"]}
    for i, word in enumerate(["rain", "bread", "iron", "winter", "salt", "paper", "honey", "thunder", "glass", "wool"])
]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def load(path: Path, **settings: Any) -> Any:
    return data.load(Data.model_validate({"dataset": str(path), "eval_size": 2, **settings}))


def test_skipped_rows_are_counted_by_reason_with_the_first(tmp_path: Path) -> None:
    bad = [
        {"quote": "", "tags": ["x"]},
        {"quote": "no tags", "tags": []},
        {"quote": None, "tags": ["x"]},
        {"quote": "y"},
    ]
    path = write_jsonl(tmp_path / "a.jsonl", ROWS + bad)
    examples = load(path, max_skipped=0.3)
    assert [(entry.reason, entry.rows, entry.first) for entry in examples.report.skipped] == [
        ("no text", 2, f"{path} line 11"),
        ("no tags", 2, f"{path} line 12"),
    ]
    assert examples.report.rows == 14
    assert len(examples.train) + len(examples.held_out) == len(ROWS)
    with pytest.raises(InvalidInputError, match=r"4 of 14 rows of .* 2 with no text, first .* line 11; 2 with no tags"):
        load(path)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"quote": 5, "tags": ["x"]}, "line 11: 'quote' is a number, '5'; expected a text"),
        ({"quote": ["a"], "tags": ["x"]}, "line 11: 'quote' is a list"),
        ({"quote": "a", "tags": {"choices": ["x"]}}, "line 11: 'tags' is a record with the fields choices"),
        ({"quote": "a", "tags": "['x' 'y' ... 'z']"}, "line 11: 'tags' was shortened with ..."),
    ],
)
def test_a_cell_of_a_wrong_kind_is_refused_with_its_place(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=re.escape(message)):
        load(write_jsonl(tmp_path / "a.jsonl", [*ROWS, row]), max_skipped=1)


def test_rows_of_equal_text_are_one_example_with_all_tags(tmp_path: Path) -> None:
    rows = [{"quote": row["quote"], "tags": tag} for row in ROWS for tag in row["tags"]]
    examples = load(write_jsonl(tmp_path / "a.jsonl", rows))
    assert examples.report.merged == len(ROWS)
    assert sorted((e.text, e.tags) for e in examples.train + examples.held_out) == sorted(
        (row["quote"], tuple(row["tags"])) for row in ROWS
    )


def test_spellings_of_one_tag_are_written_alike(tmp_path: Path) -> None:
    rows = [*ROWS, {"quote": "another thing", "tags": ["Thing", "THING", "rain"]}]
    examples = load(write_jsonl(tmp_path / "a.jsonl", rows))
    assert {tag for e in examples.train + examples.held_out for tag in e.tags if tag.lower() == "thing"} == {"thing"}
    assert dict(examples.report.respelled) == {"Thing": "thing", "THING": "thing"}


def test_several_columns_records_and_one_hot_columns_are_read(tmp_path: Path) -> None:
    rows = [
        {
            "title": f"t{i}",
            "data": {"text": f"the text {i}"},
            "tags": [{"name": "a"}, {"name": f"b{i}"}],
            "x": i % 2,
            "y": "1",
        }
        for i in range(6)
    ]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    named = load(path, text_column="title,data.text", tags_column="tags.name")
    assert Example("t1\nthe text 1", ("a", "b1")) in named.train + named.held_out
    one_hot = load(path, text_column="title", tag_columns=("x", "y"))
    assert {e.text: e.tags for e in one_hot.train + one_hot.held_out} == {
        f"t{i}": ("x", "y") if i % 2 else ("y",) for i in range(6)
    }


def test_a_record_without_the_field_is_refused_and_text_records_are_read(tmp_path: Path) -> None:
    rows = [{"quote": f"the text {i}", "tags": json.dumps([{"id": i, "name": f"tag {i}"}])} for i in range(4)]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    examples = load(path, tags_column="tags.name")
    assert Example("the text 1", ("tag 1",)) in examples.train + examples.held_out
    with pytest.raises(
        InvalidInputError, match="line 1: 'tags.nam' has a record without the field 'nam'; it has id, name"
    ):
        load(path, tags_column="tags.nam")


@pytest.mark.parametrize("writer", ["pandas", "datasets"])
def test_lists_that_pandas_and_datasets_write_to_csv_come_back(tmp_path: Path, writer: str) -> None:
    rng = random.Random(writer)
    words = ["rain", "it's", 'a "quote"', "deep learning", "c++", "café", "a, b", "[draft]", "x|y;z"]
    rows = [{"quote": f"the text {i}", "tags": rng.sample(words, rng.randint(1, 4))} for i in range(60)]
    path = tmp_path / "a.csv"
    if writer == "pandas":
        pandas.DataFrame(rows).to_csv(path, index=False)
    else:
        datasets.Dataset.from_list(rows).to_csv(str(path))
    examples = load(path)
    assert sorted((e.text, e.tags) for e in examples.train + examples.held_out) == sorted(
        (row["quote"], tuple(row["tags"])) for row in rows
    )


def test_evaluation_data_of_its_own_is_held_out(tmp_path: Path) -> None:
    own = write_jsonl(tmp_path / "own.jsonl", [ROWS[0], {"quote": "something else", "tags": ["new"]}])
    examples = load(write_jsonl(tmp_path / "a.jsonl", ROWS), eval_dataset=str(own))
    assert [e.text for e in examples.held_out] == [ROWS[0]["quote"], "something else"]
    assert [e.text for e in examples.train] == [row["quote"] for row in ROWS[1:]]
    assert examples.report.near_duplicates == 1
    other = write_jsonl(tmp_path / "other.jsonl", [{"text": "a", "labels": ["x"]}] * 9)
    with pytest.raises(InvalidInputError, match="other.jsonl has no columns 'quote' and 'tags'"):
        load(tmp_path / "a.jsonl", eval_dataset=str(other))
    empty = write_jsonl(tmp_path / "empty.jsonl", [{"quote": "a", "tags": []}, {"quote": "b", "tags": ["x"]}])
    with pytest.raises(InvalidInputError, match="1 of 2 rows of .*empty.jsonl cannot be used"):
        load(tmp_path / "a.jsonl", eval_dataset=str(empty))
    with pytest.raises(InvalidInputError, match="TAGGER_DATA_EVAL_SPLIT=dev: files have none"):
        load(tmp_path / "a.jsonl", eval_split="dev")
    with pytest.raises(InvalidInputError, match="TAGGER_DATA_EVAL_DATASET=.*absent.csv does not exist"):
        load(tmp_path / "a.jsonl", eval_dataset=str(tmp_path / "absent.csv"))


def test_limit_takes_the_first_usable_rows(tmp_path: Path) -> None:
    examples = load(write_jsonl(tmp_path / "a.jsonl", [{"quote": "", "tags": ["x"]}, *ROWS]), limit=5, max_skipped=0.2)
    assert sorted(e.text for e in examples.train + examples.held_out) == sorted(row["quote"] for row in ROWS[:5])


def test_a_row_with_half_a_surrogate_pair_is_skipped(tmp_path: Path) -> None:
    lines = "".join(json.dumps(row) + "\n" for row in ROWS) + '{"quote": "half \\ud800", "tags": ["x"]}\n'
    (tmp_path / "a.jsonl").write_text(lines)
    [skipped] = load(tmp_path / "a.jsonl", max_skipped=0.1).report.skipped
    assert (skipped.reason, skipped.rows) == ("text that is not valid Unicode", 1)


def test_the_input_file_adds_one_text_per_line(tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("second\n\nthird\n", encoding="utf-8")
    assert data.inference_texts(Sample(prompts=("first",), input=tmp_path / "texts.txt")) == [
        "first",
        "second",
        "third",
    ]
    with pytest.raises(InvalidInputError, match="absent.txt cannot be read"):
        data.inference_texts(Sample(input=tmp_path / "absent.txt"))


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_an_empty_file_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(InvalidInputError, match=f"{name} has no rows"):
        load(tmp_path / name)
