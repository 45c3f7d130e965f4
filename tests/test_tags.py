"""Tags are compared and written by one spelling, and rare ones are dropped."""

from __future__ import annotations

from collections import Counter

import pytest

from job.dataset.tags import common_spellings, drop_rare_tags, normalise_tag
from job.errors import InvalidInputError
from job.types import Example


def test_case_hyphens_and_unicode_form_do_not_make_another_tag() -> None:
    assert normalise_tag("Science Fiction") == normalise_tag("science-fiction") == normalise_tag("science_fiction")
    assert normalise_tag("cafe\u0301") == normalise_tag("caf\u00e9")
    assert normalise_tag("-") == "-"


def test_the_most_frequent_spelling_is_written() -> None:
    counts = Counter({"Sci-Fi": 2, "sci fi": 3, "SCI-FI": 1, "love": 1})
    assert common_spellings(counts) == {"Sci-Fi": "sci fi", "sci fi": "sci fi", "SCI-FI": "sci fi", "love": "love"}


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
