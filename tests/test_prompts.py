"""Prompts and answers have one form, and the separator stands in it once."""

from __future__ import annotations

import pytest

from job.dataset.prompts import prompt, strip_separator, target


@pytest.mark.parametrize("text", ["a song", " a song ", "a song ->:", "a song ->: "])
def test_a_prompt_ends_in_the_separator_once(text: str) -> None:
    assert strip_separator(text, " ->: ") == "a song"
    assert prompt(text, " ->: ") == "a song ->:"


@pytest.mark.parametrize(("separator", "white_space"), [(" ->: ", " "), ("\n### Tags:\n", "\n"), (" =>", "")])
def test_white_space_after_the_separator_starts_the_answer(separator: str, white_space: str) -> None:
    assert target(["life", "don't"], separator) == white_space + """['life', "don't"]"""
    assert prompt("a song", separator) + target(["life"], separator) == f"a song{separator}['life']"
