"""Training checkpoints: written atomically, verified by their checksums when they are loaded."""

from __future__ import annotations

import json
import logging
import re
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from job import __version__
from job.runs import schema
from job.runs.atomic import atomic_directory
from job.runs.checksums import checksum_files, find_mismatch

log = logging.getLogger(__name__)

TENSORS, STATE, CHECKSUMS = "tensors.safetensors", "state.json", "checksums.json"


@dataclass
class TrainerState:
    """The progress of training; with the tensors of a checkpoint, all that a resume needs.

    No random state is stored: dropout and the order of the examples follow from seed and step.
    """

    step: int = 0
    """Completed optimizer steps."""
    micro_batch_tokens: int = 0
    """The current limit of tokens in a micro-batch."""
    parts: int = 1
    """Into how many micro-batches a step is divided at least: the number of processes that the run began with."""
    recompute: bool = False
    """Whether the backward pass recomputes activations (gradient checkpointing)."""
    loss_scale: dict[str, float] = field(default_factory=dict)
    """The state of the fp16 gradient scaler; empty in other precisions."""
    steps: list[dict[str, float]] = field(default_factory=list)
    """For each step: `loss` (summed over its label tokens), `labels` (their number), `grad_norm`, `learning_rate`."""
    seconds: float = 0.0
    """Training time, summed over all attempts."""


def save(checkpoints: Path, tensors: dict[str, torch.Tensor], state: TrainerState, *, save_total_limit: int) -> None:
    """Write checkpoint-<step> atomically, with its checksums; then remove all but the newest `save_total_limit`.

    Raises OSError when it cannot be written; earlier checkpoints are then left unchanged.
    """
    with atomic_directory(checkpoints / f"checkpoint-{state.step}") as folder:
        save_file(tensors, folder / TENSORS)
        content = {"schema_version": schema.CHECKPOINT, "job_version": __version__, **asdict(state)}
        (folder / STATE).write_text(json.dumps(content), encoding="utf-8")
        (folder / CHECKSUMS).write_text(json.dumps(checksum_files(folder, folder.iterdir())), encoding="utf-8")
    for old in _newest_first(checkpoints)[save_total_limit:]:
        shutil.rmtree(old, ignore_errors=True)


def load_newest(checkpoints: Path) -> tuple[dict[str, torch.Tensor], TrainerState] | None:
    """Load the tensors and the state of the newest intact checkpoint; log a warning for each damaged one.

    Raises InvalidInputError for a checkpoint that another version wrote in a form, or with a meaning, of its own, and
    for one that this user may not read: to train from the beginning instead would waste what is there.
    """
    for folder in _newest_first(checkpoints):
        try:
            recorded = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8"))
            mismatch = find_mismatch(folder, {TENSORS: recorded[TENSORS], STATE: recorded[STATE]})
            if mismatch is not None:
                raise ValueError(mismatch)
            content = json.loads((folder / STATE).read_text(encoding="utf-8"))
            tensors = load_file(folder / TENSORS)
        except PermissionError as error:
            raise schema.unreadable(folder, error) from error
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            log.warning("train: %s cannot be used (%s); trying the checkpoint before it", folder, error)
            continue
        return tensors, _state(folder, content)
    return None


def _state(folder: Path, content: dict[str, Any]) -> TrainerState:
    """Return the state that an intact checkpoint holds; raise InvalidInputError if another version wrote it."""
    version = content.pop("job_version", None)
    schema.check_checkpoint(folder, content, "an earlier version" if version is None else f"version {version}")
    content.pop("schema_version", None)
    return TrainerState(**content)


def _newest_first(checkpoints: Path) -> list[Path]:
    numbered = [
        (int(m[1]), path) for path in checkpoints.glob("*") if (m := re.fullmatch(r"checkpoint-(\d+)", path.name))
    ]
    return [path for _, path in sorted(numbered, reverse=True)]
