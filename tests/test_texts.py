"""Texts to tag: which are accepted, and the messages about the others."""

from __future__ import annotations

import pytest

from job.dataset.texts import check_texts
from job.errors import InvalidInputError


def test_usable_texts_are_returned_in_order() -> None:
    assert check_texts(["b", " a "], "TEXT") == ("b", " a ")
    assert check_texts([], "TEXT") == ()


@pytest.mark.parametrize("text", ["", " \n", "half a pair \ud83d"])
def test_an_empty_or_broken_text_is_refused(text: str) -> None:
    with pytest.raises(InvalidInputError, match="a --text to tag is empty or is not valid Unicode"):
        check_texts(["a", text], "--text")
