"""Check that a reloaded or merged adapter answers like the model that was trained."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from job.dataset.tags import parse_list
from job.decoding.config import DecodingConfig
from job.types import MIN_PROBABILITY

CONFIDENCE_TOLERANCE = 0.01
"""Largest difference between two confidences that another device or precision explains."""
BLEND_TOLERANCE = 0.05
"""The same for blends, where the differences of several confidences add up, each with its weight."""


def same_answer(old: Mapping[str, Any], new: Mapping[str, Any], decoding: DecodingConfig) -> bool:
    """Return whether two answers, with the fields of types.TaggedText, can come from one adapter."""
    return same_list(old, new) if decoding.decoding == "greedy" else compatible_marginals(old, new, decoding)


def same_list(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Return whether greedy decoding wrote the same text both times."""
    return bool(old["raw"] == new["raw"])


def compatible_marginals(old: Mapping[str, Any], new: Mapping[str, Any], decoding: DecodingConfig) -> bool:
    """Return whether two answers with probabilities of all tags differ only as far as other hardware explains.

    Confidences may differ by CONFIDENCE_TOLERANCE, those of blends by BLEND_TOLERANCE. A tag that is in one answer only
    may have been at the threshold, or among the least likely of max_tags.

    Where two tags were about equally likely to extend the greedy list, either may extend it, and later positions
    belong to different lists. Then the tags before have equal confidences in both answers, and a tag that extends one
    list is at least as confident in the other answer, where later positions are added to its confidence.
    """
    first, second = (_marginals(answer, decoding) for answer in (old, new))
    n = _first_difference(first.greedy_tags, second.greedy_tags)
    common = first.greedy_tags[:n]
    if n < min(len(first.greedy_tags), len(second.greedy_tags)):
        tag, other_tag = first.greedy_tags[n], second.greedy_tags[n]
        # in the first position a confidence is the tag's probability there, so both can be compared
        alone = n == 0 and decoding.decoding == "marginal"
        tie = not alone or abs(first.confidence(tag) - second.confidence(other_tag)) <= CONFIDENCE_TOLERANCE
        extended = _not_lower([tag], first, second) and _not_lower([other_tag], second, first)
        return tie and extended and _equal(common, first, second)
    if n == 0 or len(first.greedy_tags) == len(second.greedy_tags):
        return _equal(first.confidences | second.confidences, first, second)
    shorter, longer = sorted((first, second), key=lambda answer: len(answer.greedy_tags))
    return _equal(common, first, second) and _not_lower(shorter.confidences, shorter, longer)


@dataclass(frozen=True)
class _Marginals:
    """One answer with probabilities of all tags; without marginal decoding it has no greedy list."""

    confidences: dict[str, float]
    greedy_tags: list[str]
    omitted: float
    """Highest confidence that a tag outside the answer can have had."""
    tolerance: float

    def confidence(self, tag: str) -> float:
        return self.confidences.get(tag, self.omitted)


def _marginals(answer: Mapping[str, Any], decoding: DecodingConfig) -> _Marginals:
    confidences = dict(zip(answer["tags"], answer["confidences"], strict=True))
    tolerance = BLEND_TOLERANCE if "+" in decoding.decoding else CONFIDENCE_TOLERANCE
    full = len(confidences) == decoding.max_tags
    omitted = min(confidences.values()) if full else max(decoding.threshold, MIN_PROBABILITY)
    return _Marginals(confidences, parse_list(answer["raw"]) or [], omitted, tolerance)


def _first_difference(first: Sequence[str], second: Sequence[str]) -> int:
    """Return the first position where two lists differ, or the length of the shorter one."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((n for n, (tag, other) in pairs if tag != other), min(len(first), len(second)))


def _not_lower(tags: Iterable[str], before: _Marginals, after: _Marginals) -> bool:
    """Return whether no tag is less confident in `after` than in `before`."""
    return all(after.confidence(tag) >= before.confidence(tag) - before.tolerance for tag in tags)


def _equal(tags: Collection[str], first: _Marginals, second: _Marginals) -> bool:
    return _not_lower(tags, first, second) and _not_lower(tags, second, first)
