"""Checkpoints of training: whole or absent."""

from __future__ import annotations

import json
import logging
import re
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from job.runs.atomic import atomic_directory
from job.runs.checksums import checksum_files, find_mismatch

log = logging.getLogger(__name__)

TENSORS, STATE, CHECKSUMS = "tensors.safetensors", "state.json", "checksums.json"


@dataclass
class TrainerState:
    """How far training is; with the tensors, all that a resume needs.

    Dropout and the order of examples follow from seed and step, so no random state is kept.
    """

    step: int = 0
    """Optimizer steps done."""
    micro_batch_tokens: int = 0
    recompute: bool = False
    loss_scale: dict[str, float] = field(default_factory=dict)
    steps: list[dict[str, float]] = field(default_factory=list)
    """For each step the sum of its losses, its label tokens, gradient norm and learning rate."""
    seconds: float = 0.0
    """Of training, in all processes together."""


def save(checkpoints: Path, tensors: dict[str, torch.Tensor], progress: TrainerState, *, save_total_limit: int) -> None:
    """Write checkpoint-<step> atomically, with its checksums; then remove all but the newest `save_total_limit`.

    Raises OSError when it cannot be written; those before are as they were then.
    """
    with atomic_directory(checkpoints / f"checkpoint-{progress.step}") as folder:
        save_file(tensors, folder / TENSORS)
        (folder / STATE).write_text(json.dumps(asdict(progress)), encoding="utf-8")
        (folder / CHECKSUMS).write_text(json.dumps(checksum_files(folder, folder.iterdir())), encoding="utf-8")
    for old in _newest_first(checkpoints)[save_total_limit:]:
        shutil.rmtree(old, ignore_errors=True)


def load_newest(checkpoints: Path) -> tuple[dict[str, torch.Tensor], TrainerState] | None:
    """The newest checkpoint that is as it was written; one that is not is named and passed over."""
    for folder in _newest_first(checkpoints):
        try:
            sealed = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8"))
            if (why := find_mismatch(folder, {TENSORS: sealed[TENSORS], STATE: sealed[STATE]})) is not None:
                raise ValueError(why)
            progress = TrainerState(**json.loads((folder / STATE).read_text(encoding="utf-8")))
            return load_file(folder / TENSORS), progress
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            log.warning("train: %s cannot be used (%s); going back to the one before", folder, error)
    return None


def _newest_first(checkpoints: Path) -> list[Path]:
    numbered = [
        (int(m[1]), path) for path in checkpoints.glob("*") if (m := re.fullmatch(r"checkpoint-(\d+)", path.name))
    ]
    return [path for _, path in sorted(numbered, reverse=True)]
