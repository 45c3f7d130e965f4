"""Load the data set: read rows, keep the usable ones, merge equal texts, split them."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from job.config.validators import is_unicode
from job.dataset.columns import row_tags, row_text, text_columns, used_columns
from job.dataset.readers import Row, check_columns
from job.dataset.rows import read_rows
from job.dataset.split import split, split_from
from job.dataset.tags import common_spellings
from job.errors import InvalidInputError
from job.settings import Data, Sample
from job.types import DataReport, Example, SkippedRows, SplitData


def load(settings: Data) -> SplitData:
    """Read the data set, leave out rows that cannot be used, merge equal texts, and hold examples out.

    Raises InvalidInputError when it cannot be read, lacks a column, has a cell that is no text or no tags, or has more
    unusable rows than TAGGER_DATA_MAX_SKIPPED.
    """
    read = _Reading(settings)
    examples = read.examples(read_rows(settings))
    own = _evaluation_settings(settings)
    read_too, evaluation = _evaluation_examples(own) if own else (_Reading(settings), [])
    spelling = common_spellings(Counter(tag for example in (*examples, *evaluation) for tag in example.tags))
    respelled = tuple((tag, common) for tag, common in spelling.items() if tag != common)
    if respelled:
        examples, evaluation = (_with_common_spellings(part, spelling) for part in (examples, evaluation))
    train, held_out = split_from(examples, evaluation) if own else split(examples, settings)
    left_out = len(examples) - len(train) - (0 if own else len(held_out))
    skipped = (*read.skipped.values(), *read_too.skipped.values())
    report = DataReport(read.rows + read_too.rows, skipped, read.merged + read_too.merged, left_out, respelled)
    return SplitData(tuple(train), tuple(held_out), fingerprint(train, held_out), report=report)


def _evaluation_settings(settings: Data) -> Data | None:
    """Return the settings that read the evaluation data; None when it is a part of the training data."""
    if settings.eval_dataset is None and settings.eval_split is None:
        return None
    dataset = settings.eval_dataset or settings.dataset
    update = {"dataset": dataset, "split": settings.eval_split, "limit": None}
    if settings.eval_dataset is not None:
        update |= {"config": None, "revision": None}
    return settings.model_copy(update=update)


def _evaluation_examples(own: Data) -> tuple[_Reading, list[Example]]:
    """Read the evaluation data; errors name the settings that they come from."""
    read = _Reading(own)
    try:
        return read, read.examples(read_rows(own))
    except InvalidInputError as error:
        message = str(error)
        for name in ("DATASET", "SPLIT"):
            message = message.replace(f"TAGGER_DATA_{name}", f"TAGGER_DATA_EVAL_{name}")
        raise InvalidInputError(message) from None


@dataclass
class _Reading:
    """The rows read so far: how many there were, and why some were left out."""

    settings: Data
    rows: int = 0
    merged: int = 0
    skipped: dict[str, SkippedRows] = field(default_factory=dict)
    columns: dict[str, None] = field(default_factory=dict)
    """Names of columns that rows had; of JSON the only place where they stand."""

    def examples(self, rows: Iterable[Row]) -> list[Example]:
        """Return one example for each different text, with the tags of all its rows."""
        settings, used = self.settings, 0
        found: dict[str, tuple[str, ...]] = {}
        for row in rows:
            self.rows += 1
            self.columns.update(dict.fromkeys(row.values))
            text, tags = row_text(row, settings), row_tags(row, settings)
            if reason := _unusable(text, tags):
                first = self.skipped.get(reason, SkippedRows(reason, 0, row.place))
                self.skipped[reason] = replace(first, rows=first.rows + 1)
                continue
            self.merged += text in found
            found[text] = tuple(dict.fromkeys((*found.get(text, ()), *tags)))
            used += 1
            if used == settings.limit:
                break
        if self.rows == 0:
            raise InvalidInputError(f"{settings.dataset} has no rows; expected at least two examples")
        check_columns(settings.dataset, self.columns, used_columns(settings))
        self._check_skipped()
        if not found:
            raise InvalidInputError(f"{settings.dataset} has no row with a text and tags; expected some")
        return [Example(text, tags) for text, tags in found.items()]

    def _check_skipped(self) -> None:
        skipped = sum(entry.rows for entry in self.skipped.values())
        if skipped / self.rows > self.settings.max_skipped:
            reasons = "; ".join(
                f"{entry.rows} with {entry.reason}, first {entry.first}" for entry in self.skipped.values()
            )
            columns = ", ".join(map(repr, text_columns(self.settings)))
            raise InvalidInputError(
                f"{skipped} of {self.rows} rows of {self.settings.dataset} cannot be used: {reasons} (text from "
                f"{columns}, tags from {self.settings.tags_column!r}). Repair the data, set the columns, or raise "
                f"TAGGER_DATA_MAX_SKIPPED={self.settings.max_skipped:g}"
            )


def _unusable(text: str, tags: Sequence[str]) -> str | None:
    """Return why a row is left out; None if it is not."""
    if not text:
        return "no text"
    if not tags:
        return "no tags"
    return None if all(map(is_unicode, (text, *tags))) else "text that is not valid Unicode"


def _with_common_spellings(examples: Sequence[Example], spelling: Mapping[str, str]) -> list[Example]:
    """Write each tag by its common spelling, once in an example."""
    return [replace(example, tags=tuple(dict.fromkeys(spelling[tag] for tag in example.tags))) for example in examples]


def fingerprint(train: Sequence[Example], held_out: Sequence[Example]) -> str:
    """Return the SHA-256 of texts and tags, in order."""
    digest = hashlib.sha256()
    for part in (train, held_out):
        for example in part:
            digest.update(json.dumps([example.text, example.tags]).encode())
        digest.update(b"\0")
    return digest.hexdigest()


def inference_texts(settings: Sample) -> list[str]:
    """Return the texts to tag: the prompts, then the lines of the input file.

    Raises InvalidInputError when the file cannot be read.
    """
    texts = list(settings.prompts)
    if settings.input is not None:
        try:
            lines = settings.input.read_text(encoding="utf-8-sig").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidInputError(
                f"TAGGER_SAMPLE_INPUT={settings.input} cannot be read ({error}); "
                "expected a UTF-8 file with one text per line"
            ) from error
        texts += [line.strip() for line in lines if line.strip()]
    return texts
