"""Normalise tags for comparison, choose their spelling, and drop rare ones."""

from __future__ import annotations

import ast
import json
import unicodedata
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from job.errors import InvalidInputError
from job.types import Example


def normalise_tag(tag: str) -> str:
    """Return the form in which tags are compared.

    It is in Unicode NFC and lower case, and each run of white space, hyphens and underscores is one hyphen.
    """
    return (
        "-".join(unicodedata.normalize("NFC", tag).casefold().replace("-", " ").replace("_", " ").split())
        or tag.strip()
    )


def common_spellings(counts: Counter[str]) -> dict[str, str]:
    """Return the spelling to write each tag in: the most frequent one of those that are compared as one tag."""
    common: dict[str, str] = {}
    for tag, _ in counts.most_common():  # among equally frequent ones, the first in the data
        common.setdefault(normalise_tag(tag), tag)
    return {tag: common[normalise_tag(tag)] for tag in counts}


def parse_list(text: str) -> list[Any] | None:
    """Parse a list in Python or JSON notation; return None for any other text."""
    for parse in (json.loads, ast.literal_eval):
        try:
            with warnings.catch_warnings(action="ignore"):  # for a stray backslash
                value = parse(text.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if isinstance(value, (list, tuple)):
            return list(value)
    return None


def drop_rare_tags(examples: Sequence[Example], min_count: int) -> list[Example]:
    """Drop tags that occur in fewer than `min_count` examples; an example keeps its tags if none would be left.

    Spellings with the same normalised form count as one tag. Raises InvalidInputError when all tags are rare.
    """
    counts = Counter(tag for example in examples for tag in set(map(normalise_tag, example.tags)))
    highest = max(counts.values(), default=0)
    if highest < min_count:
        raise InvalidInputError(
            f"TAGGER_DATA_MIN_TAG_COUNT={min_count} makes every tag rare: the most frequent one is on {highest} of "
            f"{len(examples)} training examples; lower it"
        )
    return drop_tags(examples, lambda tag: counts[normalise_tag(tag)] < min_count)


def drop_tags(examples: Sequence[Example], unwanted: Callable[[str], bool]) -> list[Example]:
    """Drop the tags for which `unwanted` is true; an example keeps its tags if none would be left."""
    kept = [tuple(tag for tag in example.tags if not unwanted(tag)) for example in examples]
    return [replace(example, tags=tags or example.tags) for example, tags in zip(examples, kept, strict=True)]
