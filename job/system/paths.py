"""Where a named model or data file is on this machine, if it is on this machine."""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path

from job.errors import InvalidInputError

PACKAGE_PREFIX = "package:"
WEIGHT_SUFFIXES = (".gguf",)
DATA_SUFFIXES = (".jsonl", ".csv", ".parquet")
"""Files of a base model, and of data: a name that ends so is no Hub id."""


def hub_snapshot(path: Path) -> tuple[str, str] | None:
    """The Hub id and commit hash that a folder of the Hugging Face cache was downloaded from."""
    match = re.search(r"(?:^|/)models--([^/]+)--([^/]+)/snapshots/([0-9a-f]{40})/?$", str(path.absolute()))
    return (f"{match[1]}/{match[2]}", match[3]) if match else None


def is_local(name: str, suffixes: tuple[str, ...]) -> bool:
    """Whether a setting names a file or folder here, and not something on the Hub."""
    return (
        name.startswith((PACKAGE_PREFIX, ".", "/", "~")) or Path(name).suffix.lower() in suffixes or Path(name).exists()
    )


def local_path(name: str, variable: str) -> Path:
    """The path that a setting (the value of `variable`) names; `package:NAME/FILE` is a file of a Python package.

    The package is found without being imported, so that what it needs to run need not be there.
    Raises InvalidInputError when there is nothing at that path.
    """
    if not name.startswith(PACKAGE_PREFIX):
        path = Path(os.path.expanduser(name))  # noqa: PTH111 - Path's own raises for a user who does not exist
        if not path.exists():
            raise InvalidInputError(
                f"{variable}={name} does not exist; expected a file or folder there, or a Hub id such as owner/name"
            )
        return path
    package, _, file = name.removeprefix(PACKAGE_PREFIX).partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    for folder in folders:
        if file and (path := Path(folder, file)).exists():
            return path
    found = f"has no file {file!r}" if folders else "is not installed"
    raise InvalidInputError(
        f"{variable}={name}: the Python package {package!r} {found}; install it, or name another file"
    )
