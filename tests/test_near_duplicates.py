"""Near-duplicates are found, and different texts are not taken for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from job.dataset.near_duplicates import near_duplicate_groups


def copies_of_a_long_text(number: int) -> list[str]:
    beginning = "the harbour master counted every lantern twice before he allowed himself to believe the boats were"
    return [f"{beginning} {word}" for word in [*map(str, range(number - 2)), "home", "late"]]


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.upper() + "!",
        lambda text: text.replace(",", " ,").replace(".", " ..."),
        lambda text: f"{text} And so it goes.",
        lambda text: " ".join(["Well,", *text.split()[1:]]),
    ],
    ids=["case", "punctuation", "appended", "first word"],
)
def test_a_slightly_changed_text_is_a_near_duplicate(rows: list[dict[str, Any]], change: Callable[[str], str]) -> None:
    texts = [str(row["quote"]) for row in rows[:150] if len(str(row["quote"])) > 40]
    groups = near_duplicate_groups([*texts, *map(change, texts)])
    for i, text in enumerate(texts):
        assert groups[i] == groups[len(texts) + i], text


@pytest.mark.parametrize("copies", [3, 12, 60])
def test_many_copies_of_a_long_text_are_one_group(rows: list[dict[str, Any]], copies: int) -> None:
    groups = near_duplicate_groups([*copies_of_a_long_text(copies), *(row["quote"] for row in rows[: 4 * copies])])
    assert len(set(groups[:copies])) == 1
    assert len(set(groups)) == 1 + len(groups) - copies


def test_different_texts_are_not_near_duplicates(rows: list[dict[str, Any]]) -> None:
    groups = near_duplicate_groups([row["quote"] for row in rows])
    assert len(set(groups)) == len(rows)
