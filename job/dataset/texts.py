"""Texts to tag, from a command line or a file of JSON lines."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from job.config.validators import is_unicode
from job.errors import InvalidInputError


def check_texts(texts: Sequence[str], option: str) -> tuple[str, ...]:
    """Return the texts of a command line; raise InvalidInputError, which names the option, if one is unusable."""
    if not all(map(_is_usable, texts)):
        raise InvalidInputError(f"a {option} to tag is empty or is not valid Unicode; expected some words")
    return tuple(texts)


def read_texts(path: Path, column: str) -> tuple[str, ...]:
    """Return the texts of a file of JSON lines, each a string or an object with the column.

    Raises InvalidInputError when the file cannot be read, is empty, or has a line without a text.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInputError(
            f"--input {path} cannot be read ({error}); expected a UTF-8 file of JSON lines"
        ) from error
    texts = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        text = _parse_line(line, column)
        if text is None:
            raise InvalidInputError(
                f'{path} line {number} has no text; expected {{"{column}": "a text"}}. Fix it, or set '
                "TAGGER_DATA_TEXT_COLUMN"
            )
        texts.append(text)
    if not texts:
        raise InvalidInputError(f"{path} is empty; expected at least one text")
    return tuple(texts)


def _parse_line(line: str, column: str) -> str | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    text = row.get(column) if isinstance(row, dict) else row
    return text if isinstance(text, str) and _is_usable(text) else None


def _is_usable(text: str) -> bool:
    return bool(text.strip()) and is_unicode(text)
