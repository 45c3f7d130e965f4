"""The parts of a job: the plan in parts.json, the sealed parts, and what an earlier worker must have agreed on."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from job.dataset.cells import CellError
from job.dataset.columns import select
from job.dataset.readers import Span
from job.dataset.slices import Slice, SlicedData
from job.errors import InvalidInputError
from job.settings import Data
from job.tagging import storage
from job.tagging.formats import (
    OWN_COLUMNS,
    Format,
    format_of,
    output_schema,
    pack_schema,
    refuse_unknown,
    unpack_schema,
)
from job.tagging.storage import Folder

if TYPE_CHECKING:
    import pyarrow

log = logging.getLogger(__name__)

SCHEMA_VERSION = 1
READERS = 16
"""Seals that are read at the same time."""
RECORDS = "_parts"
"""The folder of the plan and the seals, among the parts; readers of data leave it out."""
PLAN = f"{RECORDS}/parts.json"
SUCCESS = "_SUCCESS.json"
RESTARTED = b"{}\n"
"""A plan that is to be replaced; it says that the folder, and a file next to it, are of this job."""


@dataclass(frozen=True)
class Job:
    """What is to be tagged, and where the answers go; the same for all workers."""

    data: Data
    """Names the input (`dataset`) and its text columns."""
    columns: tuple[str, ...] | None
    """Columns of the input that are carried along; None for all."""
    output: str
    """A file, or a folder if it ends in a slash."""
    part_rows: int
    tagger: Mapping[str, Any] = field(default_factory=dict)
    """What the answers depend on: adapter, base model, decoding."""

    def as_json(self) -> dict[str, Any]:
        """Return the job as JSON types."""
        return {**vars(self), "data": self.data.model_dump(mode="json")}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Job:
        """Return the job that `as_json` has described."""
        columns = values["columns"]
        return cls(
            **{
                **values,
                "data": Data.model_validate(values["data"]),
                "columns": None if columns is None else tuple(columns),
            }
        )

    @property
    def is_folder(self) -> bool:
        return self.output.endswith("/")

    @property
    def format(self) -> Format:
        """The format of the answers; in a folder whose name has no such end, JSON lines."""
        found = format_of(self.output) or (Format(".jsonl") if self.is_folder else None)
        if found is None:
            raise refuse_unknown(self.output, "TAGGER_TAG_OUTPUT")
        return found

    @property
    def parts_folder(self) -> str:
        """Where the parts are: the output itself, or a hidden folder next to the file."""
        if self.is_folder:
            return self.output
        before, slash, name = self.output.rpartition("/")
        return f"{before}{slash}.{name}.parts/"


@dataclass(frozen=True)
class Plan:
    """The content of parts.json."""

    fingerprint: Sequence[dict[str, Any]]
    asked: Mapping[str, Any]
    """The settings that the parts depend on."""
    schema: str | None
    """The columns of a table with their types, see `formats.pack_schema`."""
    parts: Sequence[Slice]

    @cached_property
    def arrow_schema(self) -> pyarrow.Schema | None:
        return None if self.schema is None else unpack_schema(self.schema)

    @property
    def rows(self) -> int | None:
        """The number of rows, if it is known before they are read."""
        known = [part.rows for part in self.parts]
        return None if None in known else sum(rows or 0 for rows in known)

    def name(self, part: int) -> str:
        """Return the name of a part, without the end that its format gives it; names sort as the parts do."""
        return f"part-{part:0{max(5, len(str(len(self.parts) - 1)))}d}"

    def to_json(self) -> bytes:
        parts = [
            {"file": p.file, "unit": p.span.unit, "start": p.span.start, "stop": p.span.stop, "rows": p.rows}
            for p in self.parts
        ]
        content = asdict(self) | {"schema_version": SCHEMA_VERSION, "parts": parts}
        return json.dumps(content, ensure_ascii=False, indent=1).encode() + b"\n"

    @classmethod
    def from_json(cls, content: bytes) -> Plan:
        """Parse parts.json; raises ValueError, KeyError or TypeError for anything else."""
        found = json.loads(content)
        if found["schema_version"] != SCHEMA_VERSION:
            raise ValueError
        parts = [
            Slice(int(p["file"]), Span(p["unit"], int(p["start"]), int(p["stop"])), p["rows"]) for p in found["parts"]
        ]
        plan = cls(list(found["fingerprint"]), dict(found["asked"]), found["schema"], parts)
        plan.arrow_schema  # noqa: B018 - raises ValueError for a damaged schema
        return plan


@dataclass(frozen=True)
class Seal:
    """What a part must be: written after the part, and never changed."""

    part: int
    slice: Mapping[str, Any]
    rows: int
    size: int
    """Bytes of the part."""
    sha256: str
    tagger: Mapping[str, Any]
    errors: Mapping[str, int] = field(default_factory=dict)
    """Rows by kind of error."""
    untagged: int = 0
    """Rows that could not be tagged."""
    tags: Mapping[str, int] = field(default_factory=dict)
    """Rows by tag."""

    def to_json(self) -> bytes:
        return json.dumps(asdict(self), ensure_ascii=False, sort_keys=True).encode() + b"\n"

    @classmethod
    def from_json(cls, content: bytes | None) -> Seal | None:
        """Parse a seal; None for one that is torn."""
        try:
            seal = cls(**json.loads(content or b""))
            is_valid = isinstance(seal.part, int) and isinstance(seal.size, int) and isinstance(seal.rows, int)
            is_valid = is_valid and isinstance(seal.tagger, dict) and isinstance(seal.sha256, str)
        except (ValueError, TypeError):
            return None
        return seal if is_valid else None


class Parts:
    """The parts of a job in their folder."""

    def __init__(self, job: Job, folder: Folder, plan: Plan) -> None:
        self.job, self.folder, self.plan = job, folder, plan
        self._sealed: set[int] = set()
        """Parts that are known to be sealed; seals are never changed."""

    def __len__(self) -> int:
        return len(self.plan.parts)

    def file(self, part: int) -> str:
        return self.plan.name(part) + self.job.format.suffix

    def seal_file(self, part: int) -> str:
        return f"{RECORDS}/{self.plan.name(part)}.json"

    def write(self, seal: Seal, content: bytes) -> None:
        """Write a part, then its seal."""
        storage.write(self.folder, self.file(seal.part), content)
        storage.write(self.folder, self.seal_file(seal.part), seal.to_json())

    def seal(self, part: int) -> Seal | None:
        """Return the seal of a part; None if there is none, or it is torn or of another slice."""
        seal = Seal.from_json(self.folder.read(self.seal_file(part)))
        return seal if seal is not None and seal.part == part and seal.slice == self.slice(part) else None

    def slice(self, part: int) -> dict[str, Any]:
        piece = self.plan.parts[part]
        return {"file": piece.file, "unit": piece.span.unit, "start": piece.span.start, "stop": piece.span.stop}

    def unsealed(self) -> list[int]:
        """Return the parts that are not done: without a seal, or of another size than it says.

        Raises InvalidInputError when a seal is of another adapter or decoding.
        """
        if self.is_joined():
            return []
        sizes = self.folder.list()
        unknown = [part for part in range(len(self)) if part not in self._sealed]
        found = [part for part in unknown if self.seal_file(part) in sizes]
        with ThreadPoolExecutor(READERS) as readers:  # in object storage each is a request
            for part, seal in zip(found, readers.map(self.seal, found), strict=True):
                if seal is None:
                    continue
                self.check_tagger(seal.tagger)
                if sizes.get(self.file(part)) == seal.size or self.is_intact(seal):
                    self._sealed.add(part)
        missing = [part for part in unknown if part not in self._sealed]
        return [] if self.is_joined() else missing  # the worker that joined the parts deletes their seals

    def is_intact(self, seal: Seal) -> bool:
        """Check a part against its seal; a part that is torn loses it."""
        if self.folder.digest(self.file(seal.part)) == seal.sha256:
            return True
        self.unseal(seal.part)
        return False

    def unseal(self, part: int) -> None:
        """Delete the seal of a part that is torn, so that the part is done again."""
        self._sealed.discard(part)
        if not self.is_joined():
            log.warning("tag: %s is not what its seal says; it is done again", self.file(part))
            self.folder.delete(self.seal_file(part))

    def is_sealed(self, part: int) -> bool:
        """Check whether another worker has done a part by now."""
        return part in self._sealed or self.seal(part) is not None or self.is_joined()

    def is_joined(self) -> bool:
        """Check whether the parts have been joined to one file, and deleted."""
        return not self.job.is_folder and self.success() is not None

    def check_joined(self) -> None:
        """Check the file that the parts were joined to; forget it if it is missing or was changed.

        Raises InvalidInputError when it was written with another adapter or decoding.
        """
        success = None if self.job.is_folder else self.success()
        if success is None:
            return
        self.check_tagger(success.get("tagger", {}))
        folder, name = storage.open_parent(self.job.output)
        if folder.digest(name) != success.get("sha256"):
            log.warning("tag: %s is missing or was changed; it is made again", self.job.output)
            self.folder.delete(SUCCESS)

    def check_tagger(self, tagger: Mapping[str, Any]) -> None:
        """Raise InvalidInputError when answers were given by another adapter, base model or decoding."""
        differences = [
            f"{name} was {tagger.get(name)!r} and is {value!r}"
            for name, value in self.job.tagger.items()
            if tagger.get(name) != value
        ]
        if differences:
            raise InvalidInputError(
                f"{self.folder.name} has parts that were tagged differently: {'; '.join(differences)[:160]}. Change it "
                "back, name another output, or add --restart to tag all again"
            )

    def success(self) -> dict[str, Any] | None:
        """Return _SUCCESS.json; None as long as not all parts are done."""
        try:
            found = json.loads(self.folder.read(SUCCESS) or b"")
        except ValueError:
            return None
        return found if isinstance(found, dict) and found.get("schema_version") == SCHEMA_VERSION else None


def open_parts(job: Job, data: SlicedData) -> Parts:
    """Return the parts of a job as an earlier worker planned them, or plan them; nothing but parts.json is written.

    Raises InvalidInputError when the folder holds something else, or parts of another input or with other settings.
    """
    folder = storage.open_folder(job.parts_folder)
    names = folder.list()
    content = folder.read(PLAN)
    asked: dict[str, Any] = {
        "text": job.data.text_column,
        "columns": None if job.columns is None else list(job.columns),
        "rows": job.part_rows,
        "format": job.format.suffix,
    }
    if content is None:
        _refuse_other_files(folder, names)
    if content in (None, RESTARTED):
        slices = storage.retry_input(lambda: data.slices(job.part_rows))
        if job.columns is None and (left_out := [name for name in data.seen if name in OWN_COLUMNS]):
            log.warning("tag: the output has columns of its own in place of %s of the input", ", ".join(left_out))
        table = storage.retry_input(lambda: data.schema(slices)) if job.format.is_table else None
        schema = None if table is None else pack_schema(output_schema(table, job.columns))
        plan = Plan(storage.retry_input(data.fingerprint), asked, schema, slices)
        storage.write(folder, PLAN, plan.to_json())
        return Parts(job, folder, plan)
    try:
        plan = Plan.from_json(content or b"")
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidInputError(
            f"{folder.name}/{PLAN} is not a plan of this version of the job; name another output, or add --restart"
        ) from error
    problem = data.difference(plan.fingerprint)
    if problem is None and plan.asked != asked:
        names_of = {"text": "TAGGER_DATA_TEXT_COLUMN", "columns": "TAGGER_TAG_COLUMNS", "rows": "TAGGER_TAG_PART_ROWS"}
        problem = "; ".join(
            f"{names_of.get(name, name)} was {plan.asked.get(name)!r} and is {value!r}"
            for name, value in asked.items()
            if plan.asked.get(name) != value
        )
    if problem is not None:
        raise InvalidInputError(
            f"{job.output} has parts of another input: {problem}. Change it back, name another output, or add "
            "--restart to tag all again"
        )
    return Parts(job, folder, plan)


def _refuse_other_files(folder: Folder, names: Mapping[str, int]) -> None:
    others = [name for name in sorted(names) if not name.endswith(".tmp") and name != PLAN]
    if others:
        raise InvalidInputError(
            f"{folder.name} holds {others[0]}{' and other files' if len(others) > 1 else ''} and no parts of this job; "
            "name a folder that is empty or does not exist (TAGGER_TAG_OUTPUT)"
        )


def restart(job: Job) -> None:
    """Delete the seals and the parts of an earlier job, so that its plan can be replaced; other files stay."""
    folder = storage.open_folder(job.parts_folder)
    names = folder.list()
    if PLAN not in names:
        return
    own = [name for name in names if name == SUCCESS or name.startswith((f"{RECORDS}/", "part-"))]
    for name in sorted(own, key=lambda name: (not name.startswith(RECORDS), name)):  # seals before parts
        if name == PLAN:
            storage.write(folder, PLAN, RESTARTED)
        else:
            folder.delete(name)


def carried(row: Mapping[str, Any], columns: Sequence[str] | None) -> dict[str, Any]:
    """Return the columns of a row that the output has too; `a.b` is the field b of the records in column a."""
    if columns is None:
        return {name: value for name, value in row.items() if name not in OWN_COLUMNS}
    return {name: _field(row, name) for name in columns}


def _field(row: Mapping[str, Any], column: str) -> Any:
    try:
        return select(row, column)
    except CellError:
        return None
