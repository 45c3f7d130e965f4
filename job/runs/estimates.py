"""The estimate of a run, which `check --measure` leaves in the cache until the run begins."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def estimate_file(run_id: str) -> Path:
    """Return the file of the estimate of a run."""
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME, "tagger-job", "estimates", f"{run_id}.json")


def find_estimate(run_id: str) -> dict[str, Any] | None:
    """Return the estimate of a run; None if none was made, or it cannot be read."""
    try:
        found = json.loads(estimate_file(run_id).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and isinstance(found.get("seconds"), dict) else None
