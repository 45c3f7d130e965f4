"""Read the rows of data files: JSON, CSV and Parquet."""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from typing import IO, Any, Literal

from job.dataset.cells import Number
from job.dataset.sources import BLOCK_BYTES, SourceFile
from job.errors import InvalidInputError

DELIMITERS = (",", ";", "\t", "|")
UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
PARQUET_BATCH_ROWS = 1024
ARRAY_CHARACTERS = 1 << 25
"""A longer JSON array is not parsed at once."""
ARRAY_TOKEN = re.compile(r"[ \t\r\n]*(\S)")
JSON_SPACE = re.compile(r"[ \t\r\n]*")
SAMPLE_LINES = 20
"""Lines that the delimiter of a CSV file is guessed from."""


COLUMN_SETTINGS = "Set TAGGER_DATA_TEXT_COLUMN and TAGGER_DATA_TAGS_COLUMN"
NOT_JSON, NOT_CSV = "not JSON", "not CSV"
"""Defects of rows that cannot be read."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a data set."""

    place: str
    """Where it is, as messages show it: `quotes.csv line 3`."""
    values: Mapping[str, Any]
    defect: str | None = None
    """Why the row cannot be read, only with `Reading.keep_defects`."""


@dataclass(frozen=True)
class Reading:
    """What to read of a file, and what to do about rows that cannot be read."""

    columns: tuple[str, ...]
    """Columns that must exist; others are not read where the format allows it."""
    every: bool = False
    """Read all other columns too."""
    keep_defects: bool = False
    """Yield a row that cannot be read with its defect, and bytes that are not UTF-8 as lone surrogates."""
    remedy: str = COLUMN_SETTINGS
    """What a message about a column that does not exist advises."""


@dataclass(frozen=True)
class Span:
    """A piece of a file: some of its rows, or the rows that begin in a range of its bytes."""

    unit: Literal["rows", "bytes"] = "rows"
    start: int = 0
    stop: int | None = None


WHOLE = Span()


def read_file(file: SourceFile, reading: Reading, span: Span = WHOLE) -> Iterator[Row]:
    """Yield the rows of a file or of a piece of it.

    A span of bytes is for uncompressed JSON lines, or for CSV if it begins and ends where rows do.
    Raises InvalidInputError for a file that is damaged, is something else than its name says, or has a table's header
    without the columns.
    """
    readers: dict[str, Callable[[SourceFile, Reading, Span], Iterator[Row]]] = {
        ".csv": _csv_rows,
        ".tsv": _csv_rows,
        ".parquet": _parquet_rows,
    }
    try:
        yield from readers.get(file.format, _json_rows)(file, reading, span)
    except UnicodeDecodeError as error:
        raise InvalidInputError(
            f"{file.name} is not UTF-8 text ({error.reason} at byte {error.start} of what was read); save it as UTF-8, "
            "or as UTF-16 with a byte order mark"
        ) from error


def check_columns(name: str, columns: Iterable[object], wanted: Sequence[str], remedy: str = COLUMN_SETTINGS) -> None:
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
        f"{hint}. {remedy}"
    )


def _text_lines(stream: IO[bytes], name: str, errors: str = "strict") -> io.TextIOWrapper:
    """Decode a binary stream: UTF-8, with or without a mark, or UTF-16 with one. Line ends stay as they are."""
    raw: Any = stream
    buffered = io.BufferedReader(raw, BLOCK_BYTES)
    start = buffered.peek(4)[:4]
    if (b"\0" in start and start[:2] not in UTF16_MARKS) or start[2:] == b"\0\0":
        raise InvalidInputError(f"{name} is UTF-16 or UTF-32 text without the mark that says which; save it as UTF-8")
    utf16 = start[:2] in UTF16_MARKS
    encoding = "utf-16" if utf16 else "utf-8-sig"
    return io.TextIOWrapper(buffered, encoding=encoding, errors="strict" if utf16 else errors, newline="")


def parse_json(text: str) -> Any:
    """Parse JSON, keeping the spelling of numbers."""
    return json.loads(text, parse_float=Number, parse_int=Number)


def _json_rows(file: SourceFile, reading: Reading, span: Span) -> Iterator[Row]:
    """Yield the rows of a JSON array, or of one object a line, told apart by the first character."""
    if span.unit == "bytes":
        yield from _json_lines_of_bytes(file, reading, span)
        return
    with file.open() as stream, _text_lines(stream, file.name, _errors(reading)) as lines:
        first, row = "", 0
        for number, line in enumerate(_lines(lines), 1):
            if not line.strip():
                continue
            if not first:
                first = line.lstrip()[0]
                if first == "[":
                    yield from islice(_json_array(file, line, lines), span.start, span.stop)
                    return
            if span.stop is not None and row >= span.stop:
                return
            if row >= span.start:  # the others are not parsed
                yield _json_row(file, f"line {number}", line, reading)
            row += 1


def _json_lines_of_bytes(file: SourceFile, reading: Reading, span: Span) -> Iterator[Row]:
    """Yield the rows of the lines that begin in a range of bytes; the last one may end after it."""
    stream: Any
    with file.open() as stream:
        before = min(span.start, 1)  # the byte before says whether a line begins at the first one
        stream.seek(span.start - before)
        content = stream.read(None if span.stop is None else span.stop - span.start + before)
        if before:
            content = content.partition(b"\n")[2]
        while content and not content.endswith(b"\n") and (block := stream.read(BLOCK_BYTES)):
            line, end, _ = block.partition(b"\n")
            content += line + end
    for raw in content.removeprefix(codecs.BOM_UTF8 if span.start == 0 else b"").split(b"\n"):
        text = raw.decode("utf-8", _errors(reading))
        if text.strip():
            yield _json_row(file, f"in the lines from byte {span.start} on", text, reading)


def _errors(reading: Reading) -> str:
    return "surrogateescape" if reading.keep_defects else "strict"


def _json_row(file: SourceFile, place: str, line: str, reading: Reading) -> Row:
    place = f"{file.name} {place}"
    try:
        return Row(place, _json_object(place, line))
    except InvalidInputError:
        if not reading.keep_defects:
            raise
        return Row(place, {}, NOT_JSON)


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


def _json_array(file: SourceFile, text: str, rest: IO[str]) -> Iterator[Row]:
    """Yield the rows of an array that begins with `text`; a large one is parsed piece by piece."""
    text += rest.read(ARRAY_CHARACTERS)
    more = rest.read(1)
    try:
        values = iter(parse_json(text)) if not more else _array_items(text + more, rest)
        for number, row in enumerate(values, 1):
            if not isinstance(row, dict):
                raise InvalidInputError(f"{file.name} row {number} is a JSON {_json_type(row)}; expected {_EXAMPLE}")
            yield Row(f"{file.name} row {number}", row)
    except (ValueError, RecursionError) as error:
        raise InvalidInputError(f"{file.name} is not JSON ({error}); expected an array of objects") from error


def _array_items(text: str, rest: IO[str]) -> Iterator[Any]:
    """Yield the items of a JSON array, with little more than one of them in memory; raises ValueError."""
    decoder = json.JSONDecoder(parse_float=Number, parse_int=Number)
    position, expected = 0, "["
    while True:
        found = ARRAY_TOKEN.match(text, position)
        if found is None:  # white space up to the end of the piece
            if not (block := rest.read(ARRAY_CHARACTERS)):
                raise ValueError("the array does not end")
            text, position = text[position:] + block, 0
            continue
        if found[1] not in expected:
            raise ValueError(f"{found[1]!r} where one of {expected!r} was expected")
        position = found.end()
        if found[1] == "]":
            return
        while True:
            try:
                value, end = decoder.raw_decode(text, JSON_SPACE.match(text, position).end())  # type: ignore[union-attr]
                break
            except ValueError:
                block = rest.read(ARRAY_CHARACTERS) if len(text) - position < ARRAY_CHARACTERS else ""
                if not block:
                    raise
                text, position = text[position:] + block, 0
        yield value
        position, expected = end, ",]"


_EXAMPLE = 'an object such as {"quote": "...", "tags": ["..."]}'


def _json_object(place: str, line: str) -> Mapping[str, Any]:
    try:
        row = parse_json(line)
    except (ValueError, RecursionError) as error:
        hint = "expected one object a line, or one array of objects. Repair or remove the line"
        raise InvalidInputError(f"{place} is not JSON ({error}); {hint}") from error
    if not isinstance(row, dict):
        raise InvalidInputError(f"{place} is a JSON {_json_type(row)}; expected {_EXAMPLE}")
    return row


def _json_type(value: object) -> str:
    names = {list: "array", Number: "number", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), type(value).__name__)


@dataclass(frozen=True)
class _Table:
    """The head of a CSV file."""

    name: str
    header: list[str]
    places: Mapping[str, int]
    """The position of each column that is read."""
    delimiter: str
    lines_before: int
    """Lines before the header."""


def _csv_reader(lines: Iterable[str], delimiter: str) -> Any:
    csv.field_size_limit(2**31 - 1)  # a long text is no mistake
    return csv.reader(lines, delimiter=delimiter, strict=True, skipinitialspace=True)


def _csv_table(file: SourceFile, lines: _CountedLines, reading: Reading) -> tuple[_Table, Any] | None:
    """Read the header; return the table and a reader of the records that follow. None for an empty file."""
    head, delimiter, before = _csv_dialect(file, lines, reading.columns)
    lines.bytes -= sum(map(_utf8_bytes, head))
    records = _csv_reader(lines.counted(chain(head, lines.lines)), delimiter)
    try:
        header = [name.strip() for name in next(records, [])]
    except csv.Error as error:
        line = records.line_num + before
        raise InvalidInputError(f"{file.name} line {line} is not CSV ({error}); repair the line") from error
    if not header:
        return None
    return _Table(file.name, header, _used_columns(file, header, reading), delimiter, before), records


def _csv_rows(file: SourceFile, reading: Reading, span: Span) -> Iterator[Row]:
    with file.open() as stream, _text_lines(stream, file.name, _errors(reading)) as lines:
        if (found := _csv_table(file, _CountedLines(lines), reading)) is None:
            return
        table, records = found
        if span.unit == "rows":
            yield from islice(_csv_records(table, records, reading), span.start, span.stop)
            return
    raw: Any
    with file.open() as raw:
        raw.seek(span.start)
        content = io.BytesIO(raw.read(None if span.stop is None else span.stop - span.start))
    lines = io.TextIOWrapper(content, encoding="utf-8", errors=_errors(reading), newline="")
    yield from _csv_records(table, _csv_reader(lines, table.delimiter), reading)


def _csv_records(table: _Table, records: Any, reading: Reading) -> Iterator[Row]:
    """Yield the rows of a table; blank lines are none."""
    while True:
        try:
            record = next(records, None)
        except csv.Error as error:
            place = f"{table.name} line {records.line_num + table.lines_before}"
            if not reading.keep_defects:
                raise InvalidInputError(f"{place} is not CSV ({error}); repair the line") from error
            yield Row(place, {}, NOT_CSV)
            continue
        if record is None:
            return
        if not record or (len(record) == 1 and not record[0].strip() and len(table.header) > 1):
            continue
        place = f"{table.name} line {records.line_num + table.lines_before}"
        if problem := _record_problem(table, record):
            if not reading.keep_defects:
                raise InvalidInputError(f"{place} {problem}")
            yield Row(place, {}, NOT_CSV)
            continue
        yield Row(place, {name: record[position] for name, position in table.places.items()})


def _record_problem(table: _Table, record: Sequence[str]) -> str | None:
    header = table.header
    if [name.strip().removeprefix("\ufeff") for name in record] == header:
        return "repeats the header, as if files were joined; remove the line"
    if (len(record) > len(header) and any(map(str.strip, record[len(header) :]))) or len(record) < _named(header):
        return (
            f"has {len(record)} fields and the header {len(header)} (delimiter {table.delimiter!r}); put quotes around "
            "a field that holds the delimiter"
        )
    return None


class _CountedLines:
    """Lines of text, and the bytes of those that were read."""

    def __init__(self, lines: Iterable[str], before: int = 0) -> None:
        self.lines = iter(lines)
        self.bytes = before

    def __iter__(self) -> Iterator[str]:
        return self.counted(self.lines)

    def counted(self, lines: Iterable[str]) -> Iterator[str]:
        for line in lines:
            self.bytes += _utf8_bytes(line)
            yield line


def _utf8_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogateescape"))


def csv_spans(file: SourceFile, reading: Reading, rows: int) -> Iterator[tuple[Span, int]]:
    """Yield spans of bytes that hold `rows` rows of an uncompressed CSV file in UTF-8 each, and how many they hold."""
    with file.open() as stream:
        before = len(codecs.BOM_UTF8) if stream.read(3) == codecs.BOM_UTF8 else 0
    with file.open() as stream, _text_lines(stream, file.name, _errors(reading)) as text:
        lines = _CountedLines(text, before)
        if (found := _csv_table(file, lines, reading)) is None:
            return
        start, count = lines.bytes, 0
        for _ in _csv_records(*found, reading):
            count += 1
            if count == rows:
                yield Span("bytes", start, lines.bytes), count
                start, count = lines.bytes, 0
        if count:
            yield Span("bytes", start, lines.bytes), count


def _named(header: Sequence[str]) -> int:
    """Return the number of columns up to the last one that has a name."""
    return max((number for number, name in enumerate(header, 1) if name), default=0)


def _used_columns(file: SourceFile, header: Sequence[str], reading: Reading) -> dict[str, int]:
    """Return the position of each used column; only those that are used have to be unique."""
    if header and header[0].startswith("#") and len(list(filter(None, header))) == 1:
        raise InvalidInputError(
            f"{file.name} begins with a comment ({header[0][:60]!r}); expected the names of the columns in the first "
            "line. Remove the comment"
        )
    check_columns(file.name, filter(None, header), reading.columns, reading.remedy)
    heads = used_heads(header, reading)
    for head in heads:
        if header.count(head) > 1:
            raise InvalidInputError(
                f"{file.name} has {header.count(head)} columns named {head!r}; give each its own name"
            )
    return {head: header.index(head) for head in heads}


def used_heads(names: Sequence[str], reading: Reading) -> list[str]:
    """Return the columns to read, each once: those that are wanted, or that hold records with a wanted field."""
    wanted = [column if column in names else column.partition(".")[0] for column in reading.columns]
    return list(dict.fromkeys(filter(None, names) if reading.every else wanted))


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


def _parquet_rows(file: SourceFile, reading: Reading, span: Span) -> Iterator[Row]:
    with open_parquet(file) as source:
        names = source.schema_arrow.names
        check_columns(file.name, names, reading.columns, reading.remedy)
        heads = used_heads(names, reading)
        if twice := [head for head in heads if names.count(head) > 1]:
            raise InvalidInputError(f"{file.name} has several columns named {twice[0]!r}; give each its own name")
        labels = class_labels((source.schema_arrow.metadata or {}).get(b"huggingface"))
        groups, number = _row_groups(source, span)
        for batch in source.iter_batches(columns=heads, row_groups=groups, batch_size=PARQUET_BATCH_ROWS):
            if number + len(batch) > span.start:
                for values in batch.to_pylist():
                    number += 1
                    if span.stop is not None and number > span.stop:
                        return
                    if number > span.start:
                        place = f"{file.name} row {number}"
                        yield Row(place, with_label_names(values, labels, place, keep_others=reading.keep_defects))
            else:
                number += len(batch)


def _row_groups(source: Any, span: Span) -> tuple[list[int], int]:
    """Return the row groups of a Parquet file that a span of rows touches, and the rows before them."""
    groups, before, number = [], 0, 0
    for group in range(source.num_row_groups):
        rows = source.metadata.row_group(group).num_rows
        if number + rows <= span.start:
            before += rows
        elif span.stop is None or number < span.stop:
            groups.append(group)
        number += rows
    return groups, before


def count_rows(file: SourceFile, reading: Reading) -> int:
    """Return the number of rows that `read_file` yields; lines of JSON are not parsed."""
    if file.format == ".parquet":
        with open_parquet(file) as source:
            return int(source.metadata.num_rows)
    if file.format in (".csv", ".tsv") or holds_json_array(file):
        return sum(1 for _ in read_file(file, reading))
    with file.open() as stream, _text_lines(stream, file.name, _errors(reading)) as lines:
        return sum(1 for line in _lines(lines) if line.strip())


def holds_json_array(file: SourceFile) -> bool:
    """Check whether the first character of a JSON file begins an array."""
    with file.open() as stream, _text_lines(stream, file.name, "replace") as lines:
        return next((line.lstrip()[0] for line in lines if line.strip()), "") == "["


def is_divisible(file: SourceFile) -> bool:
    """Check whether the file can be read from any row on: JSON lines and CSV in UTF-8, not compressed."""
    if file.is_compressed or file.format == ".parquet":
        return False
    with file.open() as stream:
        if stream.read(2) in UTF16_MARKS:
            return False
    return file.format in (".csv", ".tsv") or not holds_json_array(file)


@contextmanager
def open_parquet(file: SourceFile) -> Iterator[Any]:
    """Open a Parquet file; raises InvalidInputError when it is none, or is damaged."""
    import pyarrow
    from pyarrow import parquet

    with file.open() as stream:
        try:
            # a compressed stream cannot be read from its end, where Parquet has its index
            yield parquet.ParquetFile(stream if stream.seekable() else pyarrow.BufferReader(stream.read()))
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


def with_label_names(
    values: Mapping[str, Any], labels: Mapping[str, Any], place: str, *, keep_others: bool = False
) -> Mapping[str, Any]:
    """Replace the ids of ClassLabel columns by their names, and decode bytes; an id of -1 is no label.

    Raises InvalidInputError for an id without a name and for bytes that are not UTF-8; with `keep_others` such a value
    stays as it is.
    """
    named: dict[str, Any] = {}
    for column, value in values.items():
        try:
            named[column] = _plain(value, labels.get(column), f"{place}: {column!r}")
        except InvalidInputError:
            if not keep_others:
                raise
            named[column] = value
    return named


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
