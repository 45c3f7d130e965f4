"""Generate the reference of all settings, .env.example and docs/settings.md, from the settings themselves."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic.fields import FieldInfo

from job.config.recipes import describe_recipe, recipe_names
from job.settings import Settings, SettingsGroup, iter_fields, to_env


def env_example() -> str:
    """Return the text of `.env.example`: every variable, commented out, with its description and default.

    An active line would override the recipe. Values have no quotes because `docker run --env-file` would keep them.
    """
    lines = [
        "# Every setting with its default. Copy this file to .env. Uncomment what you change.",
        "# HF_TOKEN, HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE and CUDA_VISIBLE_DEVICES have their usual meaning.",
    ]
    for group in Settings.model_fields:
        lines.append("")
        for name, field in _fields(group):
            lines += [f"# {field.description}", f"#{name}={to_env(field.default, name)}"]
    return "\n".join(lines) + "\n"


def settings_markdown() -> str:
    """Return the text of `docs/settings.md`: a table for each group of settings, and the recipes."""
    lines = [
        "# Settings",
        "",
        "Settings are environment variables named `TAGGER_<GROUP>_<NAME>`. A value comes from the environment, else",
        "from the file `.env` in the current folder, else from a recipe; otherwise it is the default. A variable that",
        "is set to an empty text counts as not set. An unknown name is refused, and the message names the nearest",
        "setting. `tagger-job settings` prints the effective values and the source of each.",
        "",
        "`HF_TOKEN`, `HF_HOME`, `HF_ENDPOINT`, `HF_HUB_OFFLINE` and `CUDA_VISIBLE_DEVICES` have their usual meaning.",
        "",
        "This page is generated from [job/settings.py](../job/settings.py) by `make docs/settings.md`.",
        "",
        "## Recipes",
        "",
        "A recipe is a file of settings. Choose one with `--recipe NAME`, or with `TAGGER_RECIPE=NAME`, where NAME is",
        "one of these names, or the path of a file of your own.",
        "",
        "| recipe | what it is for |",
        "|---|---|",
        *(f"| [{name}](../job/config/recipes/{name}.env) | {describe_recipe(name)} |" for name in recipe_names()),
    ]
    for group in Settings.model_fields:
        lines += ["", f"## TAGGER_{group.upper()}_", "", str(_group(group).__doc__), ""]
        lines += ["| setting | default | description |", "|---|---|---|"]
        for name, field in _fields(group):
            default = to_env(field.default, name)
            cells = [f"`{name}`", f"`{default}`" if default else "", str(field.description)]
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _group(name: str) -> type[SettingsGroup]:
    group = Settings.model_fields[name].annotation
    assert isinstance(group, type) and issubclass(group, SettingsGroup)
    return group


def _fields(group: str) -> Iterator[tuple[str, FieldInfo]]:
    for name, owner, field in iter_fields():
        if owner == group:
            yield name, _group(group).model_fields[field]
