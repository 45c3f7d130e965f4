"""The files of answers: JSON lines, CSV or Parquet, each also compressed, in parts that are joined to one file."""

from __future__ import annotations

import base64
import csv
import datetime
import decimal
import io
import json
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, Protocol

from job.config.validators import is_unicode
from job.dataset.cells import Number
from job.dataset.sources import COMPRESSIONS
from job.errors import InvalidInputError

if TYPE_CHECKING:
    import pyarrow

OWN_COLUMNS = ("tags", "confidences", "error")
"""The columns that are added to those of the input."""
KINDS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".parquet": "parquet"}
EXPECTED = "a file that ends in .jsonl, .csv or .parquet, each also with .gz or .zst, or a folder that ends in /"
_SURROGATE = re.compile("[\ud800-\udfff]")


class Sink(Protocol):
    """What a file is written to."""

    def write(self, content: Any, /) -> int: ...

    def tell(self) -> int: ...


@dataclass(frozen=True)
class Format:
    """How answers are written."""

    suffix: str
    """Such as `.jsonl.gz`."""

    @property
    def kind(self) -> str:
        return KINDS[self.suffix.removesuffix(f".{self.compression}") if self.compression else self.suffix]

    @property
    def compression(self) -> str | None:
        """`gz`, `zst` or None."""
        last = PurePosixPath(f"x{self.suffix}").suffix
        return last[1:] if last in COMPRESSIONS else None

    @property
    def is_table(self) -> bool:
        """Whether all rows have the same columns, which must be known before the first is written."""
        return self.kind != "jsonl"


def format_of(name: str) -> Format | None:
    """Return the format that the end of a file's or folder's name says; None if it says none."""
    path = PurePosixPath(name.rstrip("/"))
    compression = path.suffix.lower() if path.suffix.lower() in COMPRESSIONS else ""
    kind = (path.with_suffix("") if compression else path).suffix.lower()
    return Format(kind + compression) if kind in KINDS else None


def encode(rows: Sequence[Mapping[str, Any]], output: Format, schema: pyarrow.Schema | None, *, first: bool) -> bytes:
    """Return the content of a part; only the first part of a CSV file has the header. Equal rows give equal bytes."""
    if output.kind == "parquet":
        assert schema is not None
        content = _parquet(rows, schema)
    elif output.kind == "csv":
        assert schema is not None
        content = _csv(rows, schema.names, first=first)
    else:
        content = b"".join(map(json_line, rows))
    return _compressed(content, output.compression)


def _compressed(content: bytes, compression: str | None) -> bytes:
    """Compress a part so that parts one after another are one compressed file; without a time, which would differ."""
    if compression == "gz":
        member = zlib.compressobj(wbits=31)
        return member.compress(content) + member.flush()
    if compression == "zst":
        import pyarrow

        return bytes(pyarrow.Codec("zstd").compress(content, asbytes=True))
    return content


def json_line(row: Mapping[str, Any]) -> bytes:
    """Return a row as a line of JSON in UTF-8."""
    text = json.dumps({name: to_json(value) for name, value in row.items()}, ensure_ascii=False)
    return (text if is_unicode(text) else _SURROGATE.sub("\ufffd", text)).encode() + b"\n"


def to_json(value: Any) -> Any:
    """Return a value that JSON can hold: numbers as numbers, dates in ISO 8601, bytes as text or base64."""
    if isinstance(value, Number):
        return _number(value)
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return value if value - value == 0 else None  # JSON has no NaN and no infinity
    if isinstance(value, Mapping):
        return {str(name): to_json(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(item) for item in value]
    return _other_to_json(value)


def _number(value: Number) -> int | float | None:
    try:
        return int(value)
    except ValueError:
        found = float(value)
        return found if found - found == 0 else None


def _other_to_json(value: Any) -> Any:
    if isinstance(value, (datetime.datetime, datetime.date, datetime.time)):
        return value.isoformat()
    if isinstance(value, datetime.timedelta):
        return value.total_seconds()
    if isinstance(value, decimal.Decimal):
        return str(value)
    if isinstance(value, (bytes, bytearray)):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return base64.b64encode(value).decode()
    return str(value)


def _as_text(value: Any) -> str:
    """Return a value as a text, JSON for all but texts and numbers."""
    if value is None:
        return ""
    text = value if isinstance(value, str) else json.dumps(to_json(value), ensure_ascii=False)
    return text if is_unicode(text) else _SURROGATE.sub("\ufffd", text)


def _csv(rows: Iterable[Mapping[str, Any]], names: Sequence[str], *, first: bool) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    if first:
        writer.writerow(names)
    for row in rows:
        writer.writerow([_as_text(row.get(name)) for name in names])
    return text.getvalue().encode()


def _parquet(rows: Sequence[Mapping[str, Any]], schema: pyarrow.Schema) -> bytes:
    import pyarrow
    from pyarrow import parquet

    arrays = [
        pyarrow.array([_as_type(row.get(field.name), field.type) for row in rows], field.type) for field in schema
    ]
    sink = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_arrays(arrays, schema=schema), sink, row_group_size=max(1, len(rows)))
    return sink.getvalue()


def _as_type(value: Any, kind: Any) -> Any:
    import pyarrow

    if value is None:
        return None
    if pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind):
        return _as_text(value)
    if isinstance(value, Number):
        return int(value) if pyarrow.types.is_integer(kind) else float(value)
    if isinstance(value, list):
        return [_as_type(item, kind.value_type) for item in value] if pyarrow.types.is_list(kind) else value
    return value


def output_schema(schema: pyarrow.Schema, columns: Sequence[str] | None) -> pyarrow.Schema:
    """Return the columns of the output: those that are carried along, then the tags, their confidences, and the error.

    A field of records, which `schema` does not have by its name, is a text.
    """
    import pyarrow

    own = (pyarrow.list_(pyarrow.string()), pyarrow.list_(pyarrow.float64()), pyarrow.string())
    names = [name for name in (schema.names if columns is None else columns) if name not in OWN_COLUMNS]
    kinds = [schema.field(name).type if name in schema.names else pyarrow.string() for name in names]
    return pyarrow.schema([*zip(names, kinds, strict=True), *zip(OWN_COLUMNS, own, strict=True)])


def pack_schema(schema: pyarrow.Schema) -> str:
    """Return the types of columns as text for a JSON file."""
    return base64.b64encode(schema.serialize().to_pybytes()).decode()


def unpack_schema(text: str) -> pyarrow.Schema:
    """Return the types that `pack_schema` has written; raises ValueError for anything else."""
    import pyarrow

    schema: pyarrow.Schema = pyarrow.ipc.read_schema(pyarrow.py_buffer(base64.b64decode(text)))
    return schema


def join(parts: Iterable[bytes], output: Format, schema: pyarrow.Schema | None, to: Sink) -> None:
    """Write one file from the parts in order: their bytes, or for Parquet their row groups."""
    if output.kind != "parquet":
        for part in parts:
            to.write(part)
        return
    import pyarrow
    from pyarrow import parquet

    codec = {None: None, "gz": "gzip", "zst": "zstd"}[output.compression]
    sink: Any = _KeepOpen(to)
    sink = pyarrow.CompressedOutputStream(pyarrow.PythonFile(sink, "w"), codec) if codec else sink
    with parquet.ParquetWriter(sink, schema) as writer:
        for part in parts:
            content = pyarrow.CompressedInputStream(pyarrow.BufferReader(part), codec).read() if codec else part
            table = parquet.read_table(pyarrow.BufferReader(content))
            if len(table):
                writer.write_table(table, row_group_size=len(table))
    sink.close()


class _KeepOpen(io.RawIOBase):
    """A stream that others may close, while the one below stays open."""

    def __init__(self, stream: Sink) -> None:
        self._stream = stream

    def writable(self) -> bool:
        return True

    def write(self, content: Any) -> int:
        return self._stream.write(content)

    def tell(self) -> int:
        return self._stream.tell()


def refuse_unknown(name: str, variable: str) -> InvalidInputError:
    """Return the error for a name whose end says no format."""
    return InvalidInputError(f"{variable}={name} has no format that is known; expected {EXPECTED}")
