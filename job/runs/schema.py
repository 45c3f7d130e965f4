"""Schema versions of what a run keeps on disk, and the refusal of what another version of the job wrote."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from job import __version__
from job.errors import InvalidInputError

MANIFEST = 1
"""Schema version of manifest.json. Raise it when a reader of the current version would misread the new form."""
CHECKPOINT = 2
"""Schema version of a checkpoint. Raise it when a resume from an earlier checkpoint would not give the result of the
version that wrote it: when tensors or fields change their meaning, or a step computes something else (the order of the
examples, the dropout masks). Such checkpoints are then refused before a model is loaded.

1: dropout was drawn for each micro-batch. 2: dropout is a function of seed, step, example and position.
"""


def written_by(manifest: Mapping[str, Any]) -> str:
    """Return the version of the job that began a run, as words for a message."""
    versions = manifest.get("versions")
    version = versions.get("tagger-job") if isinstance(versions, dict) else None
    return f"version {version}" if isinstance(version, str) else "an earlier version"


def check_manifest(path: Path, manifest: Mapping[str, Any]) -> None:
    """Raise InvalidInputError if a manifest has the schema of a later version."""
    found = manifest.get("schema_version")
    if isinstance(found, int) and found > MANIFEST:
        raise InvalidInputError(
            f"{path} was begun by {written_by(manifest)} of the job (manifest schema {found}), and this is version "
            f"{__version__} (schema {MANIFEST}); continue with that version, or set TAGGER_RUN_ID to another name"
        )


def check_checkpoint(folder: Path, state: Mapping[str, Any], begun_by: str) -> None:
    """Raise InvalidInputError if a checkpoint has another schema, so that a resume would change the result."""
    found = state.get("schema_version", 1)
    if found != CHECKPOINT:
        raise InvalidInputError(
            f"{folder} was written by {begun_by} of the job (checkpoint schema {found}); version {__version__} (schema "
            f"{CHECKPOINT}) would continue it with another result. Finish the run with the version that began it, or "
            f"remove {folder.parent} to train it from the beginning"
        )


def check_checkpoints(checkpoints: Path, begun_by: str) -> None:
    """Check all checkpoints of a run; one that is damaged is left to the resume, which skips it.

    Raises InvalidInputError for one of another schema, or one that this user may not read.
    """
    for file in sorted(checkpoints.glob("checkpoint-*/state.json")):
        try:
            state = json.loads(file.read_text(encoding="utf-8"))
        except PermissionError as error:
            raise unreadable(file, error) from error
        except (OSError, ValueError, RecursionError):
            continue
        if isinstance(state, dict):
            check_checkpoint(file.parent, state, begun_by)


def unreadable(path: Path, error: OSError) -> InvalidInputError:
    """Return the error for a file of a run that another user wrote and this one may not read."""
    return InvalidInputError(
        f"{path} cannot be read: {error.strerror}; run the job as the user who wrote it, let this user read the run, "
        "or set TAGGER_RUN_ID to another name"
    )
