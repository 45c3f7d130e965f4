"""Tag a stream: rows come from standard input or a file, and each answer leaves as soon as its batch is done."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from itertools import islice
from typing import IO

from job.dataset.columns import text_columns
from job.dataset.readers import NOT_JSON, Row, parse_json
from job.dataset.slices import SlicedData
from job.tagging.formats import json_line
from job.tagging.plan import Job
from job.tagging.worker import Tally, TextTagger, read_slice, tag_rows

_END = object()


def tag_stream(batches: Iterator[list[Row]], job: Job, tagger: TextTagger, to: IO[bytes]) -> Tally:
    """Write a line of JSON for each row, in order; return what was written."""
    tally = Tally()
    for rows in batches:
        found = tag_rows(rows, job, tagger)
        for row in found:
            to.write(json_line(row))
        to.flush()
        tally.add(found)
    return tally


def batches_of_data(data: SlicedData, part_rows: int, rows: int) -> Iterator[list[Row]]:
    """Yield the rows of files in batches."""
    found = (row for piece in data.slices(part_rows) for row in read_slice(data, piece))
    while batch := list(islice(found, rows)):
        yield batch


def batches_of_lines(lines: IO[bytes], job: Job, rows: int) -> Iterator[list[Row]]:
    """Yield lines as rows in batches of at most `rows`: what has come so far, without waiting for more.

    If the first line begins an object, each line is one of JSON; if not, each line is a text.
    """
    waiting: queue.Queue[object] = queue.Queue(maxsize=4 * rows)

    def read() -> None:
        for line in lines:
            waiting.put(line)
        waiting.put(_END)

    threading.Thread(target=read, daemon=True).start()
    column, is_json, number = text_columns(job.data)[0], None, 0
    while True:
        batch: list[Row] = []
        while len(batch) < rows:
            try:
                line = waiting.get(block=not batch)
            except queue.Empty:
                break
            if line is _END:
                if batch:
                    yield batch
                return
            assert isinstance(line, bytes)
            number += 1
            text = line.decode("utf-8", "surrogateescape").removeprefix("\ufeff" if number == 1 else "").rstrip("\r\n")
            if not text.strip() and is_json is not False:  # between objects; between texts it is an empty one
                continue
            is_json = text.lstrip().startswith("{") if is_json is None else is_json
            batch.append(_row(f"line {number}", text, column, is_json=is_json))
        yield batch


def _row(place: str, text: str, column: str, *, is_json: bool) -> Row:
    if not is_json:
        return Row(place, {column: text})
    try:
        values = parse_json(text)
    except (ValueError, RecursionError):
        values = None
    return Row(place, values) if isinstance(values, dict) else Row(place, {}, NOT_JSON)
