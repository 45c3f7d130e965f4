"""The summary of a data set shows what looks wrong before money is spent."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from job.dataset.summary import describe, summarise
from job.settings import Data
from job.types import DataReport, Example, SkippedRows, SplitData


def summary(tags: Sequence[Sequence[str]], report: DataReport | None = None) -> dict[str, object]:
    examples = tuple(Example(f"text {number}", tuple(of)) for number, of in enumerate(tags))
    found = SplitData(examples[1:], examples[:1], "f", report=report or DataReport(len(examples)))
    return summarise(found, Data())


@pytest.mark.parametrize(
    ("tag", "delimiter"), [("a|b", "|"), ("a; b", ";"), ("<a><b>", "><"), ("a\nb", "\\n"), ("a b", "\\s")]
)
def test_one_tag_a_text_with_a_delimiter_inside_is_a_warning(tag: str, delimiter: str) -> None:
    [warning, *_] = summary([[f"{tag}{n}"] for n in range(10)])["warnings"]  # type: ignore[misc]
    assert f"set TAGGER_DATA_TAG_DELIMITER='{delimiter}'" in warning
    assert "10 of 10" in warning


def test_tags_without_a_common_delimiter_are_no_warning() -> None:
    assert summary([[f"tag-{n}"] for n in range(10)])["warnings"] == []
    assert summary([["a b", "c"], *([f"x {n}", "y"] for n in range(9))])["warnings"] == []


def test_a_tag_on_nearly_all_texts_and_many_duplicates_are_warnings() -> None:
    found = summary([["all", f"tag{n}"] for n in range(20)], DataReport(23, near_duplicates=3))
    assert found["warnings"] == [
        "the tag 'all' is on 20 of 20 texts, so it says little",
        "13% of the examples are near-duplicates of held-out ones and are left out of training",
    ]


def test_the_lines_name_rows_reasons_and_tags() -> None:
    report = DataReport(14, (SkippedRows("no tags", 3, "a.csv line 7"),), 1, 2, (("Sea", "sea"),))
    lines = "\n".join(describe(summary([["sea", "rain"], ["sea"], *([f"t{n}"] for n in range(6))], report)))
    for expected in (
        "data: 14 rows read, 11 used; 7 examples to train on, 1 held out",
        "data: 3 rows left out with no tags, the first is a.csv line 7",
        "data: 1 rows repeat the text of an earlier row",
        "data: 2 examples left out as near-duplicates",
        "tags: 8 different, 1.12 a text (most 2), 88% on one text alone; most common: 'sea' 2",
        "'Sea' as 'sea'",
        "example: text 1 ->: ['sea']",
    ):
        assert expected in lines
