"""Render a text as a prompt, and tags as its answer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


def prompt(text: str, separator: str) -> str:
    """What the model is asked: the text and the separator's mark, for example `a text ->:`.

    The white space after the mark belongs to the answer, because byte-level tokenizers put a
    space into the same token as the bracket that follows it.
    """
    return strip_separator(text, separator) + separator.rstrip()


def strip_separator(text: str, separator: str) -> str:
    """The text without white space around it, and without the mark, should it be there already."""
    return text.strip().removesuffix(separator.strip()).rstrip()


def target(tags: Iterable[str], separator: str) -> str:
    """What the model is to answer after `prompt`, for example ` ['life', 'love']`."""
    return separator[len(separator.rstrip()) :] + str(list(tags))
