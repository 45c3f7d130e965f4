"""What scores tags without generating: the tag head and TF-IDF, as files of an adapter."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import httpx2

from job.decoding.head import HEAD_NAME, TagHead
from job.decoding.tfidf import TFIDF_NAME, Tfidf
from job.errors import InvalidInputError
from job.hub import client as hub
from job.hub.weights import LOAD_ERRORS
from job.types import MIN_PROBABILITY

if TYPE_CHECKING:
    import torch

    from job.decoding.config import DecodingConfig


@dataclass(frozen=True)
class Scorers:
    """The scorers that an adapter has, or that its decoding needs."""

    head: TagHead | None = None
    tfidf: Tfidf | None = None

    def files(self) -> dict[str, bytes]:
        """Return the content of each scorer's file, by name."""
        found = {HEAD_NAME: self.head, TFIDF_NAME: self.tfidf}
        return {name: scorer.to_bytes() for name, scorer in found.items() if scorer is not None}

    def save(self, folder: Path) -> None:
        """Write the files into a folder."""
        for name, content in self.files().items():
            (folder / name).write_bytes(content)

    @classmethod
    def load(cls, files: Mapping[str, Path]) -> Scorers:
        """Read the files with these names; raises OSError, SafetensorError or ValueError."""
        head = TagHead.load(files[HEAD_NAME]) if HEAD_NAME in files else None
        return cls(head, Tfidf.load(files[TFIDF_NAME]) if TFIDF_NAME in files else None)

    @classmethod
    def from_folder(cls, folder: Path) -> Scorers:
        """Read the files that a folder has."""
        return cls.load({name: folder / name for name in (HEAD_NAME, TFIDF_NAME) if (folder / name).is_file()})

    @classmethod
    def from_bytes(cls, files: Mapping[str, bytes]) -> Scorers:
        """Return the scorers of `files`, from another process of this job."""
        with tempfile.TemporaryDirectory(prefix="tagger-") as folder:
            for name, content in files.items():
                Path(folder, name).write_bytes(content)
            return cls.from_folder(Path(folder))

    @property
    def tags(self) -> set[str]:
        """Return the tags that some scorer knows."""
        return {tag for scorer in (self.head, self.tfidf) if scorer is not None for tag in scorer.tags}


def confidences(tags: Sequence[str], probabilities: torch.Tensor, allowed: set[str]) -> list[dict[str, float]]:
    """Return for each row the allowed tags with at least MIN_PROBABILITY; `probabilities` are [texts, tags]."""
    columns = [column for column, tag in enumerate(tags) if tag in allowed]
    names = [tags[column] for column in columns]
    return [
        {tag: value for tag, value in zip(names, row, strict=True) if value >= MIN_PROBABILITY}
        for row in probabilities[:, columns].tolist()
    ]


def load_scorers(
    decoding: DecodingConfig, saved_tags: Sequence[str], source: Path | str, revision: str | None
) -> Scorers:
    """Return the scorers of an adapter that its answers need.

    Raises InvalidInputError when one is absent or damaged, or has other tags than the adapter was saved with.
    """
    from job.decoding.config import describe_read_error

    names = [name for part, name in (("head", HEAD_NAME), ("tfidf", TFIDF_NAME)) if part in decoding.parts]
    files = {}
    for name in names:
        try:
            files[name] = source / name if isinstance(source, Path) else hub.download(source, revision, name)
            scorers = Scorers.load({name: files[name]})
        except (*LOAD_ERRORS, httpx2.HTTPError) as error:
            raise InvalidInputError(
                f"{name} of the adapter in {source} cannot be read ({describe_read_error(error)}); train the adapter "
                "again, or set TAGGER_SAMPLE_DECODING to greedy or marginal"
            ) from error
        if others := scorers.tags - set(saved_tags):
            raise InvalidInputError(
                f"{name} of the adapter in {source} has {len(others)} tags that its tagger.json does not have, such as "
                f"{min(others)!r}: they belong to different adapters. Train or fetch the adapter again"
            )
    found = Scorers.load(files)
    if names and not found.tags & set(decoding.tags):
        raise InvalidInputError(
            f"{names[0]} of the adapter in {source} knows no tag of the vocabulary; set TAGGER_SAMPLE_VOCABULARY to "
            "seen, or to a file with some tags that the adapter was trained on"
        )
    return found
