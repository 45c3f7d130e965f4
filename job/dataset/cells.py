"""Parse the tags in one cell of a data set."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
ITEM = re.compile(
    rf"""\s*(?:
        (?:np\.str_\(|numpy\.str_\()?(?:[uU]?)(?P<quoted>"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')\)?
      | (?:np\.\w+\()(?P<scalar>{NUMBER}|nan|None)\)
      | (?P<elided>\.\.\.)
      | (?P<bare>[^,\[\]{{}}()'"\s][^,\[\]{{}}]*)
    )\s*""",
    re.VERBOSE | re.DOTALL,
)
ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "a": "\a", "v": "\v", "0": "\0", "/": "/"}
ESCAPES |= {character: character for character in "'\"\\"}
ESCAPE = re.compile(r"\\(?:u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|x([0-9a-fA-F]{2})|(.))", re.DOTALL)
MISSING = {"none", "nan", "null", "<na>", "nat"}
"""Unquoted items of a list that stand for no value."""


class CellError(ValueError):
    """A cell that is not a list of tags; the message says what it is and what was expected.

    `wrong_type` marks a mistake of the whole column, such as a record in place of tags, rather than of one row.
    """

    def __init__(self, message: str, *, wrong_type: bool = False) -> None:
        super().__init__(message)
        self.wrong_type = wrong_type


class Number(str):
    """A number of a JSON file with the spelling that it has there: `3.10` is not `3.1`."""

    __slots__ = ()


def parse_tags(value: object, delimiter: str = ",") -> tuple[str, ...]:
    """Return the tags of a column's value in order, each once; empty if it has none.

    A value is a list of texts or numbers, a mapping of tags to true or false, a list in the notation of JSON, Python,
    numpy, PostgreSQL or YAML (`['a', 'b']`, `['a' 'b']`, `{a,"b c"}`, `[a, b]`), or tags with `delimiter` between them
    and quotes as CSV has them. Numbers keep their spelling.
    Raises CellError for anything else: a cell that begins like a list and is none is never cut at its commas.
    """
    if isinstance(value, str) and not isinstance(value, Number):
        items: Iterable[object] = _parse_text(value.strip(), delimiter)
    elif isinstance(value, Mapping):
        items = _of_mapping(value)
    elif isinstance(value, (list, tuple, set, frozenset)) or hasattr(value, "tolist"):
        plain: Any = value.tolist() if hasattr(value, "tolist") else value
        items = _of_list(plain if isinstance(plain, (list, tuple, set, frozenset)) else [plain])
    else:
        items = _of_list([value])
    return tuple(dict.fromkeys(text for item in items if (text := str(item).strip())))


def _of_list(items: Iterable[object]) -> list[object]:
    items = list(items)
    if len(items) > 1 and all(str(item) in ("0", "1", "0.0", "1.0") for item in items):
        raise CellError(
            "is a vector of 0 and 1 without names; name the columns of a one-hot table in TAGGER_DATA_TAG_COLUMNS, or "
            "write the tags themselves",
            wrong_type=True,
        )
    for item in items:
        if isinstance(item, (list, tuple, set, Mapping)):
            what = "a record" if isinstance(item, Mapping) else "a list"
            fields = f" with the fields {', '.join(map(str, item))}" if isinstance(item, Mapping) else ""
            raise CellError(
                f"holds {what}{fields} in place of a tag; expected texts. For a field of records set "
                "TAGGER_DATA_TAGS_COLUMN=column.field",
                wrong_type=True,
            )
    return [item for item in items if item is not None and not (isinstance(item, float) and math.isnan(item))]


def _of_mapping(value: Mapping[Any, object]) -> list[object]:
    if not all(
        flag is None or flag in (0, 1) for flag in value.values() if not isinstance(flag, (list, Mapping))
    ) or any(isinstance(flag, (list, Mapping)) for flag in value.values()):
        raise CellError(
            f"is a record with the fields {', '.join(map(str, value))}; expected a list of tags, or tags with true or "
            "false. For a field of it set TAGGER_DATA_TAGS_COLUMN=column.field",
            wrong_type=True,
        )
    return [tag for tag, flag in value.items() if flag]


def _parse_text(text: str, delimiter: str) -> Iterable[object]:
    array = re.fullmatch(r"(?:np\.|numpy\.)?array\((\[.*\])(?:, dtype=[^)]*)?\)", text, re.DOTALL)
    text = array[1] if array else text
    text = text.removeprefix("frozenset(").removesuffix(")") if text.startswith("frozenset({") else text
    if text[:1] in ("[", "{"):
        return _parse_bracketed(text)
    if re.match(r"\(\s*['\"]", text) and text.endswith(")"):
        return _of_list(_items(text))
    return _split(text, delimiter)


def _parse_bracketed(text: str) -> list[object]:
    """Parse a text that begins with a bracket or brace."""
    try:
        parsed = json.loads(text, parse_float=Number, parse_int=Number)
    except (ValueError, RecursionError):
        pass
    else:
        return _of_mapping(_flags(parsed)) if isinstance(parsed, dict) else _of_list(parsed)
    if text[0] == "{" and (mapping := _python_mapping(text)) is not None:
        return _of_mapping(mapping)
    closing = {"[": "]", "{": "}"}[text[0]]
    if not text.endswith(closing):
        raise CellError(
            f"begins with {text[0]} and does not end with {closing}: {_short(text)}; expected a list of tags"
        )
    return _of_list(_items(text))


def _flags(parsed: dict[str, object]) -> dict[str, object]:
    return {tag: int(flag) if isinstance(flag, Number) and flag in ("0", "1") else flag for tag, flag in parsed.items()}


def _python_mapping(text: str) -> dict[str, object] | None:
    """Return the mapping of tags to flags that a text in Python's notation is; None if it is another thing."""
    pair = r"""\s*(?:"((?:[^"\\]|\\.)*)"|'((?:[^'\\]|\\.)*)')\s*:\s*(True|False|0|1|None)\s*"""
    if not re.fullmatch(rf"\{{{pair}(?:,{pair})*,?\s*\}}", text):
        if re.match(r"""\{\s*(?:"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'|\w+)\s*:""", text):
            raise CellError(
                f"is a record: {_short(text)}; expected a list of tags, or tags with true or false", wrong_type=True
            )
        return None
    return {_unescape(a or b): flag in ("True", "1") for a, b, flag in re.findall(pair, text)}


def _items(text: str) -> list[object]:
    """Parse the items between the brackets of a list, set, tuple or array."""
    inside = text[1:-1]
    items: list[object] = []
    separators: list[str] = []
    position = 0
    while inside[position:].strip():
        found = ITEM.match(inside, position)
        if found is None:
            if re.match(r"\s*[\[{(]", inside[position:]):
                raise CellError(
                    f"holds a list or record inside of the list: {_short(text)}; expected texts", wrong_type=True
                )
            if re.match(r"\s*,", inside[position:]):  # an empty item, as in [a,,b]
                found = re.compile(r"\s*").match(inside, position)
                assert found is not None
            else:
                raise CellError(f"cannot be read as a list: {_short(text)}; expected a list such as ['a', 'b']")
        position = found.end()
        if found.re is ITEM:
            if found["elided"]:
                raise CellError(f"was shortened with ... when it was written, so tags are lost: {_short(text)}")
            items += _item(found)
        if position < len(inside):
            comma = inside[position] == ","
            separators.append("," if comma else " ")
            position += comma
    if len(set(separators)) > 1:
        raise CellError(
            f"has a comma between some items and none between others: {_short(text)}; expected one or the other"
        )
    return items


def _item(found: re.Match[str]) -> Iterator[object]:
    if found["quoted"] is not None:
        yield _unescape(found["quoted"][1:-1])
        return
    word = (found["scalar"] or found["bare"]).strip()
    if word.casefold() not in MISSING:
        if found["bare"] and re.search(r"['\"]", word):
            raise CellError(
                f"has a quote inside of an item without quotes: {word[:40]!r}; expected a list such as ['a', 'b']"
            )
        yield from word.split() if re.fullmatch(rf"(?:{NUMBER}\s+)+{NUMBER}", word) else [word]


def _unescape(text: str) -> str:
    def character(found: re.Match[str]) -> str:
        code = found[1] or found[2] or found[3]
        return chr(int(code, 16)) if code else ESCAPES.get(found[4], found[0])

    return ESCAPE.sub(character, text) if "\\" in text else text


def _split(text: str, delimiter: str) -> list[str]:
    """Cut a text at the delimiter; a part in double quotes may hold it."""
    if delimiter.strip() == "" and delimiter not in ("\n", "\t"):
        return text.split()
    if len(delimiter) > 1:
        if delimiter == "><":
            text = text.removeprefix("<").removesuffix(">")
        return text.split(delimiter)
    if delimiter == "\n":
        return text.splitlines()
    if '"' not in text:
        return text.split(delimiter)
    return next(csv.reader([text.replace("\n", " ")], delimiter=delimiter, skipinitialspace=True), [])


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:57]}...")
