"""The reference of all settings: .env.example and docs/settings.md are generated from the settings themselves."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic.fields import FieldInfo

from job.config.recipes import describe_recipe, recipe_names
from job.settings import Settings, SettingsGroup, iter_fields, to_env


def env_example() -> str:
    """Return the text of `.env.example`: every variable with its meaning and default.

    Values have no quotes because `docker run --env-file` would keep them.
    """
    lines = [
        "# Every setting with its default. Copy this file to .env and keep the lines that you change.",
        "# HF_TOKEN, HF_HOME, HF_ENDPOINT and CUDA_VISIBLE_DEVICES keep their usual names and meaning.",
    ]
    for group in Settings.model_fields:
        lines.append("")
        for name, field in _fields(group):
            lines += [f"# {field.description}", f"{name}={to_env(field.default)}"]
    return "\n".join(lines) + "\n"


def settings_markdown() -> str:
    """Return the text of `docs/settings.md`: a table for each group of settings, and the recipes."""
    lines = [
        "# Settings",
        "",
        "Settings are environment variables named `TAGGER_<GROUP>_<NAME>`. A value comes from the environment, else",
        "from the file `.env` in the current folder, else from a recipe, else from the default. A variable that is set",
        "to an empty text counts as not set. A name that does not exist is refused with the nearest one that does.",
        "`tagger-job settings` prints the effective values and the source of each.",
        "",
        "`HF_TOKEN`, `HF_HOME`, `HF_ENDPOINT`, `HF_HUB_OFFLINE` and `CUDA_VISIBLE_DEVICES` keep their usual meaning.",
        "",
        "This page is generated from [job/settings.py](../job/settings.py) by `make docs/settings.md`.",
        "",
        "## Recipes",
        "",
        "A recipe is a file of settings. Name one with `--recipe NAME`, or with `TAGGER_RECIPE=NAME`; the name is one",
        "of these, or a path.",
        "",
        "| recipe | |",
        "|---|---|",
        *(f"| [{name}](../job/config/recipes/{name}.env) | {describe_recipe(name)} |" for name in recipe_names()),
    ]
    for group, info in Settings.model_fields.items():
        lines += ["", f"## TAGGER_{group.upper()}_", "", str(_group(group).__doc__), ""]
        lines += ["| setting | default | meaning |", "|---|---|---|"]
        for name, field in _fields(group):
            default = to_env(field.default).replace("|", "\\|")
            shown = f"`{default}`" if default else ""
            lines.append(f"| `{name}` | {shown} | {str(field.description).replace('|', chr(92) + '|')} |")
        assert info.annotation is _group(group)
    return "\n".join(lines) + "\n"


def _group(name: str) -> type[SettingsGroup]:
    group = Settings.model_fields[name].annotation
    assert isinstance(group, type) and issubclass(group, SettingsGroup)
    return group


def _fields(group: str) -> Iterator[tuple[str, FieldInfo]]:
    for name, of_group, knob in iter_fields():
        if of_group == group:
            yield name, _group(group).model_fields[knob]
