"""Render a text as a prompt, and tags as the answer to it."""

from __future__ import annotations

from collections.abc import Iterable


def prompt(text: str, separator: str) -> str:
    """Return the text followed by the separator, for example `a text ->:`.

    White space at the end of the separator belongs to the answer, because byte-level tokenizers put a
    space into the same token as the bracket that follows it.
    """
    return strip_separator(text, separator) + separator.rstrip()


def strip_separator(text: str, separator: str) -> str:
    """Return the text without surrounding white space, and without a separator that it already ends in."""
    return text.strip().removesuffix(separator.strip()).rstrip()


def target(tags: Iterable[str], separator: str) -> str:
    """Return the expected answer to `prompt`, for example ` ['life', 'love']`."""
    return separator[len(separator.rstrip()) :] + str(list(tags))
