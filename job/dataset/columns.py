"""Pick text and tags out of a row, by the columns that the settings name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from job.dataset.cells import CellError, Number, parse_tags
from job.dataset.readers import Row
from job.errors import InvalidInputError
from job.settings import Data

DELIMITER_NAMES = {"\\n": "\n", "\\t": "\t", "\\s": " ", "": " "}
"""What TAGGER_DATA_TAG_DELIMITER says for characters that are hard to write in an environment variable."""


def used_columns(settings: Data) -> list[str]:
    """Return the columns that are read, texts first."""
    tags = list(settings.tag_columns) if settings.tag_columns else [settings.tags_column]
    return [*text_columns(settings), *tags]


def text_columns(settings: Data) -> list[str]:
    """Return the text columns; several are separated by commas."""
    return [column.strip() for column in settings.text_column.split(",") if column.strip()]


def select(values: Mapping[str, Any], column: str) -> Any:
    """Return the value of a column; `a.b` is the field b of the record, or of each record of a list, in column a."""
    if column in values:
        return values[column]
    head, _, rest = column.partition(".")
    value = values.get(head) if rest else None
    if isinstance(value, (list, tuple)):
        return [select(item, rest) if isinstance(item, Mapping) else item for item in value]
    return select(value, rest) if isinstance(value, Mapping) else None


def row_text(row: Row, settings: Data) -> str:
    """Return the text of a row, without white space around it; empty if there is none.

    Several columns are joined by line feeds. Raises InvalidInputError for a value that is no text.
    """
    parts = []
    for column in text_columns(settings):
        value = select(row.values, column)
        if value is None or (isinstance(value, float) and value != value):
            continue
        if not isinstance(value, str) or isinstance(value, Number):
            raise InvalidInputError(
                f"{row.place}: {column!r} is {_type_name(value)}, {_shown(value)}; expected a text. Set "
                "TAGGER_DATA_TEXT_COLUMN to a column of texts"
            )
        parts.append(value.strip())
    return "\n".join(filter(None, parts))


def row_tags(row: Row, settings: Data) -> tuple[str, ...]:
    """Return the tags of a row.

    Raises InvalidInputError for a cell that cannot be read as tags.
    """
    if settings.tag_columns:
        return tuple(column for column in settings.tag_columns if _flag(row, column))
    try:
        return parse_tags(select(row.values, settings.tags_column), delimiter(settings))
    except CellError as error:
        raise InvalidInputError(f"{row.place}: {settings.tags_column!r} {error}") from error


def delimiter(settings: Data) -> str:
    """Return the text between two tags of one cell."""
    return DELIMITER_NAMES.get(settings.tag_delimiter, settings.tag_delimiter)


def _flag(row: Row, column: str) -> bool:
    value = select(row.values, column)
    text = str(value).strip().casefold()
    if value is None or text in ("", "0", "0.0", "false", "no", "nan"):
        return False
    if text in ("1", "1.0", "true", "yes", "x"):
        return True
    raise InvalidInputError(
        f"{row.place}: {column!r} is {_shown(value)}; expected 0 or 1, or true or false, in a column of "
        "TAGGER_DATA_TAG_COLUMNS"
    )


def _type_name(value: object) -> str:
    if isinstance(value, (bool, Number, int, float)):
        return "a number"
    if isinstance(value, Mapping):
        return "a record"
    return "a list" if isinstance(value, Sequence) else f"a value of the type {type(value).__name__}"


def _shown(value: object) -> str:
    text = repr(str(value)) if isinstance(value, Number) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
