"""Usable rows become examples, and unusable ones are skipped and counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from job import data
from job.errors import InvalidInputError
from job.settings import Data, Sample

ROWS: list[dict[str, Any]] = [
    {"quote": f"{word} is a thing of its own, said number {i}", "tags": [word, "thing"]}
    for i, word in enumerate(["rain", "bread", "iron", "winter", "salt", "paper", "honey", "thunder", "glass", "wool"])
]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def load(path: Path, **settings: Any) -> Any:
    return data.load(Data.model_validate({"dataset": str(path), "eval_size": 2, **settings}))


def test_rows_without_text_or_tags_are_skipped_and_counted(tmp_path: Path) -> None:
    bad = [
        {"quote": "", "tags": ["x"]},
        {"quote": "no tags", "tags": []},
        {"quote": None, "tags": ["x"]},
        {"quote": "y"},
    ]
    examples = load(write_jsonl(tmp_path / "a.jsonl", ROWS + bad))
    assert examples.skipped == 4
    assert len(examples.train) + len(examples.held_out) == len(ROWS)
    with pytest.raises(InvalidInputError, match=r"4 of 7 rows have no usable text"):
        load(write_jsonl(tmp_path / "b.jsonl", ROWS[:3] + bad), eval_size=1)


def test_limit_takes_the_first_usable_rows(tmp_path: Path) -> None:
    examples = load(write_jsonl(tmp_path / "a.jsonl", [{"quote": "", "tags": ["x"]}, *ROWS]), limit=5)
    assert sorted(e.text for e in examples.train + examples.held_out) == sorted(row["quote"] for row in ROWS[:5])


def test_a_row_with_half_a_surrogate_pair_is_skipped(tmp_path: Path) -> None:
    lines = "".join(json.dumps(row) + "\n" for row in ROWS) + '{"quote": "half \\ud800", "tags": ["x"]}\n'
    (tmp_path / "a.jsonl").write_text(lines)
    assert load(tmp_path / "a.jsonl").skipped == 1


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
