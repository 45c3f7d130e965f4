"""Read settings from the environment, .env and a recipe."""

from __future__ import annotations

import difflib
import io
import os
from collections.abc import Mapping
from pathlib import Path

from dotenv import dotenv_values
from dotenv.parser import parse_stream
from pydantic import ValidationError

from job.config.recipes import find_recipe
from job.config.validators import is_unicode
from job.errors import InvalidInputError
from job.settings import PREFIX, Settings, describe_error, iter_fields

DOTENV = Path(".env")

RUN_DIR = "TAGGER_RUN_DIR"
RECIPE = "TAGGER_RECIPE"
"""Names a recipe, like the option --recipe; it belongs to no group of settings."""

RENAMED = {
    "TAGGER_TRAIN_ACCUMULATION": "TAGGER_TRAIN_GRADIENT_ACCUMULATION_STEPS",
    "TAGGER_TRAIN_MICRO_TOKENS": "TAGGER_TRAIN_MICRO_BATCH_TOKENS",
    "TAGGER_TRAIN_SCHEDULE": "TAGGER_TRAIN_LR_SCHEDULER_TYPE",
    "TAGGER_TRAIN_AVERAGE": "TAGGER_TRAIN_WEIGHT_AVERAGING",
    "TAGGER_TRAIN_LOSS_ON": "TAGGER_TRAIN_COMPLETION_ONLY_LOSS (true for tags, false for all)",
    "TAGGER_TRAIN_CHECKPOINTING": "TAGGER_TRAIN_GRADIENT_CHECKPOINTING",
    "TAGGER_TRAIN_KEEP": "TAGGER_TRAIN_SAVE_TOTAL_LIMIT",
    "TAGGER_SAMPLE_PLACES": "TAGGER_SAMPLE_MAX_POSITIONS",
}
"""Former names of settings, which are refused with the new name."""
RENAMED_VALUES = {"TAGGER_SAMPLE_DECODING": {"list": "greedy", "likely": "marginal"}}
"""Former values of settings, which are refused with the new value."""


def load(recipe: str | None = None) -> Settings:
    """Read and validate all settings.

    Raises InvalidInputError with every unknown name and every invalid value at once.
    """
    files = _settings_files(recipe)
    source_of = _value_sources(files)
    _refuse_undecodable_values()
    problems = _unknown_names(source_of)
    if any(name.upper().removeprefix(PREFIX).lower() in Settings.model_fields for name in source_of):
        raise InvalidInputError(*problems)  # pydantic would parse the value of a group's name as JSON for the group
    try:
        settings = Settings(_env_file=files)
    except ValidationError as error:
        raise InvalidInputError(*problems, *_invalid_values(error, source_of)) from None
    if problems:
        raise InvalidInputError(*problems)
    return settings


def _refuse_undecodable_values() -> None:
    names = [name for name, value in os.environ.items() if has_prefix(name) and not is_unicode(value)]
    if names:
        raise InvalidInputError(f"{', '.join(names)}: expected text in UTF-8; the value has bytes that are not UTF-8")


def _unknown_names(source_of: Mapping[str, str]) -> list[str]:
    """Return a sentence for each variable that is not a setting, with its new or the nearest existing name."""
    known = {name for name, _, _ in iter_fields()}
    problems = []
    for name, source in source_of.items():
        where = "" if source == "environment" else f" (in {source})"
        if name.upper() in RENAMED:
            problems.append(f"{name}{where} is now called {RENAMED[name.upper()]}; rename it.")
        elif name not in known:
            nearest = difflib.get_close_matches(name.upper(), known, n=1, cutoff=0.0)[0]
            problems.append(
                f"{name}{where} is not a setting; did you mean {nearest}? `tagger-job settings` lists all settings."
            )
    return problems


def _invalid_values(error: ValidationError, source_of: Mapping[str, str]) -> list[str]:
    """Return a sentence for each invalid value, with the new value of one that was renamed."""
    problems = []
    for detail in error.errors(include_url=False):
        if detail["type"] == "extra_forbidden":  # an unknown name, reported with the names
            continue
        name = (PREFIX + "_".join(map(str, detail["loc"][:2]))).upper()
        old = str(detail["input"])
        new = RENAMED_VALUES.get(name, {}).get(old)
        problem = describe_error(detail, source_of)
        problems.append(problem if new is None else f"{problem} {old} is now called {new}; set {name}={new}.")
    return problems


def explicit_values(recipe: str | None = None) -> dict[str, str]:
    """Return the variables that are set on this machine, as text, so that another one loads the same settings.

    TAGGER_RUN_DIR is left out because each machine sets its own, and TAGGER_RECIPE because its values are included.
    """
    values: dict[str, str | None] = {}
    for file in _settings_files(recipe):
        values.update(_read_file(file))
    values.update(os.environ)
    return {
        name: value for name, value in values.items() if value and has_prefix(name) and name not in (RUN_DIR, RECIPE)
    }


def replace_environment(variables: Mapping[str, str]) -> None:
    """Replace this machine's TAGGER_ variables, except TAGGER_RUN_DIR, by those of another machine."""
    for name in [name for name in os.environ if has_prefix(name) and name != RUN_DIR]:
        del os.environ[name]
    os.environ.update(variables)


def sources(recipe: str | None = None) -> dict[str, str]:
    """Return the source of each setting that is set: `environment`, or the path of a file."""
    return _value_sources(_settings_files(recipe))


def third_party_variables(recipe: str | None = None) -> dict[str, str]:
    """Return the variables in .env and the recipe that belong to other programs, such as HF_TOKEN and HF_HOME."""
    merged: dict[str, str | None] = {}
    for file in _settings_files(recipe):
        merged.update(_read_file(file))
    return {name: value for name, value in merged.items() if value and not has_prefix(name)}


def _settings_files(recipe: str | None) -> tuple[Path, ...]:
    """Return the files of settings that exist, recipe and .env; a later file overrides an earlier one."""
    dotenv = (DOTENV,) if DOTENV.is_file() else ()
    option = "--recipe"
    if recipe is None:
        option = RECIPE
        recipe = os.environ.get(RECIPE) or (_read_file(DOTENV).get(RECIPE) if dotenv else None)
    return (find_recipe(recipe, option), *dotenv) if recipe else dotenv


def _value_sources(files: tuple[Path, ...]) -> dict[str, str]:
    """Return the source of each non-empty variable whose name has the prefix; a later source wins."""
    found: dict[str, str] = {}
    for file in files:
        found.update({name: str(file) for name, value in _read_file(file).items() if value and has_prefix(name)})
    found.update({name: "environment" for name, value in os.environ.items() if value and has_prefix(name)})
    found.pop(RECIPE, None)
    return found


def _read_file(file: Path) -> dict[str, str | None]:
    """Return the variables of a file; raise InvalidInputError with the number of a line that is not NAME=value."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInputError(
            f"{file} cannot be read as lines of NAME=value ({error}); fix or remove the file"
        ) from error
    for binding in parse_stream(io.StringIO(text)):
        line = binding.original.string.strip()
        if binding.error or (binding.key is not None and (binding.value is None or not binding.key.isidentifier())):
            raise InvalidInputError(
                f"{file} line {binding.original.line}: {line[:60]!r} is not NAME=value; fix or remove the line"
            )
    return dotenv_values(stream=io.StringIO(text))


def has_prefix(name: str) -> bool:
    """Check that a variable has the prefix TAGGER_, in upper or lower case."""
    return name.upper().startswith(PREFIX)
