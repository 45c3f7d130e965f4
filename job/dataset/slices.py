"""Divide data of any size into slices that are read one at a time, each by itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from job.dataset.cells import Number
from job.dataset.columns import text_columns
from job.dataset.readers import (
    Reading,
    Row,
    Span,
    check_columns,
    class_labels,
    count_rows,
    csv_spans,
    is_divisible,
    label_names,
    open_parquet,
    read_file,
    used_heads,
)
from job.dataset.rows import dataset_rows, open_dataset
from job.dataset.sources import BLOCK_BYTES, SourceFile, find_files
from job.errors import InvalidInputError
from job.settings import Data

if TYPE_CHECKING:
    import pyarrow

SAMPLE_ROWS = 1000
"""Rows of JSON lines in which the text column has to occur, because such files have no header."""


@dataclass(frozen=True)
class Slice:
    """Some rows of one file, or of a data set."""

    file: int
    """Which file, counted from 0."""
    span: Span
    rows: int | None
    """How many there are; None where only reading them would tell."""


class SlicedData:
    """The rows that a setting names, in slices, with some or all of their columns."""

    def __init__(self, settings: Data, columns: Sequence[str] | None) -> None:
        """Find the files, or open the data set; `columns` are read besides the text, None for all.

        Raises InvalidInputError when there is nothing to read.
        """
        self._name = settings.dataset
        remedy = "Set TAGGER_DATA_TEXT_COLUMN" + (" and TAGGER_TAG_COLUMNS" if columns else "")
        wanted = (*text_columns(settings), *(columns or ()))
        self.reading = Reading(wanted, every=columns is None, keep_defects=True, remedy=remedy)
        self._dataset = _without_decoding(open_dataset(settings))
        self.files: list[SourceFile] = [] if self._dataset is not None else find_files(settings.dataset)
        self.seen: tuple[str, ...] = ()
        """Columns of the first rows, once there are slices."""
        self._reader: tuple[int, int, Iterator[Row]] | None = None
        """The file and the next row of the reader that is still open, for the slice that follows."""

    @property
    def reads_hub(self) -> bool:
        """Whether slices may be read from the Hub."""
        return self._dataset is not None or self._name.startswith("hf://")

    def fingerprint(self) -> list[dict[str, Any]]:
        """Return what identifies the data; for files their sizes, times of change and SHA-256."""
        if self._dataset is not None:
            return [{"rows": len(self._dataset), "fingerprint": self._dataset._fingerprint}]
        found = []
        for file in self.files:
            state = file.state()
            # what a store has is not read twice only to recognize it, if it says when it was written
            digest = file.digest() if file.system is None or state.modified is None else None
            found.append({"bytes": state.bytes, "modified": state.modified, "sha256": digest})
        return found

    def difference(self, fingerprint: Sequence[dict[str, Any]]) -> str | None:
        """Return what has changed since a fingerprint was taken; None if nothing has.

        A file of the same size is only read again if it has another time of change.
        """
        if self._dataset is not None:
            same = list(fingerprint) == self.fingerprint()
            return None if same else f"{self._name} is not what it was"
        if len(fingerprint) != len(self.files):
            return f"{self._name} was {len(fingerprint)} files and is {len(self.files)}"
        for file, old in zip(self.files, fingerprint, strict=True):
            state = file.state()
            if state.bytes != old.get("bytes"):
                return f"{file.name} had {old.get('bytes')} bytes and has {state.bytes}"
            if (state.modified is None or state.modified != old["modified"]) and file.digest() != old["sha256"]:
                return f"the contents of {file.name} are not what they were"
        return None

    def slices(self, rows: int) -> list[Slice]:
        """Divide the data into slices of about `rows` rows; they depend on the data alone.

        Raises InvalidInputError when there are no rows, or none has a column.
        """
        if self._dataset is not None:
            check_columns(self._name, self._dataset.column_names, self.reading.columns, self.reading.remedy)
            found = list(_slices_of_rows(0, len(self._dataset), rows))
        else:
            found = [piece for number, file in enumerate(self.files) for piece in self._file_slices(number, file, rows)]
        self._check_columns(found)
        return found

    def _file_slices(self, number: int, file: SourceFile, rows: int) -> Iterator[Slice]:
        if not is_divisible(file):
            yield from _slices_of_rows(number, count_rows(file, self.reading), rows)
        elif file.format in (".csv", ".tsv"):
            yield from (Slice(number, span, count) for span, count in csv_spans(file, self.reading, rows))
        else:
            size = file.state().bytes
            with file.open() as stream:
                sample = stream.read(BLOCK_BYTES)
            step = rows * -(-len(sample) // max(1, sample.count(b"\n")))
            for start in range(0, size, max(1, step)):
                yield Slice(number, Span("bytes", start, min(start + step, size)), None)

    def _check_columns(self, slices: Sequence[Slice]) -> None:
        """Raise InvalidInputError unless there are rows, and the first ones have the columns."""
        columns: dict[str, None] = {}
        sample = list(islice((row for piece in slices for row in self.read(piece)), SAMPLE_ROWS))
        self._reader = None
        for row in sample:
            columns.update(dict.fromkeys(row.values))
        if not sample:
            raise InvalidInputError(f"{self._name} has no rows; expected at least one text")
        if not columns:
            kind = sample[0].defect or "without columns"
            raise InvalidInputError(f"{sample[0].place} is {kind}, like all of the first {len(sample)} rows")
        check_columns(self._name, columns, self.reading.columns, self.reading.remedy)
        self.seen = tuple(columns)

    def read(self, piece: Slice) -> Iterator[Row]:
        """Yield the rows of a slice; slices of rows are read fastest in their order."""
        start, stop = piece.span.start, piece.span.stop
        if self._dataset is not None:
            assert stop is not None
            yield from dataset_rows(self._dataset.select(range(start, stop)), self._name, self.reading)
        elif piece.span.unit == "bytes":
            yield from read_file(self.files[piece.file], self.reading, piece.span)
        else:
            assert stop is not None
            kept = self._reader
            if kept is not None and kept[:2] == (piece.file, start):
                rows = kept[2]
            else:
                rows = read_file(self.files[piece.file], self.reading, Span("rows", start))
            self._reader = None
            yield from islice(rows, stop - start)
            self._reader = (piece.file, stop, rows)

    def schema(self, slices: Sequence[Slice]) -> pyarrow.Schema:
        """Return the types of all columns, as Arrow names them; of JSON they are found by reading all rows.

        A column that has values of several types, or records, is one of texts: these values are written as JSON.
        """
        import pyarrow

        types: dict[str, Any] = {}
        for name, kind in self._types(slices):
            types[name] = kind if types.get(name) in (None, kind) else _common_type(types[name], kind)
        null = pyarrow.null()
        return pyarrow.schema([(name, pyarrow.string() if kind == null else kind) for name, kind in types.items()])

    def _types(self, slices: Sequence[Slice]) -> Iterator[tuple[str, Any]]:
        import pyarrow

        if self._dataset is not None:
            features = self._dataset.features.to_dict()
            names = used_heads(self._dataset.column_names, self.reading)
            labels = {name: label_names(features[name]) for name in names}
            yield from _named_types(self._dataset.features.arrow_schema, names, labels)
        for number, file in enumerate(self.files):
            if file.format == ".parquet":
                with open_parquet(file) as source:
                    schema = source.schema_arrow
                labels = class_labels((schema.metadata or {}).get(b"huggingface"))
                yield from _named_types(schema, used_heads(schema.names, self.reading), labels)
                continue
            is_json = file.format not in (".csv", ".tsv")
            for row in (row for piece in slices if piece.file == number for row in self.read(piece)):
                names = used_heads(list(row.values), self.reading)
                yield from ((n, _json_type(row.values[n]) if is_json else pyarrow.string()) for n in names)
                if not is_json and names:
                    break


def _without_decoding(dataset: Any) -> Any:
    """Keep images and sounds as bytes."""
    for name, feature in {} if dataset is None else dataset.features.items():
        if getattr(feature, "decode", False) is True:
            dataset = dataset.cast_column(name, type(feature)(decode=False))
    return dataset


def _slices_of_rows(file: int, total: int, rows: int) -> Iterator[Slice]:
    for start in range(0, total, rows):
        stop = min(start + rows, total)
        yield Slice(file, Span("rows", start, stop), stop - start)


def _named_types(schema: pyarrow.Schema, names: Sequence[str], labels: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the types of columns; ids of labels are replaced by their names, hence texts."""
    import pyarrow

    for name in names:
        kind = schema.field(name).type
        is_text = labels.get(name) is not None or pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind)
        yield name, pyarrow.string() if is_text else kind


def _json_type(value: Any) -> Any:
    import pyarrow

    if value is None:
        return pyarrow.null()
    if isinstance(value, bool):
        return pyarrow.bool_()
    if isinstance(value, Number):
        if not value.lstrip("-").isdecimal():
            return pyarrow.float64()
        return pyarrow.int64() if abs(int(value)) < 2**63 else pyarrow.string()
    if isinstance(value, list) and all(isinstance(item, str) and not isinstance(item, Number) for item in value):
        return pyarrow.list_(pyarrow.string())
    return pyarrow.string()


def _common_type(one: Any, other: Any) -> Any:
    import pyarrow

    if pyarrow.null() in (one, other):
        return other if one == pyarrow.null() else one
    numbers = (pyarrow.int64(), pyarrow.float64())
    return pyarrow.float64() if one in numbers and other in numbers else pyarrow.string()
