"""The candidates of `tagger-job tune`: recipes, or the combinations of a grid, each as complete settings."""

from __future__ import annotations

import itertools
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from job.config import environment
from job.config.recipes import find_recipe
from job.errors import InvalidInputError
from job.settings import PREFIX, Settings, iter_fields, to_env

VARIABLE = "TAGGER_TUNE_CANDIDATES"
MAX_CANDIDATES = 32
TUNABLE_DATA = ("SEPARATOR", "MAX_LENGTH", "CALIBRATION_SIZE", "TAG_ORDER", "MIN_TAG_COUNT")
"""The settings of the data that candidates may differ in; the others say what the data is."""
TUNABLE = ("TAGGER_BASE_", "TAGGER_LORA_", "TAGGER_TRAIN_", "TAGGER_SAMPLE_")
NOT_IN_A_WINNER = ("TAGGER_TUNE_", "TAGGER_RUN_ID", environment.RECIPE)


@dataclass(frozen=True)
class Candidate:
    """What a recipe file makes of this machine's settings."""

    name: str
    settings: Settings
    values: dict[str, str]
    """The content of that recipe file: the variables of --recipe, and over them the candidate's own."""


def find_candidates(settings: Settings, recipe: str | None) -> list[Candidate]:
    """Return the candidates of TAGGER_TUNE_CANDIDATES on top of the settings of this machine.

    A candidate is to the job what a recipe is: it overrides --recipe, and .env and the environment override it.
    Raises InvalidInputError with every problem found: fewer than two candidates, one that does not exist, sets what is
    not for a candidate to choose, or is the same as another one.
    """
    text = settings.tune.candidates
    if text is None:
        raise InvalidInputError(
            f"{VARIABLE} is not set; expected at least two recipes, by name or file, separated by commas, or a grid "
            "such as TAGGER_LORA_R=16,64"
        )
    found: list[Candidate] = []
    problems: list[str] = []
    with tempfile.TemporaryDirectory(prefix="tagger-") as folder:
        for name, file in _grid(text, Path(folder)) if is_grid(text) else _recipes(text):
            try:
                loaded = environment.load(recipe, file)
                values = environment.recipe_values(recipe, file)
                own = environment.file_values(file)
            except InvalidInputError as error:
                problems += [f"candidate {name}: {problem.replace(f'{folder}/', '')}" for problem in error.problems]
                continue
            found.append(Candidate(name, loaded, _for_a_recipe(values)))
            problems += list(_problems(found[-1], settings, own, masked_too=is_grid(text))) or _repeats(found)
    if problems:
        raise InvalidInputError(*dict.fromkeys(problems))
    return found


def is_grid(text: str) -> bool:
    """Return whether candidates are given as lists of values, not as recipes."""
    return re.match(rf"\s*{PREFIX}\w*\s*=", text, re.IGNORECASE) is not None


def _recipes(text: str) -> Iterator[tuple[str, Path]]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    _check_count(len(names))
    if repeated := next((name for name in names if names.count(name) > 1), None):
        raise InvalidInputError(f"{VARIABLE} names {repeated} twice; name each candidate once")
    for name in names:
        yield name, find_recipe(name, VARIABLE)


def _grid(text: str, folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield each combination as a name and a file of settings."""
    choices: dict[str, list[str]] = {}
    for part in filter(None, map(str.strip, text.split(";"))):
        name, equals, values = part.partition("=")
        name, listed = name.strip(), [value.strip() for value in values.split(",")]
        if (
            not equals
            or not all(listed)
            or not name.isidentifier()
            or name in choices
            or len(set(listed)) < len(listed)
        ):
            raise InvalidInputError(
                f"{VARIABLE}: {part!r} is not a list of values; expected each setting once, as NAME=value,value with "
                "different values, and ; between settings"
            )
        choices[name] = listed
    combinations = list(itertools.islice(itertools.product(*choices.values()), MAX_CANDIDATES + 1))
    _check_count(len(combinations))
    for combination in combinations:
        pairs = dict(zip(choices, combination, strict=True))
        file = folder / VARIABLE
        file.write_text(env_text(pairs), encoding="utf-8")
        yield " ".join(f"{name}={value}" for name, value in pairs.items()), file


def _check_count(count: int) -> None:
    if not 2 <= count <= MAX_CANDIDATES:
        raise InvalidInputError(
            f"{VARIABLE} has {'only one candidate' if count == 1 else 'no candidate' if count == 0 else 'too many'}; "
            f"expected 2 to {MAX_CANDIDATES} candidates to choose from"
        )


def _repeats(found: list[Candidate]) -> Iterator[str]:
    """Yield a sentence if the last candidate has the same settings as one before it."""
    *others, new = found
    if same := next((c.name for c in others if c.settings.result_values() == new.settings.result_values()), None):
        yield (
            f"the candidates {same} and {new.name} are the same settings here; remove one of them, or remove from .env "
            "and the environment what overrides both"
        )


def _problems(new: Candidate, base: Settings, own: dict[str, str], *, masked_too: bool) -> Iterator[str]:
    """Yield what is wrong with a candidate; `own` has the variables of its file alone."""
    for name in own:
        if not environment.has_prefix(name):
            yield f"candidate {new.name} sets {name}, which is not a setting of the job; set it in the environment"
        elif masked_too and new.settings.sources.get(name) in ("environment", environment.DOTENV.name):
            yield (
                f"{VARIABLE} lists values of {name}, and {new.settings.sources[name]} sets it, which overrides every "
                "candidate; remove it there"
            )
    values, expected = new.settings.values(), base.values()
    for name in values:
        if not is_tunable(name) and values[name] != expected[name]:
            yield (
                f"candidate {new.name} sets {name}={to_env(values[name], name)}, which is not for a candidate to "
                "choose: all are trained and scored on the same data, and nothing is published. Remove it there, or "
                "set it in the environment, in .env or by --recipe"
            )


def is_tunable(name: str) -> bool:
    """Return whether candidates may differ in a setting: one that changes the result, or only how it is logged."""
    if name.startswith("TAGGER_DATA_"):
        return name.removeprefix("TAGGER_DATA_") in TUNABLE_DATA
    return name.startswith(TUNABLE)


def _for_a_recipe(values: dict[str, str]) -> dict[str, str]:
    known = [name for name, _, _ in iter_fields()]
    return {name: values[name] for name in known if name in values and not name.startswith(NOT_IN_A_WINNER)}


def env_text(values: dict[str, str]) -> str:
    """Return variables as lines that dotenv reads back: a value that is more than a word is quoted."""
    lines = []
    for name, value in values.items():
        if re.fullmatch(r"[\w.,:/+-]*", value):
            lines.append(f"{name}={value}\n")
        else:
            escaped = value.replace("\\", "\\\\").replace("'", "\\'")
            lines.append(f"{name}='{escaped}'\n")
    return "".join(lines)
