"""What callers of rented machines share: options that override settings, and refusals of what a container lacks."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from job.errors import InvalidInputError
from job.runs.run_folder import check_writable
from job.settings import Settings, Tag
from job.system.paths import DATA_SUFFIXES, HUB_EQUIVALENTS, PACKAGE_PREFIX, WEIGHT_SUFFIXES, is_local

JOB_OVERRIDES = {
    "--run-id": "TAGGER_RUN_ID",
    "--max-steps": "TAGGER_TRAIN_MAX_STEPS",
    "--learning-rate": "TAGGER_TRAIN_LEARNING_RATE",
    "--model": "TAGGER_BASE_MODEL",
    "--dataset": "TAGGER_DATA_DATASET",
    "--repo": "TAGGER_HUB_REPO",
}
TAG_OVERRIDES = {"--input": "TAGGER_TAG_INPUT", "--output": "TAGGER_TAG_OUTPUT"}
"""Options of the command `tag`."""


@dataclass(frozen=True)
class Container:
    """What a container of a platform has, to refuse what it has not before it is paid for."""

    name: str
    """As messages name it: `Modal's container`."""
    prefixes: tuple[str, ...]
    """How paths begin that it has."""
    places: str
    """What to name instead of a file of this machine."""
    tag_command: str
    """What tags files there."""

    def has(self, name: str) -> bool:
        """Return whether a path is on a volume of the container."""
        return name.startswith(self.prefixes)

    def local_inputs(self, settings: Settings) -> list[str]:
        """Return a problem for each file of this machine, or of a Python package, that the container does not have."""
        inputs = {"TAGGER_BASE_MODEL": settings.base.model, "TAGGER_DATA_DATASET": settings.data.dataset}
        inputs |= {"TAGGER_DATA_EVAL_DATASET": settings.data.eval_dataset} if settings.data.eval_dataset else {}
        problems = [
            f"{variable}={name} is not in {self.name}; set it to a Hub id{_hub_id_hint(name)}, a file of the job's own "
            f"package (package:job/...), or {self.places}"
            for variable, name in inputs.items()
            if not name.startswith((f"{PACKAGE_PREFIX}job/", *self.prefixes))
            and (name.startswith((PACKAGE_PREFIX, "~")) or is_local(name, (*DATA_SUFFIXES, *WEIGHT_SUFFIXES)))
        ]
        for variable, file in {"INPUT": settings.sample.input, "OUTPUT": settings.sample.output}.items():
            if file is not None:
                problems.append(
                    f"TAGGER_SAMPLE_{variable}={file} is a file of this machine, which {self.name} cannot access; "
                    f"unset it and use `{self.tag_command}`"
                )
        return problems

    def local_vocabulary(self, settings: Settings) -> list[str]:
        """Return a problem if the file with the tags is one of this machine."""
        vocabulary = settings.sample.vocabulary
        if vocabulary in (None, "open", "seen") or self.has(vocabulary):
            return []
        also = f", or {self.places}" if self.prefixes else ""
        return [f"TAGGER_SAMPLE_VOCABULARY={vocabulary} is not in {self.name}; expected open, seen{also}"]


def _hub_id_hint(name: str) -> str:
    package = name.removeprefix(PACKAGE_PREFIX).partition("/")[0]
    return f" ({HUB_EQUIVALENTS[package]} for this model)" if package in HUB_EQUIVALENTS else ""


def apply_overrides(options: argparse.Namespace, overrides: Mapping[str, str]) -> None:
    """Set the variables of the options that are given; raises InvalidInputError for an empty one."""
    for option, variable in overrides.items():
        value = getattr(options, option.removeprefix("--").replace("-", "_"))
        if value == "":
            raise InvalidInputError(f"{option} is empty; expected a value for {variable}")
        if value is not None:
            os.environ[variable] = value


def missing_for_tag(settings: Tag) -> list[str]:
    """Return a problem for each setting that tagging needs and that is not set."""
    values = {"TAGGER_TAG_INPUT": settings.input, "TAGGER_TAG_OUTPUT": settings.output}
    return [f"{name} is not set; add {option}" for option, name in TAG_OVERRIDES.items() if values[name] is None]


def refuse(*problems: Iterable[str]) -> None:
    """Raise InvalidInputError with all problems, if there are any."""
    if found := [problem for group in problems for problem in group]:
        raise InvalidInputError(*found)


def unwritable_output(output: Path | None) -> Iterable[str]:
    """Return a problem if the file that is named by --output cannot be written."""
    if output is None:
        return ()
    if output.is_dir() or not output.name:
        return (f"--output {output} is a folder; expected the path of a file",)
    return _unwritable(output.parent, "the folder of --output", "it to a file in one")


def unwritable_folder(to: Path | None) -> Iterable[str]:
    """Return a problem if the folder that is named by --to cannot be written."""
    return () if to is None else _unwritable(to, "the folder --to", "it to one")


def _unwritable(folder: Path, what: str, remedy: str) -> Iterable[str]:
    try:
        check_writable(folder, what, remedy)
    except InvalidInputError as error:
        return error.problems
    return ()
