"""The train chapter: what it refuses, warns of and returns."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import zoo
from tiny_training import make_examples, make_model, read_log, train_tiny
from torch.optim.optimizer import register_optimizer_step_post_hook

from job.dataset.tokenization import IGNORE_INDEX
from job.errors import DivergedError, InvalidInputError
from job.system.device import ComputeSpec
from job.types import EncodedExample


def test_training_lowers_the_loss_and_returns_it(tmp_path: Path, llama: Path) -> None:
    result = train_tiny(tmp_path, llama, max_steps=20, learning_rate=1e-2, logging_steps=5)
    log = read_log(tmp_path)
    assert (result.steps, result.first_loss, result.last_loss) == (20, log[0]["loss"], log[-1]["loss"])
    assert result.last_loss < 0.96 * result.first_loss
    assert result.seconds > 0


def test_examples_without_a_label_are_refused(tmp_path: Path, llama: Path) -> None:
    examples = [*make_examples(1), EncodedExample([5, 6, 7], [IGNORE_INDEX] * 3)]
    with pytest.raises(InvalidInputError, match="1 of 2 examples have no label token"):
        train_tiny(tmp_path, llama, examples=examples)


@pytest.mark.parametrize(("warmup_steps", "warned"), [(1, False), (2, True)])
def test_a_warm_up_as_long_as_training_is_warned_of(
    tmp_path: Path, llama: Path, caplog: pytest.LogCaptureFixture, warmup_steps: int, warned: bool
) -> None:
    train_tiny(tmp_path, llama, max_steps=2, warmup_steps=warmup_steps)
    assert ("the learning rate never reaches its peak" in caplog.text) == warned


def test_adapters_that_are_not_finite_at_the_end_are_refused(tmp_path: Path, llama: Path) -> None:
    model = make_model(llama)

    def break_weights(*_: object) -> None:
        next(p for p in model.parameters() if p.requires_grad).data.fill_(float("inf"))

    hook = register_optimizer_step_post_hook(break_weights)
    try:
        with pytest.raises(DivergedError, match="not finite after training"):
            train_tiny(tmp_path, llama, model=model, max_steps=1)
    finally:
        hook.remove()


def test_a_loss_that_is_not_finite_ends_training(tmp_path: Path, llama: Path) -> None:
    model = make_model(llama)
    next(p for name, p in model.named_parameters() if "lora_B" in name).data.fill_(torch.nan)
    with pytest.raises(DivergedError, match="the loss is nan at step 1"):
        train_tiny(tmp_path, llama, model=model)


def test_adapters_without_any_effect_are_warned_of(
    tmp_path: Path, llama: Path, caplog: pytest.LogCaptureFixture
) -> None:
    zoo.save_model("doge", tmp_path / "doge")  # its mask, made by dt_proj, passes no gradient
    model = make_model(tmp_path / "doge", std=0.0, targets=("dt_proj", "q_proj"))
    train_tiny(tmp_path / "run", tmp_path / "doge", model=model, max_steps=2, warmup_steps=1)
    assert "the adapters on dt_proj have no effect" in caplog.text
    caplog.clear()
    train_tiny(tmp_path / "all", llama, model=make_model(llama, std=0.0), max_steps=2, warmup_steps=1)
    assert "no effect" not in caplog.text


def test_activations_are_never_recomputed_where_transformers_cannot(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    zoo.save_model("ctrl", tmp_path / "ctrl")
    model = make_model(tmp_path / "ctrl")
    monkeypatch.setattr(ComputeSpec, "free_memory", lambda self: 0.0)
    train_tiny(tmp_path / "run", tmp_path / "ctrl", model=model, max_steps=1)
    assert "activations cannot be recomputed for the architecture ctrl" in caplog.text
