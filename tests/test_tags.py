"""Tags are parsed from every usual notation, and rare ones are dropped."""

from __future__ import annotations

import pytest

from job.dataset.tags import drop_rare_tags, parse_tags_value
from job.errors import InvalidInputError
from job.types import Example


@pytest.mark.parametrize(
    ("value", "tags"),
    [
        (["life", " love "], ("life", "love")),
        ("['life', \"don't\"]", ("life", "don't")),
        ('["life", "love"]', ("life", "love")),
        ("life, love,,life", ("life", "love")),
        ("[life, love]", ("life", "love")),
        (["life", None, ""], ("life",)),
        ([["nested"], {"name": "tag"}, "life"], ("life",)),
        ([1, 2], ("1", "2")),
        (r"['back\dash']", (r"back\dash",)),
        ("", ()),
        (None, ()),
        (float("nan"), ()),
        ([], ()),
    ],
)
def test_every_usual_notation_of_tags_is_parsed(value: object, tags: tuple[str, ...]) -> None:
    assert parse_tags_value(value) == tags


def test_rare_tags_are_dropped_unless_none_would_be_left() -> None:
    examples = [Example("a", ("often", "twice", "once")), Example("b", ("often", "twice")), Example("c", ("alone",))]
    examples.append(Example("d", ("often",)))
    results = [drop_rare_tags(examples, min_count) for min_count in (1, 2, 3)]
    assert results[0] == examples
    assert [example.tags for example in results[1]] == [("often", "twice"), ("often", "twice"), ("alone",), ("often",)]
    assert [example.tags for example in results[2]] == [("often",), ("often",), ("alone",), ("often",)]
    with pytest.raises(
        InvalidInputError, match="MIN_TAG_COUNT=4 makes every tag rare: the most frequent one is on 3 of 4"
    ):
        drop_rare_tags(examples, 4)


def test_spellings_of_one_tag_are_counted_together() -> None:
    examples = [Example("a", ("Science Fiction", "once")), Example("b", ("science-fiction", "love"))]
    assert [example.tags for example in drop_rare_tags(examples, 2)] == [
        ("Science Fiction",),
        ("science-fiction",),
    ]
