"""Pick text and tags out of a row, by the columns that the settings name."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from typing import Any

from job.dataset.cells import MISSING, CellError, Number, parse_tags
from job.dataset.readers import Row, parse_json
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
    """Return the value of a column; `a.b` is the field b of the record, or of each record of a list, in column a.

    Lists met on the way are flattened, and a record may be written as JSON or Python in a text.
    Raises CellError when a record does not have the field.
    """
    if column in values:
        return values[column]
    head, _, rest = column.partition(".")
    if not rest or head not in values:
        return None
    return _field(values[head], rest)


def _field(value: Any, path: str) -> Any:
    if isinstance(value, str) and value.strip()[:1] in ("[", "{"):
        value = _parse_record(value)
    if value is None or (isinstance(value, float) and value != value):
        return None
    if isinstance(value, (list, tuple)):
        parts = [_field(item, path) if isinstance(item, (Mapping, list, tuple)) else item for item in value]
        return [item for part in parts for item in (part if isinstance(part, (list, tuple)) else [part])]
    if isinstance(value, str) and not isinstance(value, Number):
        return value  # Label Studio writes a single choice so, and several as a record
    if not isinstance(value, Mapping):
        raise CellError(f"has {_type_name(value)}, {_shown(value)}, where a record with the field {path!r} is expected")
    head = path if path in value else path.partition(".")[0]
    if head not in value:
        names = ", ".join(map(str, list(value)[:10]))
        raise CellError(f"has a record without the field {head!r}; it has {names}")
    return value[head] if head == path else _field(value[head], path.partition(".")[2])


def _parse_record(text: str) -> Any:
    try:
        return parse_json(text)
    except (ValueError, RecursionError):
        pass
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        raise CellError(f"cannot be read as records: {_shown(text)}; expected JSON or Python's notation") from None


def row_text(row: Row, settings: Data) -> str:
    """Return the text of a row, without white space around it; empty if there is none.

    Several columns are joined by line feeds. Raises InvalidInputError for a value that is no text.
    """
    parts = []
    for column in text_columns(settings):
        try:
            value = select(row.values, column)
        except CellError as error:
            raise InvalidInputError(f"{row.place}: {column!r} {error}") from error
        if value is None or (isinstance(value, float) and value != value):
            continue
        if isinstance(value, str) and value.strip().casefold() in MISSING:
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
    if value is None or text in ("", "0", "0.0", "false", "f", "no", "n", "nan", "null", "none"):
        return False
    if text in ("1", "1.0", "true", "t", "yes", "y", "x"):
        return True
    raise InvalidInputError(
        f"{row.place}: {column!r} is {_shown(value)}; expected 0 or 1, or true or false, in a column of "
        "TAGGER_DATA_TAG_COLUMNS"
    )


def _type_name(value: object) -> str:
    if isinstance(value, bool):
        return "a boolean"
    if isinstance(value, (Number, int, float)):
        return "a number"
    if isinstance(value, Mapping):
        return "a record"
    if isinstance(value, str):
        return "a text"
    return "a list" if isinstance(value, (list, tuple)) else f"a value of the type {type(value).__name__}"


def _shown(value: object) -> str:
    text = repr(str(value)) if isinstance(value, Number) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
