"""Whether what was saved answers as what was trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from job.dataset.tags import parse_list
from job.decoding.config import DecodingConfig
from job.types import MIN_PROBABILITY

CONFIDENCE_TOLERANCE = 0.01
"""Of a confidence, on another device or in another precision."""


def same_answer(old: Mapping[str, Any], new: Mapping[str, Any], decoding: DecodingConfig) -> bool:
    """Whether two answers, with the fields of types.Tagged, may be those of one adapter.

    Lists have to be the same to the letter. Likely tags may differ by what other hardware rounds otherwise.
    A tag that only one side has may have been at the threshold, or among the least likely of as many as an
    answer holds. Where two tags were as likely to go on with, either may be followed, and later places are those of
    another list: then the tags before are as likely on both sides, and in later places the two can only have gained.
    """
    if decoding.decoding == "greedy":
        return bool(old["raw"] == new["raw"])
    was, now = (dict(zip(answer["tags"], answer["confidences"], strict=True)) for answer in (old, new))
    written, again = (parse_list(answer["raw"]) or [] for answer in (old, new))

    def confidence(found: dict[str, float], tag: str) -> float:
        full = len(found) == decoding.max_tags
        return found.get(tag, min(found.values()) if full else max(decoding.threshold, MIN_PROBABILITY))

    def gained(tag: str, before: dict[str, float], after: dict[str, float]) -> bool:
        return confidence(after, tag) >= confidence(before, tag) - CONFIDENCE_TOLERANCE

    def equal(tag: str) -> bool:
        return gained(tag, was, now) and gained(tag, now, was)

    both = list(zip(written, again, strict=False))
    part = next((n for n, (one, other) in enumerate(both) if one != other), None)
    if part is not None:
        one, other = both[part]
        first = part > 0 or abs(confidence(was, one) - confidence(now, other)) <= CONFIDENCE_TOLERANCE
        return first and all(map(equal, written[:part])) and gained(one, was, now) and gained(other, now, was)
    if len(written) == len(again) or not both:
        return all(map(equal, was | now))
    shorter, longer = (was, now) if len(written) < len(again) else (now, was)
    return all(map(equal, written[: len(both)])) and all(gained(tag, shorter, longer) for tag in shorter)
