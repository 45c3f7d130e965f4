"""Texts to tag from a command line."""

from __future__ import annotations

from collections.abc import Sequence

from job.config.validators import is_unicode
from job.errors import InvalidInputError


def check_texts(texts: Sequence[str], option: str) -> tuple[str, ...]:
    """Return the texts of a command line; raise InvalidInputError, which names the option, if one is unusable."""
    if not all(map(_is_usable, texts)):
        raise InvalidInputError(f"a {option} to tag is empty or is not valid Unicode; expected some words")
    return tuple(texts)


def _is_usable(text: str) -> bool:
    return bool(text.strip()) and is_unicode(text)
