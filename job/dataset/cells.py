"""Parse the tags in one cell of a data set."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
MISSING = {"none", "nan", "null", "<na>", "nat", "pd.na", r"\n"}
"""Unquoted items of a list, and cells, that stand for no value; `\\N` is that of MySQL and PostgreSQL."""
FLAGS = {"0", "1", "0.0", "1.0", "0.", "1.", "true", "false", "t", "f"}
EMPTY = {"set()", "frozenset()", "()"}
CONSTRUCTOR = re.compile(
    r"""[A-Za-z][\w.]*\(\s*[\[{("']|(?:WrappedArray|ArraySeq|List|Set|Vector|Stream)\(|<\w+>\s*\[|b['"]"""
)
"""How a value of another type begins when it was written as text: `deque([...`, `Index([...`, `b'...'`."""
NESTED = re.compile(r"""[\[{]\s*(?:'.*'|".*")\s*[\]}]$""", re.DOTALL)
"""A list that was written as text and then taken for one tag."""


class CellError(ValueError):
    """A cell that is not a list of tags; the message says what it is and what was expected."""


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
    else:
        plain: Any = value.tolist() if hasattr(value, "tolist") else value
        items = _of_list(plain if isinstance(plain, (list, tuple, set, frozenset)) else [plain])
    tags = tuple(dict.fromkeys(text for item in items if (text := str(item).strip())))
    if nested := [tag for tag in tags if NESTED.match(tag)]:
        raise CellError(f"holds the list {_short(nested[0])} in place of a tag; expected texts")
    return tags


def _of_list(items: Iterable[object]) -> list[object]:
    items = list(items)
    _refuse_vector(items)
    for item in items:
        if isinstance(item, (list, tuple, set, Mapping)):
            what = "a record" if isinstance(item, Mapping) else "a list"
            fields = f" with the fields {', '.join(map(str, item))}" if isinstance(item, Mapping) else ""
            raise CellError(
                f"holds {what}{fields} in place of a tag; expected texts. For a field of records set "
                "TAGGER_DATA_TAGS_COLUMN=column.field"
            )
        if isinstance(item, (bytes, bytearray, bool)):
            raise CellError(f"holds {item!r}, which is no text; expected texts")
    return [item for item in items if item is not None and not (isinstance(item, float) and math.isnan(item))]


def _refuse_vector(items: Sequence[object]) -> None:
    if len(items) > 1 and all(str(item).strip().casefold() in FLAGS for item in items):
        raise CellError(
            "is a vector of 0 and 1 without names; name the columns of a one-hot table in TAGGER_DATA_TAG_COLUMNS, or "
            "write the tags themselves"
        )


def _of_mapping(value: Mapping[Any, object]) -> list[object]:
    flags = {tag: _flag(flag) for tag, flag in value.items()}
    if None in flags.values():
        names = ", ".join(map(str, list(value)[:10]))
        raise CellError(
            f"is a record with the fields {names}; expected a list of tags, or tags with true or false. For a field of "
            "it set TAGGER_DATA_TAGS_COLUMN=column.field"
        )
    return [tag for tag, flag in flags.items() if flag]


def _flag(value: object) -> bool | None:
    """Return whether a tag is set; None for a value that is no flag."""
    if value is None:
        return False
    text = str(value).casefold() if isinstance(value, (bool, int, float, Number)) else ""
    return text in ("1", "1.0", "true") if text in ("0", "1", "0.0", "1.0", "true", "false") else None


def _parse_text(text: str, delimiter: str) -> Iterable[object]:
    if text.casefold() in MISSING or text in EMPTY:
        return []
    array = re.fullmatch(r"(?:np\.|numpy\.)?array\((\[.*\])(?:,\s*dtype=[^)]*)?\)", text, re.DOTALL)
    text = array[1] if array else text
    text = text.removeprefix("frozenset(").removesuffix(")") if text.startswith("frozenset({") else text
    if text.startswith('"') and (inner := _json_string(text)) is not None and inner[:1] in ("[", "{"):
        text = inner.strip()  # a list that was quoted twice
    if text[:1] in ("[", "{"):
        return _parse_bracketed(text)
    if re.match(r"\(\s*(?:['\"]|-?\d+\s*,)", text) and text.endswith(")"):
        return _of_list(_items(text))
    if CONSTRUCTOR.match(text) or re.match(r'"(?:[^"\\]|\\.)*"\s*=>', text):
        raise CellError(f"is a value of another type, {_short(text)}; expected a list such as ['a', 'b']")
    parts = [part for part in _split(text, delimiter) if part.strip().casefold() not in MISSING]
    _refuse_vector(parts)
    if pieces := [part for part in parts if part.count("[") != part.count("]") or part.count("{") != part.count("}")]:
        raise CellError(f"holds {_short(pieces[0])}, a piece of a list, in {_short(text)}; expected ['a', 'b'] or a, b")
    if len(parts) > 1 and all(re.fullmatch(r"\s*'[^']*'\s*", part) for part in parts):
        raise CellError(f"is a list without its brackets: {_short(text)}; expected ['a', 'b'] or a, b")
    return parts


def _json_string(text: str) -> str | None:
    try:
        inner = json.loads(text)
    except ValueError:
        inner = text[1:-1].replace('""', '"') if text.endswith('"') and len(text) > 1 else None
    return inner if isinstance(inner, str) else None


def _parse_bracketed(text: str) -> list[object]:
    """Parse a text that begins with a bracket or brace."""
    try:
        parsed = json.loads(text, parse_float=Number, parse_int=Number)
    except (ValueError, RecursionError):
        pass
    else:
        return _of_mapping(parsed) if isinstance(parsed, dict) else _of_list(parsed)
    if text[0] == "{" and (mapping := _python_mapping(text)) is not None:
        return _of_mapping(mapping)
    closing = {"[": "]", "{": "}"}[text[0]]
    if not text.endswith(closing):
        raise CellError(
            f"begins with {text[0]} and does not end with {closing}: {_short(text)}; expected a list of tags"
        )
    return _of_list(_items(text))


def _python_mapping(text: str) -> dict[str, object] | None:
    """Return the mapping of tags to flags that a text in Python's notation is; None if it is another thing."""
    pair = r"""\s*(?:"((?:[^"\\]|\\.)*)"|'((?:[^'\\]|\\.)*)')\s*:\s*(True|False|0|1|0\.0|1\.0|None)\s*"""
    if not re.fullmatch(rf"\{{{pair}(?:,{pair})*,?\s*\}}", text):
        if re.match(r"""\{\s*(?:"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'|\w+)\s*:""", text):
            raise CellError(f"is a record: {_short(text)}; expected a list of tags, or tags with true or false")
        return None
    return {_unescape(a or b): flag in ("True", "1", "1.0") for a, b, flag in re.findall(pair, text)}


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
                raise CellError(f"holds a list or record inside of the list: {_short(text)}; expected texts")
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
    if found["bare"] and (
        re.search(r"(?:^|\s)\.\.\.(?:\s|$)", word) or re.search(r"\w\(|:\s*(?:true|false|null|0|1)$", word, re.I)
    ):
        raise CellError(f"holds {_short(word)}, which is no tag; expected a list such as ['a', 'b']")
    if word.casefold() not in MISSING:
        if found["bare"] and re.search(r"['\"]", word):
            raise CellError(
                f"has a quote inside of an item without quotes: {word[:40]!r}; expected a list such as ['a', 'b']"
            )
        numbers = re.fullmatch(rf"(?:(?:{NUMBER}|True|False)\s+)+(?:{NUMBER}|True|False)", word)
        yield from word.split() if numbers else [word]


def _unescape(text: str) -> str:
    def character(found: re.Match[str]) -> str:
        code = found[1] or found[2] or found[3]
        return chr(int(code, 16)) if code else ESCAPES.get(found[4], found[0])

    return ESCAPE.sub(character, text) if "\\" in text else text


def _split(text: str, delimiter: str) -> list[str]:
    """Cut a text at the delimiter; a part in double quotes may hold it."""
    if delimiter == "><":
        if text.startswith("&lt;"):
            raise CellError(f"has HTML's &lt; in place of <: {_short(text)}; expected <a><b>. Decode the file first")
        return re.split(r">\s*<", text.removeprefix("<").removesuffix(">"))
    if len(delimiter) > 1:
        return text.split(delimiter)
    if '"' not in text:
        return text.splitlines() if delimiter == "\n" else text.split(None if delimiter == " " else delimiter)
    if delimiter in (" ", "\n"):
        space = r"\s" if delimiter == " " else r"\n"
        return [a or b for a, b in re.findall(rf'"([^"]*)"|([^{space}]+)', text)]
    return next(csv.reader([text.replace("\n", " ")], delimiter=delimiter, skipinitialspace=True), [])


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:57]}...")
