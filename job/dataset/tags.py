"""Tags: parse a cell, normalise for comparison, drop rare ones."""

from __future__ import annotations

import ast
import json
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from job.errors import InvalidInputError
from job.types import Example

if TYPE_CHECKING:
    pass


def normalise_tag(tag: str) -> str:
    """The form in which tags are compared: lower case, white space and hyphens alike as one hyphen."""
    return "-".join(tag.casefold().replace("-", " ").replace("_", " ").split()) or tag.strip()


def parse_tags_value(value: object) -> tuple[str, ...]:
    """The tags in a column's value, in order, each once.

    Takes a list, a Python or JSON list in a string, or comma-separated words; anything else has no tags.
    """
    if isinstance(value, str):
        value = parse_list(value) or value.strip().removeprefix("[").removesuffix("]").split(",")
    if not isinstance(value, (list, tuple)):
        return ()
    texts = (str(tag).strip() for tag in value if isinstance(tag, (str, int, float)))
    return tuple(dict.fromkeys(tag for tag in texts if tag))


def parse_list(text: str) -> list[Any] | None:
    """The list that a text is, in Python's or JSON's notation; None when it is none."""
    for parse in (json.loads, ast.literal_eval):
        try:
            with warnings.catch_warnings(action="ignore"):  # a stray backslash
                value = parse(text.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if isinstance(value, (list, tuple)):
            return list(value)
    return None


def drop_rare_tags(examples: Sequence[Example], least: int) -> list[Example]:
    """The examples without the tags that fewer than `least` of them have, where that leaves a tag.

    Spellings that are compared as one tag count as one. Raises InvalidInputError when all tags are rare.
    """
    counts = Counter(tag for example in examples for tag in set(map(normalise_tag, example.tags)))
    most = max(counts.values(), default=0)
    if most < least:
        raise InvalidInputError(
            f"TAGGER_DATA_MIN_TAG_COUNT={least} makes every tag rare: the most frequent one is on {most} of "
            f"{len(examples)} training examples; lower it"
        )
    return drop_tags(examples, lambda tag: counts[normalise_tag(tag)] < least)


def drop_tags(examples: Sequence[Example], unwanted: Callable[[str], bool]) -> list[Example]:
    """The examples without such tags; one that has no others keeps them."""
    left = [tuple(tag for tag in example.tags if not unwanted(tag)) for example in examples]
    return [replace(example, tags=tags or example.tags) for example, tags in zip(examples, left, strict=True)]
