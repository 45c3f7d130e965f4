"""Recipes: files of settings, of which some ship with the package."""

from __future__ import annotations

from pathlib import Path

from job.errors import InvalidInputError

SHIPPED = Path(__file__).parent / "recipes"


def recipe_names() -> list[str]:
    """Return the names of the recipes that ship with the package."""
    return sorted(path.stem for path in SHIPPED.glob("*.env"))


def describe_recipe(name: str) -> str:
    """Return what a shipped recipe says about itself in its first line."""
    first, *_ = (SHIPPED / f"{name}.env").read_text(encoding="utf-8").splitlines()
    return first.removeprefix("#").strip()


def find_recipe(recipe: str, option: str) -> Path:
    """Return the file of a recipe: a shipped recipe's name, or a path; `option` is where the user named it.

    Raises InvalidInputError when it is neither.
    """
    if recipe in recipe_names():
        return SHIPPED / f"{recipe}.env"
    if not Path(recipe).is_file():
        raise InvalidInputError(
            f"{option}={recipe} is neither a recipe of the package ({', '.join(recipe_names())}) nor a file with lines "
            "such as TAGGER_LORA_R=16"
        )
    return Path(recipe)
