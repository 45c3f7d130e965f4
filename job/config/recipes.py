"""Find and list recipes: files of settings, some of which ship with the package."""

from __future__ import annotations

from pathlib import Path

from job.errors import InvalidInputError

SHIPPED = Path(__file__).parent / "recipes"


def recipe_names() -> list[str]:
    """Return the names of the recipes that ship with the package."""
    return sorted(path.stem for path in SHIPPED.glob("*.env"))


def describe_recipe(name: str) -> str:
    """Return the first line of a shipped recipe, a comment that says what the recipe is for."""
    first, *_ = (SHIPPED / f"{name}.env").read_text(encoding="utf-8").splitlines()
    return first.removeprefix("#").strip()


def find_recipe(recipe: str, option: str) -> Path:
    """Return the file of a recipe that is named by a shipped recipe's name, or by a path.

    `option` is the option or variable with the name, for the message.
    Raises InvalidInputError when there is no such recipe and no such file.
    """
    if recipe in recipe_names():
        return SHIPPED / f"{recipe}.env"
    if not Path(recipe).is_file():
        raise InvalidInputError(
            f"{option}={recipe} is neither a shipped recipe ({', '.join(recipe_names())}) nor a file; expected one of "
            "them, or a file with lines such as TAGGER_LORA_R=16"
        )
    return Path(recipe)
