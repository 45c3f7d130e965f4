"""Read the rows of data files: JSON, CSV and Parquet."""

from __future__ import annotations

import codecs
import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import IO, Any

from job.dataset.cells import Number
from job.dataset.sources import SourceFile
from job.errors import InvalidInputError

DELIMITERS = (",", ";", "\t", "|")
SAMPLE_LINES = 20
"""Lines that the delimiter of a CSV file is guessed from."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a data set."""

    place: str
    """Where it is, as messages show it: `quotes.csv line 3`."""
    values: Mapping[str, Any]


def read_file(file: SourceFile, columns: Sequence[str]) -> Iterator[Row]:
    """Yield the rows of a file, reading no other than these columns where the format allows it.

    Raises InvalidInputError for a file that is damaged, is something else than its name says, or has a table's header
    without the columns.
    """
    readers: dict[str, Callable[[SourceFile, Sequence[str]], Iterator[Row]]] = {
        ".csv": _csv_rows,
        ".tsv": _csv_rows,
        ".parquet": _parquet_rows,
    }
    try:
        yield from readers.get(file.format, _json_rows)(file, columns)
    except UnicodeDecodeError as error:
        raise InvalidInputError(
            f"{file.name} is not UTF-8 text ({error.reason} at byte {error.start} of what was read); save it as UTF-8, "
            "or as UTF-16 with a byte order mark"
        ) from error


def check_columns(name: str, columns: Iterable[object], wanted: Sequence[str]) -> None:
    """Raise InvalidInputError that names every wanted column that is absent, and those that there are.

    A column `a.b` is the field `b` of records in the column `a`.
    """
    present = [str(column) for column in columns]
    heads = [column if column in present else column.partition(".")[0] for column in wanted]
    missing = [column for column, head in zip(wanted, heads, strict=True) if head not in present]
    if not missing:
        return
    present = [column if len(column) <= 60 else f"{column[:57]}..." for column in present]
    near = [
        f"{column!r} may be {other!r}"
        for column in missing
        for other in present
        if other != column and other.strip().casefold() == column.strip().casefold()
    ]
    hint = f" ({'; '.join(near)}: names must match exactly)" if near else ""
    plural = "s" if len(missing) > 1 else ""
    raise InvalidInputError(
        f"{name} has no column{plural} {' and '.join(map(repr, missing))}; it has {', '.join(map(repr, present[:30]))}"
        f"{hint}. Set TAGGER_DATA_TEXT_COLUMN and TAGGER_DATA_TAGS_COLUMN"
    )


def _text_lines(stream: IO[bytes], name: str) -> io.TextIOWrapper:
    """Decode a binary stream: UTF-8, with or without a mark, or UTF-16 with one. Line ends stay as they are."""
    raw: Any = stream
    buffered = io.BufferedReader(raw)
    start = buffered.peek(4)[:4]
    if (b"\0" in start and start[:2] not in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or start[2:] == b"\0\0":
        raise InvalidInputError(f"{name} is UTF-16 or UTF-32 text without the mark that says which; save it as UTF-8")
    utf16 = start[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    return io.TextIOWrapper(buffered, encoding="utf-16" if utf16 else "utf-8-sig", newline="")


def parse_json(text: str) -> Any:
    """Parse JSON, keeping the spelling of numbers."""
    return json.loads(text, parse_float=Number, parse_int=Number)


def _json_rows(file: SourceFile, columns: Sequence[str]) -> Iterator[Row]:
    """Yield the rows of a JSON array, or of one object a line, told apart by the first character."""
    with file.open() as stream, _text_lines(stream, file.name) as lines:
        first = ""
        for number, line in enumerate(_lines(lines), 1):
            if not first and line.strip():
                first = line.lstrip()[0]
                if first == "[":
                    yield from _json_array(file, line + lines.read())
                    return
            if line.strip():
                yield Row(f"{file.name} line {number}", _json_object(file, line, number))


def _lines(stream: Iterable[str]) -> Iterator[str]:
    """Yield lines that end at line feeds; a carriage return or another separator inside of a text ends none."""
    rest = ""
    for piece in stream:
        rest += piece
        if piece.endswith("\n"):
            yield rest
            rest = ""
    if rest:
        yield rest


def _json_array(file: SourceFile, text: str) -> Iterator[Row]:
    try:
        rows = parse_json(text)
    except (ValueError, RecursionError) as error:
        raise InvalidInputError(f"{file.name} is not JSON ({error}); expected an array of objects") from error
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise InvalidInputError(f"{file.name} row {number} is a JSON {_json_type(row)}; expected {_EXAMPLE}")
        yield Row(f"{file.name} row {number}", row)


_EXAMPLE = 'an object such as {"quote": "...", "tags": ["..."]}'


def _json_object(file: SourceFile, line: str, number: int) -> Mapping[str, Any]:
    try:
        row = parse_json(line)
    except (ValueError, RecursionError) as error:
        hint = "expected one object a line, or one array of objects. Repair or remove the line"
        raise InvalidInputError(f"{file.name} line {number} is not JSON ({error}); {hint}") from error
    if not isinstance(row, dict):
        raise InvalidInputError(f"{file.name} line {number} is a JSON {_json_type(row)}; expected {_EXAMPLE}")
    return row


def _json_type(value: object) -> str:
    names = {list: "array", Number: "number", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), type(value).__name__)


def _csv_rows(file: SourceFile, columns: Sequence[str]) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)  # a long text is no mistake
    with file.open() as stream, _text_lines(stream, file.name) as lines:
        head, delimiter, skipped = _csv_dialect(file, lines, columns)
        reader = csv.reader(chain(head, lines), delimiter=delimiter, strict=True, skipinitialspace=True)
        try:
            header = [name.strip() for name in next(reader, [])]
            if not header:
                return
            places = _used_columns(file, header, columns)
            for row in reader:
                line = reader.line_num + skipped
                if [name.strip().removeprefix("\ufeff") for name in row] == header:
                    raise InvalidInputError(
                        f"{file.name} line {line} repeats the header, as if files were joined; remove the line"
                    )
                if not row or (len(row) == 1 and not row[0].strip() and len(header) > 1):
                    continue
                if (len(row) > len(header) and any(map(str.strip, row[len(header) :]))) or len(row) < _named(header):
                    raise InvalidInputError(
                        f"{file.name} line {line} has {len(row)} fields and the header {len(header)} (delimiter "
                        f"{delimiter!r}); put quotes around a field that holds the delimiter"
                    )
                yield Row(f"{file.name} line {line}", {name: row[place] for name, place in places.items()})
        except csv.Error as error:
            line = reader.line_num + skipped
            raise InvalidInputError(f"{file.name} line {line} is not CSV ({error}); repair the line") from error


def _named(header: Sequence[str]) -> int:
    """Return the number of columns up to the last one that has a name."""
    return max((number for number, name in enumerate(header, 1) if name), default=0)


def _used_columns(file: SourceFile, header: Sequence[str], columns: Sequence[str]) -> dict[str, int]:
    """Return the position of each used column; only those that are used have to be unique."""
    if header and header[0].startswith("#") and len(list(filter(None, header))) == 1:
        raise InvalidInputError(
            f"{file.name} begins with a comment ({header[0][:60]!r}); expected the names of the columns in the first "
            "line. Remove the comment"
        )
    check_columns(file.name, filter(None, header), columns)
    heads = [column if column in header else column.partition(".")[0] for column in columns]
    for head in heads:
        if header.count(head) > 1:
            raise InvalidInputError(
                f"{file.name} has {header.count(head)} columns named {head!r}; give each its own name"
            )
    return {head: header.index(head) for head in heads}


def _csv_dialect(file: SourceFile, lines: Iterable[str], columns: Sequence[str]) -> tuple[list[str], str, int]:
    """Return the first lines, the delimiter, and the number of lines before the header.

    The delimiter is that of a line `sep=`, the tab of a .tsv, or the one with which the header has the wanted columns,
    else the one that splits it most.
    """
    blank = 0
    for line in lines:
        if line.strip():
            lines = chain([line], lines)
            break
        blank += 1
    head = list(islice(lines, SAMPLE_LINES))
    if head and (mark := head[0].strip().lower()).startswith("sep=") and len(mark) == 5:
        return head[1:], mark[4], blank + 1
    if head and head[0].strip("\r\n").lower() == "sep=\t":
        return head[1:], "\t", blank + 1
    wanted = {column.partition(".")[0] for column in columns} | set(columns)

    def fields(delimiter: str) -> list[str]:
        try:
            return [name.strip() for name in next(csv.reader(head, delimiter=delimiter, skipinitialspace=True), [])]
        except csv.Error:
            return []

    candidates = ("\t", *DELIMITERS) if file.format == ".tsv" else DELIMITERS
    best = max(candidates, key=lambda delimiter: (len(wanted & set(fields(delimiter))), len(fields(delimiter))))
    return head, best, blank


def _parquet_rows(file: SourceFile, columns: Sequence[str]) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    with file.open() as stream:
        try:
            # a compressed stream cannot be read from its end, where Parquet has its index
            source = parquet.ParquetFile(stream if stream.seekable() else pyarrow.BufferReader(stream.read()))
            names = source.schema_arrow.names
            check_columns(file.name, names, columns)
            heads = list(dict.fromkeys(c if c in names else c.partition(".")[0] for c in columns))
            if twice := [head for head in heads if names.count(head) > 1]:
                raise InvalidInputError(f"{file.name} has several columns named {twice[0]!r}; give each its own name")
            labels = class_labels((source.schema_arrow.metadata or {}).get(b"huggingface"))
            number = 0
            for batch in source.iter_batches(columns=heads):
                for values in batch.to_pylist():
                    number += 1
                    place = f"{file.name} row {number}"
                    yield Row(place, with_label_names(values, labels, place))
        except (pyarrow.ArrowException, ValueError) as error:
            if isinstance(error, InvalidInputError):
                raise
            detail = " ".join(str(error).split())[:200]
            raise InvalidInputError(f"{file.name} is not Parquet ({detail}); write it again") from error


def class_labels(metadata: bytes | None) -> dict[str, Any]:
    """Return the names of ClassLabel columns from the metadata that `datasets` writes, as `label_names` does."""
    try:
        features = json.loads(metadata or b"{}")["info"]["features"]
        return {column: found for column, feature in features.items() if (found := label_names(feature))}
    except (ValueError, KeyError, TypeError, AttributeError):  # the metadata of something else
        return {}


def label_names(feature: Any) -> Any:
    """Return where the names of ClassLabel ids are in a feature of `datasets`, as its JSON has it.

    A list of names for a ClassLabel, `{"": ...}` for a list of something, a mapping of fields for a record, None where
    there are none.
    """
    if isinstance(feature, list):
        return {"": found} if feature and (found := label_names(feature[0])) else None
    if not isinstance(feature, dict):
        return None
    if feature.get("_type") == "ClassLabel":
        return list(feature["names"])
    if "_type" in feature:
        return {"": found} if (found := label_names(feature.get("feature"))) else None
    return {name: found for name, inner in feature.items() if (found := label_names(inner))} or None


def with_label_names(values: Mapping[str, Any], labels: Mapping[str, Any], place: str) -> Mapping[str, Any]:
    """Replace the ids of ClassLabel columns by their names, and decode bytes; an id of -1 is no label.

    Raises InvalidInputError for an id without a name.
    """
    return {column: _plain(value, labels.get(column), f"{place}: {column!r}") for column, value in values.items()}


def _plain(value: Any, names: Any, place: str) -> Any:
    if isinstance(value, (bytes, bytearray)):
        try:
            return value.decode()
        except UnicodeDecodeError:
            raise InvalidInputError(f"{place} holds bytes that are not UTF-8 text; expected texts") from None
    if isinstance(value, (list, tuple)):
        inner = names.get("") if isinstance(names, dict) else None
        return [_plain(item, inner, place) for item in value]
    if isinstance(value, dict):
        fields = names if isinstance(names, dict) else {}
        return {name: _plain(item, fields.get(name), place) for name, item in value.items()}
    if not isinstance(names, list) or value is None or value == -1:
        return value if not isinstance(names, list) else None
    if not 0 <= value < len(names):
        raise InvalidInputError(f"{place} has the label id {value}, and there are names for 0 to {len(names) - 1}")
    return names[value]
