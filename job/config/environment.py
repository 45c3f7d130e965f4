"""Read settings from the environment, .env and a recipe."""

from __future__ import annotations

import difflib
import io
import os
from collections.abc import Mapping
from pathlib import Path

from dotenv import dotenv_values
from dotenv.parser import parse_stream
from pydantic import (
    ValidationError,
)

from job.config.recipes import find_recipe
from job.config.validators import is_unicode
from job.errors import InvalidInputError
from job.settings import PREFIX, Settings, describe_error, iter_fields

DOTENV = Path(".env")

RUN_DIR = "TAGGER_RUN_DIR"
RECIPE = "TAGGER_RECIPE"
"""Names a recipe, as the option --recipe does; it belongs to no group of settings."""


def load(recipe: str | None = None) -> Settings:
    """Read and validate all settings.

    Raises InvalidInputError with every unknown name and every bad value at once.
    """
    files = _settings_files(recipe)
    source_of = _value_sources(files)
    broken = [name for name, value in os.environ.items() if has_prefix(name) and not is_unicode(value)]
    if broken:
        raise InvalidInputError(f"{', '.join(broken)}: expected text in UTF-8; the value holds bytes that are none")
    known = {name for name, _, _ in iter_fields()}
    problems = [_unknown_name(name, source, known) for name, source in source_of.items() if name not in known]
    if any(name.upper().removeprefix(PREFIX).lower() in Settings.model_fields for name in source_of):
        raise InvalidInputError(*problems)  # the name of a group alone would be read as all of its knobs, in JSON
    try:
        settings = Settings(_env_file=files)
    except ValidationError as error:
        problems += [
            describe_error(detail, source_of)
            for detail in error.errors(include_url=False)
            if detail["type"] != "extra_forbidden"
        ]
    else:
        if not problems:
            return settings
    raise InvalidInputError(*problems)


def explicit_values(recipe: str | None = None) -> dict[str, str]:
    """Return the variables that were set here, as text, so that another machine loads the same settings.

    Without TAGGER_RUN_DIR, which each machine sets for itself, and without TAGGER_RECIPE, whose values are included.
    """
    values: dict[str, str | None] = {}
    for file in _settings_files(recipe):
        values.update(_read_file(file))
    values.update(os.environ)
    return {
        name: value for name, value in values.items() if value and has_prefix(name) and name not in (RUN_DIR, RECIPE)
    }


def replace_environment(variables: Mapping[str, str]) -> None:
    """Replace this machine's variables, except TAGGER_RUN_DIR, by those that were set on another machine."""
    for name in [name for name in os.environ if has_prefix(name) and name != RUN_DIR]:
        del os.environ[name]
    os.environ.update(variables)


def sources(recipe: str | None = None) -> dict[str, str]:
    """Return the source of each variable that was set; the others have their default."""
    return _value_sources(_settings_files(recipe))


def third_party_variables(recipe: str | None = None) -> dict[str, str]:
    """Return the variables of .env and recipe that belong to other programs (HF_TOKEN, HF_HOME, ...)."""
    merged: dict[str, str | None] = {}
    for file in _settings_files(recipe):
        merged.update(_read_file(file))
    return {name: value for name, value in merged.items() if value and not has_prefix(name)}


def _settings_files(recipe: str | None) -> tuple[Path, ...]:
    """Return the recipe's file and .env, as far as they exist; later files override earlier ones."""
    dotenv = (DOTENV,) if DOTENV.is_file() else ()
    option = "--recipe"
    if recipe is None:
        option = RECIPE
        recipe = os.environ.get(RECIPE) or (_read_file(DOTENV).get(RECIPE) if dotenv else None)
    return (find_recipe(recipe, option), *dotenv) if recipe else dotenv


def _value_sources(files: tuple[Path, ...]) -> dict[str, str]:
    """Return the source of each non-empty variable with our prefix, in any case; a later source wins."""
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
        raise InvalidInputError(f"{file} cannot be read as lines of NAME=value ({error}); fix or remove it") from error
    for binding in parse_stream(io.StringIO(text)):
        line = binding.original.string.strip()
        if binding.error or (binding.key is not None and (binding.value is None or not binding.key.isidentifier())):
            raise InvalidInputError(
                f"{file} line {binding.original.line}: {line[:60]!r} is not NAME=value; repair or remove the line"
            )
    return dotenv_values(stream=io.StringIO(text))


def has_prefix(name: str) -> bool:
    """Check whether a variable is one of ours."""
    return name.upper().startswith(PREFIX)


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
"""Former names of settings, which are refused with the present one."""


def _unknown_name(name: str, source: str, known: set[str]) -> str:
    where = "" if source == "environment" else f" (in {source})"
    if name.upper() in RENAMED:
        return f"{name}{where} is now called {RENAMED[name.upper()]}; rename it."
    nearest = difflib.get_close_matches(name.upper(), known, n=1, cutoff=0.0)[0]
    return f"{name}{where} is not a setting; did you mean {nearest}? `tagger-job settings` lists all."
