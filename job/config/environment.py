"""Read settings from the environment, .env and a recipe."""

from __future__ import annotations

import difflib
import io
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from dotenv import dotenv_values
from dotenv.parser import Binding, parse_stream
from pydantic import ValidationError

from job.config.recipes import find_recipe
from job.config.redaction import has_secret, remember
from job.config.validators import is_unicode
from job.errors import InvalidInputError
from job.settings import PREFIX, Settings, describe_error, iter_fields

DOTENV = Path(".env")
MAX_FILE_BYTES = 2**20
_ASSIGNMENT = re.compile(r"^\s*(?:export\s+)?[A-Za-z_]\w*\s*[=:]", re.MULTILINE)
"""The start of a setting, within the value of another one."""

RUN_DIR = "TAGGER_RUN_DIR"
RUN_STORE = "TAGGER_RUN_STORE"
NOTIFY = "TAGGER_RUN_NOTIFY"
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


def load(recipe: str | None = None, over: Path | None = None) -> Settings:
    """Read and validate all settings; the file `over` overrides the recipe, and .env and the environment override both.

    Raises InvalidInputError with every unknown name and every invalid value at once.
    """
    files = _settings_files(recipe, over)
    source_of = _value_sources(files)
    _refuse_undecodable_values()
    problems = _unknown_names(source_of)
    if any(name.upper().removeprefix(PREFIX).lower() in Settings.model_fields for name in source_of):
        raise InvalidInputError(*problems)  # pydantic would parse the value of a group's name as JSON for the group
    try:
        settings = Settings(_env_file=files)
    except ValidationError as error:
        raise InvalidInputError(*problems, *_invalid_values(error, source_of)) from None
    if settings.run.notify is not None:
        remember(settings.run.notify.get_secret_value())
    problems += _secrets_in(settings, third_party_variables(recipe))
    if problems:
        raise InvalidInputError(*problems)
    return settings.with_sources({name: Path(source).name for name, source in source_of.items()})


def _secrets_in(settings: Settings, variables: Mapping[str, str]) -> list[str]:
    """Return a sentence for each setting with the value of a secret variable: settings are logged and published.

    A recipe could put one there, because ${NAME} in a file stands for the value of a variable.
    """
    return [
        f"{name} contains the value of a secret variable, and settings are logged and published; remove it"
        for name, value in settings.values().items()
        if has_secret(json.dumps(value, ensure_ascii=False), variables)
    ]


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


def log_style(recipe: str | None = None) -> Literal["text", "json"]:
    """Return TAGGER_RUN_LOG before the settings are loaded, whose errors are logged too; `text` for a wrong value."""
    name = f"{PREFIX}RUN_LOG"
    try:
        value = explicit_values(recipe).get(name)
    except InvalidInputError:
        value = os.environ.get(name)
    return "json" if value == "json" else "text"


def replace_environment(variables: Mapping[str, str]) -> None:
    """Replace this machine's TAGGER_ variables by those of another machine.

    TAGGER_RUN_DIR stays, and TAGGER_RUN_NOTIFY, which this machine may have as a secret of its own.
    """
    for name in [name for name in os.environ if has_prefix(name) and name not in (RUN_DIR, NOTIFY)]:
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


def recipe_values(recipe: str | None, over: Path) -> dict[str, str]:
    """Return the variables in the recipe and in a file that overrides it, as text; those in .env are not among them."""
    merged: dict[str, str | None] = {}
    for file in _settings_files(recipe, over):
        merged.update(_read_file(file) if file != DOTENV else {})
    return {name: value for name, value in merged.items() if value}


def file_values(file: Path) -> dict[str, str]:
    """Return the variables in a file of settings that are not empty, as text."""
    return {name: value for name, value in _read_file(file).items() if value}


def _settings_files(recipe: str | None, over: Path | None = None) -> tuple[Path, ...]:
    """Return the files of settings that exist: recipe, `over`, .env; a later file overrides an earlier one."""
    dotenv = (DOTENV,) if DOTENV.is_file() else ()
    option = "--recipe"
    if recipe is None:
        option = RECIPE
        recipe = os.environ.get(RECIPE) or (_read_file(DOTENV).get(RECIPE) if dotenv else None)
    found = (find_recipe(recipe, option),) if recipe else ()
    return (*found, *(() if over is None else (over,)), *dotenv)


def _value_sources(files: tuple[Path, ...]) -> dict[str, str]:
    """Return the source of each non-empty variable whose name has the prefix; a later source wins."""
    found: dict[str, str] = {}
    for file in files:
        found.update({name: str(file) for name, value in _read_file(file).items() if value and has_prefix(name)})
    found.update({name: "environment" for name, value in os.environ.items() if value and has_prefix(name)})
    found.pop(RECIPE, None)
    return found


def _read_file(file: Path) -> dict[str, str | None]:
    """Return the variables of a file; raise InvalidInputError with the number of a line that is not NAME=value.

    Such a line may hold a secret, so at most the name at its start is shown.
    """
    text = _read_text(file)
    for binding in parse_stream(io.StringIO(text)):
        line = binding.original.string.strip()
        if binding.error or (binding.key is not None and (binding.value is None or not binding.key.isidentifier())):
            raise InvalidInputError(
                f"{file} line {_first_line(binding)} is not NAME=value{_name_at_start(line)}; fix or remove the line"
            )
        if _ASSIGNMENT.search(line.partition("\n")[2]):  # the next settings would become part of this one's value
            raise InvalidInputError(
                f"{file} line {_first_line(binding)}{_name_at_start(line)}: a quote opens here and closes on a later "
                "line, with other settings in between; close it on its line"
            )
    return dotenv_values(stream=io.StringIO(text))


def _read_text(file: Path) -> str:
    """Return the text of a file of settings; its content is in no message."""
    try:
        with file.open("rb") as opened:
            content = opened.read(MAX_FILE_BYTES + 1)
        text = content.decode("utf-8")
    except OSError as error:
        raise InvalidInputError(
            f"{file} cannot be read: {error.strerror or type(error).__name__}; fix or remove the file"
        ) from error
    except UnicodeDecodeError as error:
        line = 1 + content.count(b"\n", 0, error.start)
        raise InvalidInputError(
            f"{file} cannot be read as lines of NAME=value: line {line} is not UTF-8; save the file as UTF-8"
        ) from None
    if "\0" in text:
        line = 1 + text.count("\n", 0, text.index("\0"))
        raise InvalidInputError(f"{file} line {line} has a NUL character, which no setting has; save the file as text")
    if len(content) > MAX_FILE_BYTES:
        raise InvalidInputError(f"{file} has more than {MAX_FILE_BYTES} bytes; expected lines of NAME=value")
    return text


def _first_line(binding: Binding) -> int:
    """Return the number of the line on which a binding begins; dotenv counts the empty lines before it too."""
    original = binding.original
    blank = len(original.string) - len(original.string.lstrip())
    return original.line + len(re.findall(r"\r\n|\n|\r", original.string[:blank]))


def _name_at_start(line: str) -> str:
    """Return the variable's name before the first `=`, `:` or space of a line, to show it; empty unless it is one.

    A line may be a secret alone, or begin with one, so only what is written like a variable's name is shown.
    """
    match = re.match(r"(export|[A-Z][A-Z0-9]*(?:_[A-Z0-9]+)+)[=:\s]", line + "\n")
    return f" (it begins with {match[1]})" if match and len(match[1]) <= 64 and len(line) > len(match[1]) else ""


def has_prefix(name: str) -> bool:
    """Check that a variable has the prefix TAGGER_, in upper or lower case."""
    return name.upper().startswith(PREFIX)
