"""A stream is answered as it comes: an answer does not wait for rows that have not arrived."""

from __future__ import annotations

import json
import os
import threading
from typing import Any

from stub_tagger import StubTagger, job

from job.tagging.stream import batches_of_lines, tag_stream


def test_an_answer_leaves_before_the_next_row_comes() -> None:
    what = job("-", "-")
    given_reader, given_writer = os.pipe()
    found_reader, found_writer = os.pipe()
    tally: list[Any] = []

    def serve() -> None:
        with os.fdopen(given_reader, "rb") as given, os.fdopen(found_writer, "wb") as found:
            tally.append(tag_stream(batches_of_lines(given, what, 4), what, StubTagger(), found))

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    with os.fdopen(given_writer, "wb") as given, os.fdopen(found_reader, "rb") as found:
        for text in ("one", "two"):  # the second is only sent once the first is answered
            given.write(json.dumps({"quote": text}).encode() + b"\n")
            given.flush()
            assert json.loads(found.readline())["quote"] == text
        texts = [f"text {i}" for i in range(10)]
        given.write("".join(json.dumps({"quote": text}) + "\n" for text in texts).encode())
        given.close()
        assert [json.loads(line)["quote"] for line in found] == texts
    thread.join(10)
    assert tally[0].rows == 12
