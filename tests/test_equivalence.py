"""What is saved has to answer as what was trained, but for how numbers are rounded."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from job.decoding.config import DecodingConfig
from job.decoding.equivalence import same_answer

LIKELY = DecodingConfig("marginal", "closed", ("rain", "sea", "sun"), 0.05, 9)


def answer(*written: str, **tags: float) -> dict[str, Any]:
    return {"raw": str(list(written)), "tags": list(tags), "confidences": list(tags.values())}


@pytest.mark.parametrize(
    ("new", "same"),
    [
        (answer("rain", "sea", rain=0.301, sea=0.0501), True),
        (answer("rain", "sea", rain=0.301), True),
        (answer("rain", "sea", rain=0.4), False),
        (answer("rain", "sea", sea=0.0502), False),
        (answer("rain", "sea", rain=0.3, sea=0.0502, sun=0.3), False),
        (answer(), False),
    ],
)
def test_likely_tags_are_as_likely_as_they_were(new: dict[str, Any], same: bool) -> None:
    old = answer("rain", "sea", rain=0.3, sea=0.0502)
    assert same_answer(old, new, LIKELY) is same
    assert same_answer(new, old, LIKELY) is same


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        # in the first place both were as likely, and each gains where it was not taken
        (answer("rain", "sun", rain=0.3, sun=0.5), answer("sun", "rain", sun=0.302, rain=0.45), True),
        (answer("rain", "sun", rain=0.3, sun=0.5), answer("sun", "rain", sun=0.4, rain=0.45), False),
        (answer("rain", "sun", rain=0.3, sun=0.5), answer("sun", "rain", sun=0.302, rain=0.1), False),
        (answer("rain", "sun", rain=0.3, sun=0.1), answer("sun", "rain", sun=0.302, rain=0.45), False),
        (answer("rain", rain=0.12, sea=0.1), answer("sun", sun=0.125, love=0.9), False),
        # in the second
        (answer("rain", "sea", rain=0.3, sea=0.2, sun=0.22), answer("rain", "sun", rain=0.3, sun=0.2, sea=0.25), True),
        (answer("rain", "sea", rain=0.3, sea=0.2, sun=0.22), answer("rain", "sun", rain=0.4, sun=0.2, sea=0.25), False),
        (answer("rain", "sea", rain=0.3, sea=0.2), answer("rain", "sun", rain=0.3, sun=0.2, sea=0.25), False),
        (answer("rain", "sea", rain=0.3, sea=0.9), answer("rain", "sun", rain=0.3, sun=0.9), False),
        # one list was taken to be at its end
        (answer("rain", rain=0.3, sun=0.2), answer("rain", "sun", rain=0.3, sun=0.4), True),
        (answer("rain", rain=0.3, sun=0.2), answer("rain", "sun", rain=0.3, sun=0.1), False),
        (answer("rain", rain=0.3, sun=0.2), answer("rain", "sun", rain=0.4, sun=0.4), False),
        (answer("rain", rain=0.65, sea=0.6), answer("rain", "sun", rain=0.65, sun=0.2), False),
    ],
)
def test_a_list_may_be_followed_by_another_tag_that_is_as_likely(
    old: dict[str, Any], new: dict[str, Any], same: bool
) -> None:
    assert same_answer(old, new, LIKELY) is same
    assert same_answer(new, old, LIKELY) is same


def test_a_tag_may_be_one_too_many() -> None:
    old, new = answer("rain", rain=0.4, sea=0.301), answer("rain", rain=0.4, sun=0.302)
    assert same_answer(old, new, replace(LIKELY, max_tags=2))
    assert not same_answer(old, new, LIKELY)


def test_lists_are_the_same_to_the_letter() -> None:
    decoding = replace(LIKELY, decoding="greedy")
    assert same_answer(answer("rain", rain=0.3), answer("rain", rain=0.9), decoding)
    assert not same_answer(answer("rain", rain=0.3), answer("rain", "sea", rain=0.3), decoding)
