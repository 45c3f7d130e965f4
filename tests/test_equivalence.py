"""A reloaded adapter answers like the trained model, apart from rounding."""

from __future__ import annotations

from typing import Any

import pytest

from job.decoding.config import DEFAULT_CONFIG
from job.decoding.equivalence import same_answer

MARGINAL = DEFAULT_CONFIG.model_copy(
    update={
        "decoding": "marginal",
        "vocabulary": "closed",
        "tags": ("rain", "sea", "sun"),
        "threshold": 0.05,
        "max_tags": 9,
        "max_positions": 1,
    }
)


def answer(*greedy_tags: str, **tags: float) -> dict[str, Any]:
    return {"raw": str(list(greedy_tags)), "tags": list(tags), "confidences": list(tags.values())}


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
def test_confidences_may_differ_by_rounding_only(new: dict[str, Any], same: bool) -> None:
    old = answer("rain", "sea", rain=0.3, sea=0.0502)
    assert same_answer(old, new, MARGINAL) is same
    assert same_answer(new, old, MARGINAL) is same


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        # equally likely in the first position; each gains in the answer whose list it does not extend
        (answer("rain", "sun", rain=0.3, sun=0.5), answer("sun", "rain", sun=0.302, rain=0.45), True),
        (answer("rain", "sun", rain=0.3, sun=0.5), answer("sun", "rain", sun=0.4, rain=0.45), False),
        (answer("rain", "sun", rain=0.3, sun=0.5), answer("sun", "rain", sun=0.302, rain=0.1), False),
        (answer("rain", "sun", rain=0.3, sun=0.1), answer("sun", "rain", sun=0.302, rain=0.45), False),
        (answer("rain", rain=0.12, sea=0.1), answer("sun", sun=0.125, love=0.9), False),
        # equally likely in the second position
        (answer("rain", "sea", rain=0.3, sea=0.2, sun=0.22), answer("rain", "sun", rain=0.3, sun=0.2, sea=0.25), True),
        (answer("rain", "sea", rain=0.3, sea=0.2, sun=0.22), answer("rain", "sun", rain=0.4, sun=0.2, sea=0.25), False),
        (answer("rain", "sea", rain=0.3, sea=0.2), answer("rain", "sun", rain=0.3, sun=0.2, sea=0.25), False),
        (answer("rain", "sea", rain=0.3, sea=0.9), answer("rain", "sun", rain=0.3, sun=0.9), False),
        # one list stops, the other continues
        (answer("rain", rain=0.3, sun=0.2), answer("rain", "sun", rain=0.3, sun=0.4), True),
        (answer("rain", rain=0.3, sun=0.2), answer("rain", "sun", rain=0.3, sun=0.1), False),
        (answer("rain", rain=0.3, sun=0.2), answer("rain", "sun", rain=0.4, sun=0.4), False),
        (answer("rain", rain=0.65, sea=0.6), answer("rain", "sun", rain=0.65, sun=0.2), False),
    ],
)
def test_an_equally_likely_tag_may_extend_the_list(old: dict[str, Any], new: dict[str, Any], same: bool) -> None:
    assert same_answer(old, new, MARGINAL) is same
    assert same_answer(new, old, MARGINAL) is same


def test_a_full_answer_may_omit_its_least_likely_tag() -> None:
    old, new = answer("rain", rain=0.4, sea=0.301), answer("rain", rain=0.4, sun=0.302)
    assert same_answer(old, new, MARGINAL.model_copy(update={"max_tags": 2}))
    assert not same_answer(old, new, MARGINAL)


def test_greedy_answers_are_identical_texts() -> None:
    decoding = MARGINAL.model_copy(update={"decoding": "greedy"})
    assert same_answer(answer("rain", rain=0.3), answer("rain", rain=0.9), decoding)
    assert not same_answer(answer("rain", rain=0.3), answer("rain", "sea", rain=0.3), decoding)
