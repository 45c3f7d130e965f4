"""Load the data set: read its rows, drop unusable ones, and split the examples."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from job.config.validators import is_unicode
from job.dataset.readers import read_rows
from job.dataset.split import split
from job.dataset.tags import parse_tags_value
from job.errors import InvalidInputError
from job.settings import Data, Sample
from job.types import Example, SplitData


def load(settings: Data) -> SplitData:
    """Read the data set, skip rows without text or tags, and hold out examples for evaluation.

    Raises InvalidInputError when the data set cannot be read, lacks a column, or has too few usable rows.
    """
    rows = read_rows(settings)
    examples: list[Example] = []
    skipped = 0
    for row in rows:
        example = _example(row, settings)
        if example is None:
            skipped += 1
        else:
            examples.append(example)
        if len(examples) == settings.limit:
            break
    if not examples and not skipped:
        raise InvalidInputError(f"{settings.dataset} has no rows; expected at least two examples")
    if skipped > len(examples):
        raise InvalidInputError(
            f"{settings.dataset}: {skipped} of {skipped + len(examples)} rows have no usable text in "
            f"{settings.text_column!r} or no tags in {settings.tags_column!r}; expected most rows to have both. "
            "Set TAGGER_DATA_TEXT_COLUMN and TAGGER_DATA_TAGS_COLUMN, or repair the data"
        )
    train, held_out = split(examples, settings)
    digest = hashlib.sha256(json.dumps([[(e.text, e.tags) for e in part] for part in (train, held_out)]).encode())
    near_duplicates = len(examples) - len(train) - len(held_out)
    return SplitData(tuple(train), tuple(held_out), skipped, digest.hexdigest(), near_duplicates=near_duplicates)


def _example(row: dict[str, Any], settings: Data) -> Example | None:
    text = row.get(settings.text_column)
    tags = parse_tags_value(row.get(settings.tags_column))
    if not isinstance(text, str) or not text.strip() or not tags or not all(map(is_unicode, (text, *tags))):
        return None
    return Example(text.strip(), tags)


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
