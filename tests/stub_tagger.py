"""A tagger without a model, for tests of what is around it: its answers depend on the text alone."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from job.settings import Data
from job.tagging.plan import Job
from job.tagging.progress import Progress
from job.tagging.shards import Shard
from job.tagging.worker import finish, work
from job.types import TaggedText

MAX_LENGTH = 512


class StubTagger:
    """Tags a text by its digest; a text with the word `open` is not closed, and one with `long` is cut."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.texts: list[str] = []
        self._seconds = seconds

    def answers(self, texts: Sequence[str]) -> Iterator[tuple[int, TaggedText]]:
        for number in sorted(range(len(texts)), key=lambda i: -len(texts[i])):
            text = texts[number]
            self.texts.append(text)
            time.sleep(self._seconds)
            digest = hashlib.sha256(text.encode()).digest()
            tags = tuple(f"tag {value % 7}" for value in dict.fromkeys(value % 7 for value in digest[:3]))
            confidences = tuple(round(digest[3 + i] / 256, 4) for i in range(len(tags)))
            yield number, TaggedText(text, text, str(list(tags)), tags, "open" not in text, confidences)

    def cut_to(self, text: str) -> int | None:
        return MAX_LENGTH if "long" in text else None


def job(given: Path | str, output: Path | str, *, rows: int = 10, **changes: Any) -> Job:
    values: dict[str, Any] = {"columns": None, "tagger": {"adapter": "ada/tagger@1", "threshold": 0.3}, **changes}
    data = Data(dataset=str(given), text_column=values.pop("text_column", "quote"))
    return Job(data, values.pop("columns"), str(output), rows, **values)


def tag(what: Job, shard: str = "0/1", seconds: float = 0.0, max_errors: float | None = None) -> dict[str, Any]:
    """Do the share of one worker, and what is left of others; return the content of _SUCCESS.json."""
    index, _, count = shard.partition("/")
    while True:
        parts = work(what, lambda: StubTagger(seconds), Progress(), Shard(int(index), int(count)).own)
        if (success := finish(parts, max_errors)) is not None:
            return success
