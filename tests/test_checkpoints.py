"""A checkpoint is whole or it is not used."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from job.training import checkpoints
from job.training.checkpoints import TrainerState


def saved(folder: Path, *steps: int) -> None:
    for step in steps:
        checkpoints.save(
            folder,
            {"a": torch.full((3,), float(step))},
            TrainerState(step=step, micro_batch_tokens=7),
            save_total_limit=2,
        )


def test_what_is_saved_is_read_back_and_only_the_newest_two_are_kept(tmp_path: Path) -> None:
    saved(tmp_path, 2, 9, 10)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-9"]
    found = checkpoints.load_newest(tmp_path)
    assert found is not None
    tensors, progress = found
    assert tensors["a"].tolist() == [10.0] * 3
    assert progress == TrainerState(step=10, micro_batch_tokens=7)


@pytest.mark.parametrize("damage", ["altered", "cut", "no state", "torn state", "altered state", "no seal"])
def test_one_that_is_torn_or_altered_is_named_and_passed_over(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    saved(tmp_path, 1, 2)
    tensors, state = (tmp_path / "checkpoint-2" / name for name in (checkpoints.TENSORS, checkpoints.STATE))
    if damage == "altered":
        tensors.write_bytes(tensors.read_bytes()[:-1] + b"?")
    elif damage == "cut":
        tensors.write_bytes(tensors.read_bytes()[:-1])
    elif damage == "no state":
        state.unlink()
    elif damage == "no seal":
        (tmp_path / "checkpoint-2" / checkpoints.CHECKSUMS).unlink()
    elif damage == "altered state":
        state.write_text(state.read_text().replace('"micro_batch_tokens": 7', '"micro_batch_tokens": 8'))
    else:
        state.write_text(state.read_text()[:-1])
    found = checkpoints.load_newest(tmp_path)
    assert found is not None
    assert found[1].step == 1
    assert "checkpoint-2 cannot be used" in caplog.text


def test_there_may_be_none(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-3.tmp").mkdir()
    assert checkpoints.load_newest(tmp_path) is None
