"""Read the rows of a data set from JSON lines, CSV, Parquet, or the Hub."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from job.errors import InvalidInputError
from job.hub import client as hub
from job.settings import Data
from job.system.paths import DATA_SUFFIXES, is_local, local_path


def read_rows(settings: Data) -> Iterator[dict[str, Any]]:
    """Read all rows of the data set, as dicts from column to value.

    Raises InvalidInputError when the data set cannot be read, or lacks the column of texts or of tags.
    """
    if is_local(settings.dataset, DATA_SUFFIXES):
        rows = _file_rows(local_path(settings.dataset, "TAGGER_DATA_DATASET"))
    else:
        rows = _hub_rows(settings)
    columns = list(dict.fromkeys(column for row in rows for column in row))
    for variable, column in (("TEXT", settings.text_column), ("TAGS", settings.tags_column)):
        if rows and column not in columns:
            raise InvalidInputError(
                f"{settings.dataset} has no column {column!r}; it has {', '.join(map(str, columns))}. "
                f"Set TAGGER_DATA_{variable}_COLUMN"
            )
    return iter(rows)


def _file_rows(path: Path) -> list[dict[str, Any]]:
    readers = {".jsonl": _jsonl_rows, ".csv": _csv_rows, ".parquet": _parquet_rows}
    if path.suffix.lower() not in readers or not path.is_file():
        raise InvalidInputError(f"{path} is not a data file; expected one that ends in {', '.join(DATA_SUFFIXES)}")
    try:
        return readers[path.suffix.lower()](path)
    except UnicodeDecodeError as error:
        raise InvalidInputError(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    except OSError as error:
        raise InvalidInputError(
            f"{path} cannot be read: {error.strerror or error}; expected a readable file"
        ) from error


def _jsonl_rows(path: Path) -> list[dict[str, Any]]:
    rows = []
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise InvalidInputError(
                    f"{path} line {number} is not JSON ({error}); expected one object per line. Fix or remove the line"
                ) from error
            if not isinstance(row, dict):
                raise InvalidInputError(
                    f"{path} line {number} is a JSON {type(row).__name__}; expected an object such as "
                    '{"quote": "...", "tags": ["..."]}'
                )
            rows.append(row)
    return rows


def _csv_rows(path: Path) -> list[dict[str, Any]]:
    csv.field_size_limit(2**31 - 1)  # the default limit of 128 KiB refuses long texts
    with path.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.reader(lines, strict=True)
        try:
            columns = next(reader, [])
            if len(set(columns)) < len(columns):
                raise InvalidInputError(f"{path} has two columns of the same name: {', '.join(columns)}; rename one")
            rows = []
            for row in reader:
                if row and len(row) != len(columns):
                    raise InvalidInputError(
                        f"{path} line {reader.line_num} has {len(row)} fields and the first line has {len(columns)}; "
                        "put quotes around a field that contains a comma"
                    )
                rows += [dict(zip(columns, row, strict=True))] if row else []
        except csv.Error as error:
            raise InvalidInputError(f"{path} line {reader.line_num} is not CSV ({error}); fix the line") from error
    return rows


def _parquet_rows(path: Path) -> list[dict[str, Any]]:
    import pyarrow
    from pyarrow import parquet

    try:
        rows: list[dict[str, Any]] = parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, ValueError) as error:
        raise InvalidInputError(f"{path} is not a Parquet file ({error}); write the file again") from error
    return rows


def _hub_rows(settings: Data) -> list[dict[str, Any]]:
    import datasets
    from huggingface_hub.errors import HfHubHTTPError

    try:
        loaded = datasets.load_dataset(
            settings.dataset, split=settings.split, revision=settings.revision, token=hub.token() or False
        )
    except (OSError, ValueError, HfHubHTTPError, datasets.exceptions.DatasetsError) as error:
        at = f" at revision {settings.revision}" if settings.revision else ""
        raise InvalidInputError(
            f"data set {settings.dataset}{at}, split {settings.split}, cannot be read from the Hub: {error} "
            "Check TAGGER_DATA_DATASET, _REVISION and _SPLIT, the network, and that HF_TOKEN may read it"
        ) from error
    rows: list[dict[str, Any]] = loaded.to_list()
    return rows
