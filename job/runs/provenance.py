"""What else made a run: installed packages, the job's own commit, and a digest that tells an edited manifest."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

IMAGE_REVISION = "IMAGE_REVISION"
"""Set in the image: the commit that it was built from."""
DIGEST = "sha256"
GIT_SECONDS = 5.0


def packages() -> dict[str, str]:
    """Return the version of each installed package, by name."""
    found = {distribution.metadata["Name"]: distribution.version for distribution in metadata.distributions()}
    return {name: found[name] for name in sorted(filter(None, found), key=str.lower)}


def code() -> dict[str, Any]:
    """Return the commit of the job's own code and whether files differ from it; each is None where it is unknown."""
    if revision := os.environ.get(IMAGE_REVISION):
        return {"commit": revision, "modified": None, "from": "image"}
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():  # an installed package, perhaps within a repository of another project
        return {"commit": None, "modified": None, "from": None}
    commit, changes = _git(root, "rev-parse", "HEAD"), _git(root, "status", "--porcelain", "--", "job")
    return {"commit": commit, "modified": None if changes is None else bool(changes), "from": "git"}


def _git(root: Path, *arguments: str) -> str | None:
    try:
        command = ["git", "-C", str(root), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=GIT_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):  # git is not installed, or refuses the folder of another user
        return None
    return done.stdout.strip()


def sealed(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return a manifest with the digest of its content."""
    content = {name: value for name, value in manifest.items() if name != DIGEST}
    return {**content, DIGEST: _digest(content)}


def is_sealed(manifest: Mapping[str, Any]) -> bool:
    """Return whether a manifest is as it was written."""
    return sealed(manifest) == manifest


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
