"""How answers are decoded: from which tags, from which confidence on. An adapter brings it along."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from job.errors import InvalidInputError
from job.hub import client as hub
from job.settings import Sample
from job.types import Example

log = logging.getLogger(__name__)

CONFIG_NAME = "tagger.json"
SCHEMA_VERSION = 1
DEFAULT_MAX_TAGS = 20
"""Tags of an answer, if nothing else is said."""


@dataclass(frozen=True)
class DecodingConfig:
    """The knobs of TAGGER_SAMPLE_ that belong to an adapter, and the tags that it knows."""

    decoding: Literal["greedy", "marginal"]
    vocabulary: Literal["open", "closed"]
    """Whether an answer may hold other tags than these."""
    tags: tuple[str, ...]
    """Those that were trained on, the most frequent first, or those of a file."""
    threshold: float
    max_tags: int
    max_positions: int = DEFAULT_MAX_TAGS
    """With `likely`: of a list, those that are looked at."""

    def save(self, folder: Path) -> None:
        """Write it into an adapter's folder."""
        text = json.dumps({"schema_version": SCHEMA_VERSION, **asdict(self)}, ensure_ascii=False, indent=1)
        (folder / CONFIG_NAME).write_text(text + "\n", encoding="utf-8")


def initial_config(settings: Sample, train: Sequence[Example]) -> DecodingConfig:
    """What the settings say of an adapter that is trained on these; a threshold that is `auto` is 0 for now."""
    counts = Counter(tag for example in train for tag in example.tags)
    seen = tuple(tag for tag, _ in counts.most_common())
    return with_overrides(settings, DecodingConfig("greedy", "open", seen, 0.0, DEFAULT_MAX_TAGS))


def load_config(settings: Sample, adapter: Path | str, revision: str | None = None) -> DecodingConfig:
    """What the file of an adapter, in a folder or a Hub repo, says where the settings say nothing else.

    An adapter without the file knows no tags. Raises InvalidInputError when it cannot be read, or the settings
    want tags that it does not have.
    """
    own = DecodingConfig("greedy", "open", (), 0.0, DEFAULT_MAX_TAGS)
    try:
        found = _local_config(adapter) if isinstance(adapter, Path) else _published_config(adapter, revision)
        if found is not None:
            if found["schema_version"] != SCHEMA_VERSION:
                raise ValueError(f"its schema version is {found['schema_version']}, and this job's {SCHEMA_VERSION}")
            found = {"max_positions": 1} | found  # all there was before the file had this
            knobs = ("decoding", "threshold", "max_tags", "max_positions")
            looked_at = Sample(**{name: found[name] for name in knobs}).model_dump(include=set(knobs))
            if None in looked_at.values():
                raise ValueError("a value is missing")
            own = DecodingConfig(vocabulary=found["vocabulary"], tags=tuple(found["tags"]), **looked_at)
            texts = isinstance(found["tags"], list) and all(isinstance(tag, str) for tag in own.tags)
            if own.vocabulary not in ("open", "closed") or found["threshold"] == "auto" or not texts:
                raise ValueError("its vocabulary is not open or closed, its threshold no number, or a tag no text")
    except (hub.HubFileError, OSError, KeyError, TypeError, ValueError) as error:
        raise InvalidInputError(
            f"{CONFIG_NAME} of the adapter in {adapter} cannot be read: {error}; train it again, or remove the file"
        ) from error
    if settings.threshold == "auto":  # which was found when it was trained
        settings = settings.model_copy(update={"threshold": None})
    chosen = with_overrides(settings, own)
    if chosen.vocabulary == "closed" and not chosen.tags:
        raise InvalidInputError(
            f"the adapter in {adapter} has no {CONFIG_NAME} with the tags it was trained on; "
            "set TAGGER_SAMPLE_VOCABULARY to a file with one tag a line, or to open"
        )
    if chosen.decoding == "marginal" and chosen.vocabulary == "open":
        raise InvalidInputError(
            f"the adapter in {adapter} is decoded by how likely each tag is, of a vocabulary that is open here; "
            "set TAGGER_SAMPLE_VOCABULARY to seen or to a file of tags, or TAGGER_SAMPLE_DECODING=greedy"
        )
    return chosen


def _published_config(repo: str, revision: str | None) -> dict[str, Any] | None:
    try:
        return hub.published_json(repo, revision, CONFIG_NAME)
    except hub.HubFileError:
        if not hub.is_offline():
            raise
        log.warning("sample: %s of %s is not in the cache, so its answers are lists of any tags", CONFIG_NAME, repo)
        return None


def _local_config(folder: Path) -> dict[str, Any] | None:
    file = folder / CONFIG_NAME
    found: dict[str, Any] | None = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    return found


def with_overrides(settings: Sample, otherwise: DecodingConfig) -> DecodingConfig:
    given: dict[str, Any] = {
        "decoding": settings.decoding,
        "threshold": 0.0 if settings.threshold == "auto" else settings.threshold,
        "max_tags": settings.max_tags,
        "max_positions": settings.max_positions,
    }
    if settings.vocabulary is not None:
        given["vocabulary"] = "open" if settings.vocabulary == "open" else "closed"
        given["tags"] = read_vocabulary_file(settings)
    elif settings.decoding == "marginal":
        given["vocabulary"] = "closed"
    return replace(otherwise, **{name: value for name, value in given.items() if value is not None})


def read_vocabulary_file(settings: Sample) -> tuple[str, ...] | None:
    """Return the tags of a vocabulary file, one a line, each once; None without a file.

    Raises InvalidInputError when the file has no tags.
    """
    if settings.vocabulary in (None, "open", "seen"):
        return None
    file = Path(settings.vocabulary)
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInputError(
            f"TAGGER_SAMPLE_VOCABULARY={file} cannot be read ({error}); expected open, seen, or a UTF-8 file with one "
            "tag a line"
        ) from error
    tags = tuple(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not tags:
        raise InvalidInputError(f"TAGGER_SAMPLE_VOCABULARY={file} has no tags; expected one a line")
    return tags
