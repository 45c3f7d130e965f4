"""Checkpoints are loaded only if they are complete and unchanged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from job import __version__
from job.errors import InvalidInputError
from job.runs import schema
from job.runs.checksums import checksum_files
from job.training import checkpoints
from job.training.checkpoints import TrainerState


def save(folder: Path, *steps: int) -> None:
    for step in steps:
        checkpoints.save(
            folder,
            {"a": torch.full((3,), float(step))},
            TrainerState(step=step, micro_batch_tokens=7),
            save_total_limit=2,
        )


def test_the_newest_of_the_kept_checkpoints_is_loaded(tmp_path: Path) -> None:
    save(tmp_path, 2, 9, 10)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-9"]
    found = checkpoints.load_newest(tmp_path)
    assert found is not None
    tensors, state = found
    assert tensors["a"].tolist() == [10.0] * 3
    assert state == TrainerState(step=10, micro_batch_tokens=7)


@pytest.mark.parametrize(
    "damage", ["changed", "truncated", "no state", "truncated state", "changed state", "no checksums"]
)
def test_a_damaged_checkpoint_is_named_and_skipped(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 1, 2)
    tensors, state = (tmp_path / "checkpoint-2" / name for name in (checkpoints.TENSORS, checkpoints.STATE))
    if damage == "changed":
        tensors.write_bytes(tensors.read_bytes()[:-1] + b"?")
    elif damage == "truncated":
        tensors.write_bytes(tensors.read_bytes()[:-1])
    elif damage == "no state":
        state.unlink()
    elif damage == "no checksums":
        (tmp_path / "checkpoint-2" / checkpoints.CHECKSUMS).unlink()
    elif damage == "changed state":
        state.write_text(state.read_text().replace('"micro_batch_tokens": 7', '"micro_batch_tokens": 8'))
    else:
        state.write_text(state.read_text()[:-1])
    found = checkpoints.load_newest(tmp_path)
    assert found is not None
    assert found[1].step == 1
    assert "checkpoint-2 cannot be used" in caplog.text


def test_an_intact_checkpoint_of_another_version_is_refused_and_not_skipped(tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    folder = tmp_path / "checkpoint-2"
    state = json.loads((folder / checkpoints.STATE).read_text())
    assert state["schema_version"] == schema.CHECKPOINT
    for change, version in (({"schema_version": 99}, f"version {__version__}"), ({"schema_version": None}, "version")):
        (folder / checkpoints.STATE).write_text(json.dumps(state | change))
        sums = checksum_files(folder, [folder / checkpoints.TENSORS, folder / checkpoints.STATE])
        (folder / checkpoints.CHECKSUMS).write_text(json.dumps(sums))
        with pytest.raises(InvalidInputError, match=rf"checkpoint-2 was written by {version}.* \(checkpoint schema"):
            checkpoints.load_newest(tmp_path)


def test_without_a_complete_checkpoint_there_is_none(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-3.tmp").mkdir()
    assert checkpoints.load_newest(tmp_path) is None
