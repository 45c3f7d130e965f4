"""Texts of others cannot steer a terminal or a CI system."""

from __future__ import annotations

import pytest

from job.system.printable import printable, printable_line


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[2J\x1b]0;title\x07", r"\x1b[2J\x1b]0;title\x07"),
        ("\x9b31m, backspace \x08, delete \x7f", r"\x9b31m, backspace \x08, delete \x7f"),
        ("100%\rfailed", r"100%\rfailed"),
        ("\x1b[0Ksection_start:1:a\r\x1b[0Ka", r"\x1b[0Ksection_start:1:a\r\x1b[0Ka"),
        ("::error title=a::b", r"\x3a:error title=a::b"),
        ("a\n \t::add-mask::b", "a\n \t" r"\x3a:add-mask::b"),
        ("##[error]a", r"\x23#[error]a"),
        ("a ##vso[task.complete]b ##teamcity[c]", r"a \x23#vso[task.complete]b \x23#teamcity[c]"),
        ("a\u202eb\u2066c\u2028d", r"a\u202eb\u2066c\u2028d"),
        ("half a pair \ud83d", r"half a pair \ud83d"),
    ],
)
def test_what_steers_terminals_and_ci_is_written_as_escapes(text: str, shown: str) -> None:
    assert printable(text) == shown


@pytest.mark.parametrize(
    "text", ["“quotes” é 日本 😀 \u200d", "a\n\tb", "std::vector", "# a ## b [c] #tag", "12:30:: a"]
)
def test_other_texts_stay_as_they_are(text: str) -> None:
    assert printable(text) == text


def test_a_line_is_one_line() -> None:
    assert printable_line("a\r\n::error::b\nc") == r"a\n::error::b\nc"
