"""Decoding configuration (vocabulary, threshold), saved with the adapter as tagger.json."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from job.config.validators import is_unicode
from job.decoding.blend import Blend
from job.errors import InvalidInputError
from job.hub import client as hub
from job.settings import Sample
from job.types import Decoding, Example

log = logging.getLogger(__name__)

CONFIG_NAME = "tagger.json"
DEFAULT_MAX_TAGS = 20
"""Default of both `max_tags` and `max_positions`."""

MAX_KNOWN_TAGS = 200_000
"""The most tags that an adapter may know: a vocabulary is held in memory as a trie."""
MAX_TAG_CHARACTERS = 4096

_Count = Annotated[int, Field(ge=1, le=1000)]


def _usable(tag: str) -> str:
    if not tag.strip() or not is_unicode(tag):
        raise ValueError("a tag is empty, or no text")
    return tag


def _distinct(tags: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(tags)) < len(tags):
        raise ValueError("a tag is listed twice")
    return tags


_Tag = Annotated[str, Field(max_length=MAX_TAG_CHARACTERS), AfterValidator(_usable)]


class DecodingConfig(BaseModel):
    """The settings TAGGER_SAMPLE_* that are saved with an adapter, and the tags that it knows."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1]
    decoding: Decoding
    vocabulary: Literal["open", "closed"]
    """closed: an answer holds only tags from `tags`."""
    tags: Annotated[tuple[_Tag, ...], Field(max_length=MAX_KNOWN_TAGS), AfterValidator(_distinct)]
    """Tags of the training examples, the most frequent first, or the lines of a vocabulary file."""
    threshold: Annotated[float, Field(ge=0, lt=1)]
    """Tags with a lower confidence are left out of the answer."""
    max_tags: _Count
    max_positions: _Count = 1
    """List positions that marginal decoding looks at.

    Files without this field are older than it; their thresholds were calibrated for one position.
    """
    head: Literal["head.safetensors"] | None = None
    """The file with the tag head, if the adapter has one."""
    tfidf: Literal["tfidf.safetensors"] | None = None
    """The file with the TF-IDF part of blends, if the adapter has one."""
    blend: Blend | None = None
    """The weights of the parts of a blend."""

    @property
    def parts(self) -> tuple[str, ...]:
        """Return what computes the probabilities; a part without weight is not computed."""
        parts = tuple(self.decoding.split("+"))
        if self.blend is None or len(parts) == 1:
            return parts
        return tuple(part for part, weight in self.blend.weights.items() if weight) or parts

    @property
    def needs_scorers(self) -> bool:
        """Return whether something has to be fitted after training."""
        return self.decoding not in ("greedy", "marginal")

    @property
    def files(self) -> tuple[str, ...]:
        """Return the files next to tagger.json that belong to it."""
        return tuple(file for file in (self.head, self.tfidf) if file is not None)

    def as_json(self) -> dict[str, Any]:
        """Return the fields as JSON types, without those that are empty and unknown to earlier versions."""
        empty = {name for name in ("head", "tfidf", "blend") if getattr(self, name) is None}
        return self.model_dump(mode="json", exclude=empty)

    def save(self, folder: Path) -> None:
        """Write tagger.json into an adapter's folder."""
        text = json.dumps(self.as_json(), ensure_ascii=False, indent=1)
        (folder / CONFIG_NAME).write_text(text + "\n", encoding="utf-8")


DEFAULT_CONFIG = DecodingConfig(
    schema_version=1,
    decoding="greedy",
    vocabulary="open",
    tags=(),
    threshold=0.0,
    max_tags=DEFAULT_MAX_TAGS,
    max_positions=DEFAULT_MAX_TAGS,
)
"""Decoding of an adapter without tagger.json, and of a new adapter where the settings are empty."""


def initial_config(settings: Sample, train: Sequence[Example]) -> DecodingConfig:
    """Return the configuration for an adapter that is trained on these examples.

    A threshold set to `auto` is 0 until it is calibrated.
    """
    counts = Counter(tag for example in train for tag in example.tags)
    tags = tuple(tag for tag, _ in counts.most_common())
    return with_overrides(settings, DEFAULT_CONFIG.model_copy(update={"tags": tags}))


def check_tags(tags: Iterable[str], advice: str) -> None:
    """Raise InvalidInputError, which ends with the advice, if tagger.json could not hold these tags."""
    distinct = set(tags)
    if len(distinct) > MAX_KNOWN_TAGS:
        raise InvalidInputError(
            f"there are {len(distinct)} different tags; at most {MAX_KNOWN_TAGS} are possible. {advice}"
        )
    if longest := max((tag for tag in distinct if len(tag) > MAX_TAG_CHARACTERS), key=len, default=""):
        raise InvalidInputError(
            f"a tag has {len(longest)} characters ({longest[:40]!r}...); at most {MAX_TAG_CHARACTERS} are possible. "
            f"{advice}"
        )


def load_config(settings: Sample, adapter: Path | str, revision: str | None = None) -> DecodingConfig:
    """Read tagger.json of an adapter, in a folder (a Path) or in a Hub repo, and let the settings override it.

    An adapter without the file has DEFAULT_CONFIG, which knows no tags. Raises InvalidInputError when the file cannot
    be read or is not valid, or when the settings need a vocabulary that the adapter does not have.
    """
    saved = saved_config(adapter, revision)
    if settings.threshold == "auto":  # calibrated in training, and saved
        settings = settings.model_copy(update={"threshold": None})
    config = with_overrides(settings, saved)
    _check_vocabulary(config, adapter)
    return config


def saved_config(adapter: Path | str, revision: str | None) -> DecodingConfig:
    """Read tagger.json of an adapter; raises InvalidInputError when it cannot be read or is not valid."""
    try:
        saved = _local_config(adapter) if isinstance(adapter, Path) else _published_config(adapter, revision)
    except (hub.HubFileError, OSError, ValueError) as error:
        raise InvalidInputError(
            f"{CONFIG_NAME} of the adapter in {adapter} cannot be read ({describe_read_error(error)}); train the "
            "adapter again, or remove the file"
        ) from error
    return DEFAULT_CONFIG if saved is None else saved


def _local_config(folder: Path) -> DecodingConfig | None:
    file = folder / CONFIG_NAME
    return DecodingConfig.model_validate(hub.read_json(file)) if file.is_file() else None


def _published_config(repo: str, revision: str | None) -> DecodingConfig | None:
    try:
        found = hub.published_json(repo, revision, CONFIG_NAME)
    except hub.HubFileError:
        if not hub.is_offline():
            raise
        log.warning(
            "sample: %s of %s is not in the cache; decoding is greedy, with an open vocabulary", CONFIG_NAME, repo
        )
        return None
    return None if found is None else DecodingConfig.model_validate(found)


def describe_read_error(error: Exception) -> str:
    """Return the message of an error; for a file with invalid fields each field with what was expected."""
    if not isinstance(error, ValidationError):
        return hub.error_message(error)
    problems = [(".".join(map(str, detail["loc"])), detail["msg"]) for detail in error.errors(include_url=False)]
    return ", ".join(f"{field}: {message[0].lower()}{message[1:]}" if field else message for field, message in problems)


def _check_vocabulary(config: DecodingConfig, adapter: Path | str) -> None:
    if config.vocabulary == "closed" and not config.tags:
        raise InvalidInputError(
            f"the adapter in {adapter} has no {CONFIG_NAME} with the tags it was trained on; "
            "set TAGGER_SAMPLE_VOCABULARY to a file with one tag a line, or to open"
        )
    if config.decoding != "greedy" and config.vocabulary == "open":
        raise InvalidInputError(
            f"the adapter in {adapter} has {config.decoding} decoding, which needs a closed vocabulary, and "
            "TAGGER_SAMPLE_VOCABULARY is open; set TAGGER_SAMPLE_VOCABULARY to seen or to a file of tags, or "
            "TAGGER_SAMPLE_DECODING=greedy"
        )
    parts = config.decoding.split("+")
    for part, file in (("head", config.head), ("tfidf", config.tfidf)):
        if part in parts and file is None:
            raise InvalidInputError(
                f"the adapter in {adapter} has no {part}.safetensors, which TAGGER_SAMPLE_DECODING={config.decoding} "
                "needs; train with this setting, or set it to greedy or marginal"
            )
    if len(parts) > 1 and (config.blend is None or config.blend.weights.keys() != set(parts)):
        known = "no blend" if config.blend is None else "+".join(config.blend.weights)
        raise InvalidInputError(
            f"the adapter in {adapter} has no weights for TAGGER_SAMPLE_DECODING={config.decoding}: it was calibrated "
            f"for {known}. Train with this setting, or set it to what the adapter has or to a single part"
        )


def with_overrides(settings: Sample, config: DecodingConfig) -> DecodingConfig:
    """Return a configuration with the values that are set in the settings; a threshold set to `auto` is 0.

    Raises InvalidInputError when a vocabulary file cannot be read.
    """
    overrides: dict[str, Any] = {
        "decoding": settings.decoding,
        "threshold": 0.0 if settings.threshold == "auto" else settings.threshold,
        "max_tags": settings.max_tags,
        "max_positions": settings.max_positions,
    }
    if settings.vocabulary is not None:
        overrides["vocabulary"] = "open" if settings.vocabulary == "open" else "closed"
        overrides["tags"] = read_vocabulary_file(settings)
    elif settings.decoding not in (None, "greedy"):
        overrides["vocabulary"] = "closed"
    return config.model_copy(update={name: value for name, value in overrides.items() if value is not None})


def read_vocabulary_file(settings: Sample) -> tuple[str, ...] | None:
    """Return the tags of a vocabulary file, one a line, without duplicates; None without a file.

    Raises InvalidInputError when the file cannot be read or has no tags.
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
    check_tags(tags, f"Shorten TAGGER_SAMPLE_VOCABULARY={file}")
    return tags
