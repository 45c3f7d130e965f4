"""Texts to tag: which are accepted, and the messages about the others."""

from __future__ import annotations

from pathlib import Path

import pytest

from job.dataset.texts import check_texts, read_texts
from job.errors import InvalidInputError


def test_usable_texts_are_returned_in_order() -> None:
    assert check_texts(["b", " a "], "TEXT") == ("b", " a ")
    assert check_texts([], "TEXT") == ()


@pytest.mark.parametrize("text", ["", " \n", "half a pair \ud83d"])
def test_an_empty_or_broken_text_is_refused(text: str) -> None:
    with pytest.raises(InvalidInputError, match="a --text to tag is empty or is not valid Unicode"):
        check_texts(["a", text], "--text")


def test_json_lines_are_strings_or_objects_with_the_column() -> None:
    Path("texts.jsonl").write_text('\ufeff"a"\n\n{"quote": "b", "more": 1}\n', encoding="utf-8")
    assert read_texts(Path("texts.jsonl"), "quote") == ("a", "b")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'"a"\n{"text": "b"}\n', 'texts.jsonl line 2 has no text; expected {"quote": "a text"}'),
        (b'" "\n', "line 1 has no text"),
        (b"not JSON\n", "line 1 has no text"),
        (b'"\\ud83d"\n', "line 1 has no text"),
        (b"[" * 100_000, "line 1 has no text"),
        (b"\n", "texts.jsonl is empty; expected at least one text"),
        (b"\xff\xfe", "--input texts.jsonl cannot be read"),
    ],
)
def test_a_file_without_usable_texts_is_refused(content: bytes, message: str) -> None:
    Path("texts.jsonl").write_bytes(content)
    with pytest.raises(InvalidInputError) as refusal:
        read_texts(Path("texts.jsonl"), "quote")
    assert message in str(refusal.value)
