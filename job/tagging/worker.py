"""Tag parts: read the rows of a slice, tag their texts, write the part and its seal; in the end join the parts."""

from __future__ import annotations

import hashlib
import json
import logging
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, Any, Protocol

from job.config.validators import is_unicode
from job.dataset.columns import row_text
from job.dataset.readers import Row
from job.dataset.slices import Slice, SlicedData
from job.errors import InvalidInputError
from job.settings import Data
from job.system.events import event
from job.tagging import storage
from job.tagging.formats import encode, join
from job.tagging.plan import RECORDS, SCHEMA_VERSION, SUCCESS, Job, Parts, Seal, carried, open_parts
from job.tagging.progress import Progress
from job.types import TaggedText

log = logging.getLogger(__name__)

NO_TEXT, NOT_UNICODE, NOT_CLOSED, CUT = "no text", "not valid Unicode", "list not closed", "text cut to "
MOST_COMMON = 20
"""Tags in the summary."""


class TextTagger(Protocol):
    """What tags texts: a `Tagger`."""

    def answers(self, texts: Sequence[str]) -> Iterator[tuple[int, TaggedText]]:
        """Yield the position of each text and its answer, batch by batch, in the order of computation."""

    def cut_to(self, text: str) -> int | None:
        """Return the most tokens of a text and its answer if the text does not fit; None if it does."""


def open_data(job: Job) -> SlicedData:
    """Open the input; errors name the setting that it comes from."""
    try:
        return storage.retry_input(lambda: SlicedData(job.data, job.columns))
    except InvalidInputError as error:
        raise _renamed(error) from None


def open_job(job: Job) -> tuple[SlicedData, Parts]:
    """Open the input of a job and its parts, which are planned if no worker has done so.

    Raises InvalidInputError for an input, an output or a joined file that does not fit.
    """
    data = open_data(job)
    try:
        parts = open_parts(job, data)
    except InvalidInputError as error:
        raise _renamed(error) from None
    parts.check_joined()
    return data, parts


def _renamed(error: InvalidInputError) -> InvalidInputError:
    """Return an error of the data chapter with the setting that names the input of tagging."""
    return InvalidInputError(*(p.replace("TAGGER_DATA_DATASET", "TAGGER_TAG_INPUT") for p in error.problems))


def tag_rows(
    rows: Sequence[Row], job: Job, tagger: TextTagger, on_rows: Callable[[int], object] = lambda _: None
) -> list[dict[str, Any]]:
    """Return a row of the output for each row of the input, in order, with its tags or with an error."""
    usable = [usable_text(row, job.data) for row in rows]
    places = [place for place, (_, error) in enumerate(usable) if error is None]
    on_rows(len(rows) - len(places))
    answers: dict[int, TaggedText] = {}
    for number, answer in tagger.answers([usable[place][0] for place in places]):
        answers[places[number]] = answer
        on_rows(1)
    found = []
    for place, (row, (text, error)) in enumerate(zip(rows, usable, strict=True)):
        values = carried(row.values, job.columns)
        if (given := answers.get(place)) is None:
            found.append({**values, "tags": [], "confidences": [], "error": error})
            continue
        limit = tagger.cut_to(text)
        problems = [f"{CUT}{limit} tokens"] if limit is not None else []
        problems += [] if given.well_formed else [NOT_CLOSED]
        error = "; ".join(problems) or None
        found.append({**values, "tags": list(given.tags), "confidences": list(given.confidences), "error": error})
    return found


def usable_text(row: Row, settings: Data) -> tuple[str, str | None]:
    """Return the text of a row, and why it cannot be tagged, if it cannot."""
    if row.defect is not None:
        return "", row.defect
    try:
        text = row_text(row, settings)
    except InvalidInputError:  # the value is no text
        return "", NO_TEXT
    if not text:
        return "", NO_TEXT
    return (text, None) if is_unicode(text) else ("", NOT_UNICODE)


def read_slice(data: SlicedData, piece: Slice) -> list[Row]:
    """Return the rows of a slice; what object storage fails to send is requested again."""
    if not data.files or data.files[piece.file].system is None:
        return list(data.read(piece))
    return storage.retry(lambda: list(data.read(piece)), f"{data.files[piece.file].name} cannot be read")


def tag_part(parts: Parts, data: SlicedData, part: int, tagger: TextTagger, progress: Progress) -> None:
    """Tag a part, write it, and seal it; a part that is done twice has the same bytes."""
    rows = tag_rows(read_slice(data, parts.plan.parts[part]), parts.job, tagger, progress.add_rows)
    content = encode(rows, parts.job.format, parts.plan.arrow_schema, first=part == 0)
    tally = Tally()
    tally.add(rows)
    digest = hashlib.sha256(content).hexdigest()
    seal = Seal(
        part,
        parts.slice(part),
        len(rows),
        len(content),
        digest,
        dict(parts.job.tagger),
        dict(tally.errors),
        tally.untagged,
        dict(tally.tags),
    )
    try:
        parts.write(seal, content)
    except FileNotFoundError:  # the worker that finished has deleted the temporary file
        if not parts.is_sealed(part):
            raise
    progress.add_part()


@dataclass
class Tally:
    """Counts over rows."""

    rows: int = 0
    untagged: int = 0
    """Rows that could not be tagged."""
    errors: Counter[str] = field(default_factory=Counter)
    """Rows by kind of error."""
    tags: Counter[str] = field(default_factory=Counter)

    def add(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Count rows of the output."""
        for row in rows:
            kinds = (row["error"] or "").split("; ") if row["error"] else []
            self.rows += 1
            self.errors.update(kinds)
            self.untagged += any(kind != NOT_CLOSED and not kind.startswith(CUT) for kind in kinds)
            self.tags.update(row["tags"])

    def add_seal(self, seal: Seal) -> None:
        """Count the rows of a part."""
        self.rows += seal.rows
        self.untagged += seal.untagged
        self.errors.update(seal.errors)
        self.tags.update(seal.tags)

    def check(self, max_errors: float | None) -> None:
        """Raise InvalidInputError when more rows than TAGGER_TAG_MAX_ERRORS could not be tagged."""
        if max_errors is None or self.untagged <= (max_errors if max_errors >= 1 else max_errors * self.rows):
            return
        raise InvalidInputError(
            f"{self.untagged} of {self.rows} rows could not be tagged ({_kinds(self.errors)}), more than "
            f"TAGGER_TAG_MAX_ERRORS={max_errors:g}. Sealed parts are kept: raise it and run the same command again, or "
            "repair the input and add --restart"
        )

    def summary(self) -> dict[str, Any]:
        """Return the counts as JSON types, with the most common tags."""
        common = sorted(self.tags.items(), key=lambda entry: (-entry[1], entry[0]))[:MOST_COMMON]
        return {
            "rows": self.rows,
            "untagged": self.untagged,
            "errors": dict(sorted(self.errors.items())),
            "tags": self.tags.total(),
            "most_common": dict(common),
        }


class Sync(Protocol):
    """Exchanges files with other workers, where a disk does not do so by itself."""

    def __call__(self, *, now: bool) -> object:
        """Send the own files and receive those of others; at once, or when it is worth it."""


def no_sync(*, now: bool) -> None:
    """Do nothing: the folder shows what other workers write."""


def work(
    job: Job,
    load: Callable[[], TextTagger],
    progress: Progress,
    own: Callable[[int], Iterable[int]] = range,
    sync: Sync = no_sync,
) -> Parts:
    """Tag this worker's parts that are not sealed, then help with those of others, until all are sealed.

    `own` returns the worker's parts of a number of parts. The model is only loaded if there is something to do.
    Raises InvalidInputError for an input, an output or a seal that does not fit.
    """
    data, parts = open_job(job)
    mine = set(own(len(parts)))
    tagger: TextTagger | None = None
    while todo := unsealed(parts, sync):
        chosen = [part for part in todo if part in mine]
        if tagger is None:
            start_progress(progress, parts, chosen or todo)
            tagger = load()
        if not chosen:
            log.info("tag: helping with %d parts that other workers have not sealed yet", len(todo))
            chosen = random.Random(str(sorted(mine))).sample(todo, len(todo))  # not in the order of other helpers
        for part in chosen:
            if not parts.is_sealed(part):
                tag_part(parts, data, part, tagger, progress)
                sync(now=False)
        mine = set()
    progress.close()
    check_unchanged(parts, data)
    return parts


def check_unchanged(parts: Parts, data: SlicedData) -> None:
    """Raise InvalidInputError when the input has changed since its parts were planned."""
    if (problem := data.difference(parts.plan.fingerprint)) is not None:
        raise InvalidInputError(f"{problem}: TAGGER_TAG_INPUT was changed while it was read. Run again with --restart")


def unsealed(parts: Parts, sync: Sync) -> list[int]:
    """Return the parts that no worker has done yet, as far as this one can see."""
    sync(now=True)
    return parts.unsealed()


def start_progress(progress: Progress, parts: Parts, chosen: Sequence[int]) -> None:
    """Begin to count the rows of some parts."""
    known = [parts.plan.parts[part].rows for part in chosen]
    progress.start(len(chosen), None if None in known else sum(rows or 0 for rows in known))
    fields = {"parts": len(chosen), "parts_total": len(parts), "output": parts.job.output}
    line = "tag: %d of %d parts to do, into %s"
    log.info(line, *fields.values(), extra=event("tag_started", **fields))


class _TornPartError(Exception):
    """A part is not what its seal says; it has been unsealed."""


def finish(parts: Parts, max_errors: float | None, *, verify: bool = True) -> dict[str, Any] | None:
    """Verify all parts, join them where one file is wanted, and write _SUCCESS.json; return its content.

    Without `verify`, parts that another worker has verified are not read again.
    Returns None when a part was torn, which then has no seal any more. Any number of workers may do this.
    Raises InvalidInputError when more rows than TAGGER_TAG_MAX_ERRORS could not be tagged.
    """
    success = parts.success()
    if success is not None and (not verify or parts.is_joined()):
        clean(parts)  # the worker that joined them may have been killed while it deleted them
        return success
    tally = Tally()
    try:
        if parts.job.is_folder:
            for _ in _verified(parts, tally):
                pass
            output = {}
        else:
            output = _join(parts, tally, max_errors)
    except _TornPartError:
        return parts.success() if parts.is_joined() else None
    tally.check(max_errors)
    success = {"schema_version": SCHEMA_VERSION, "parts": len(parts), **tally.summary(), **output}
    success |= {"tagger": dict(parts.job.tagger), "input": list(parts.plan.fingerprint)}
    storage.write(parts.folder, SUCCESS, json.dumps(success, ensure_ascii=False, indent=1).encode() + b"\n")
    clean(parts)
    return success


def _verified(parts: Parts, tally: Tally) -> Iterator[bytes]:
    """Yield the content of each part, and count its rows; raises _TornPartError."""
    for part in range(len(parts)):
        seal = parts.seal(part)
        content = None if seal is None else parts.folder.read(parts.file(part))
        if seal is None or content is None or hashlib.sha256(content).hexdigest() != seal.sha256:
            parts.unseal(part)
            raise _TornPartError
        tally.add_seal(seal)
        yield content


def _join(parts: Parts, tally: Tally, max_errors: float | None) -> dict[str, Any]:
    """Write the one file; return its size and SHA-256."""
    folder, name = storage.open_parent(parts.job.output)
    with folder.writer(name) as stream:
        hashing = _HashingStream(stream)
        join(_verified(parts, tally), parts.job.format, parts.plan.arrow_schema, hashing)
        tally.check(max_errors)
    return {"bytes": hashing.bytes, "sha256": hashing.digest.hexdigest()}


class _HashingStream:
    """A stream that computes the SHA-256 of what is written."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self.digest = hashlib.sha256()
        self.bytes = 0

    def write(self, content: Any) -> int:
        self.digest.update(content)
        self.bytes += len(content)
        return self._stream.write(content)

    def tell(self) -> int:
        return self.bytes


def _kinds(errors: Mapping[str, int]) -> str:
    return ", ".join(f"{kind}: {rows:,}" for kind, rows in sorted(errors.items(), key=lambda entry: (-entry[1], entry)))


def clean(parts: Parts) -> None:
    """Delete what killed workers have left, and the parts of a file that is complete."""
    for name in parts.folder.list():
        is_part = name.startswith(("part-", f"{RECORDS}/part-"))
        if name.endswith(".tmp") or (is_part and not parts.job.is_folder):
            parts.folder.delete(name)


def describe(success: Mapping[str, Any]) -> list[str]:
    """Return the lines that summarize all parts."""
    rows = success["rows"]
    errors = _kinds(success["errors"]) or "none"
    common = ", ".join(f"{tag} {count:,}" for tag, count in success["most_common"].items()) or "none"
    return [
        f"rows: {rows:,}, {success['tags'] / max(1, rows):.2f} tags a row",
        f"errors: {errors}",
        f"most common tags: {common}",
    ]
