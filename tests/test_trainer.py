"""The training loop: the recipe's steps, resumed bitwise, and continued when memory or disk runs out."""

from __future__ import annotations

import json
import math
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_training import make_examples, make_model, read_log, train_tiny, trained_weights
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from transformers import get_scheduler

from job.dataset.tokenization import IGNORE_INDEX
from job.errors import JobError
from job.settings import Train
from job.system import logging_setup
from job.training import checkpoints, optimizer
from job.training.packing import PackedAttention
from job.training.trainer import learning_rate
from job.types import EncodedExample

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("architecture", ["bloom", "llama"])
@pytest.mark.parametrize("quantize", ["int8", "none"])
@pytest.mark.parametrize(
    ("label_all", "micro_batch_tokens", "packed"), [(False, None, True), (True, 40, True), (False, 40, False)]
)
def test_loss_and_gradients_equal_the_full_computation(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    architecture: str,
    quantize: str,
    label_all: bool,
    micro_batch_tokens: int | None,
    packed: bool,
) -> None:
    base = request.getfixturevalue(architecture)
    examples = make_examples(11, label_all=label_all)

    model = make_model(base, quantize).train()
    summed, label_tokens = torch.zeros(()), 0
    for example in examples:  # the recipe's formula: no padding, no accumulation, every logit
        logits = model(input_ids=torch.tensor([example.input_ids])).logits[0, :-1]
        labels = torch.tensor(example.labels[1:])
        summed = summed + torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum")
        label_tokens += int((labels != IGNORE_INDEX).sum())
    (summed / label_tokens).backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    model = make_model(base, quantize)
    found: dict[str, torch.Tensor] = {}
    monkeypatch.setattr(PackedAttention, "supports", lambda model: packed)
    monkeypatch.setattr(optimizer, "MAX_GRAD_NORM", math.inf)
    hook = register_optimizer_step_pre_hook(
        lambda *_: found.update({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    )
    try:
        result = train_tiny(
            tmp_path,
            base,
            model=model,
            examples=examples,
            max_steps=1,
            batch_size=11,
            gradient_accumulation_steps=1,
            warmup_steps=0,
            micro_batch_tokens=micro_batch_tokens,
        )
    finally:
        hook.remove()
    assert result.first_loss == pytest.approx(float(summed.detach() / label_tokens), rel=1e-5)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient is not None
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


def test_the_log_has_the_first_the_last_and_every_nth_step(tmp_path: Path, llama: Path) -> None:
    train_tiny(tmp_path, llama, max_steps=12, learning_rate=1e-2, logging_steps=5)
    log = read_log(tmp_path)
    assert [entry["step"] for entry in log] == [1, 5, 10, 12]
    assert max(entry["learning_rate"] for entry in log) <= 1e-2
    assert {"loss", "learning_rate", "grad_norm", "epoch"} <= log[0].keys()


def test_a_run_resumes_from_its_newest_checkpoint(tmp_path: Path, llama: Path) -> None:
    train_tiny(tmp_path / "complete", llama)
    train_tiny(tmp_path / "cut", llama)
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "checkpoint-6")
    train_tiny(tmp_path / "cut", llama)
    assert read_log(tmp_path / "cut") == read_log(tmp_path / "complete")


def test_a_damaged_checkpoint_is_not_used(tmp_path: Path, llama: Path) -> None:
    train_tiny(tmp_path, llama)
    expected = read_log(tmp_path)
    tensors = tmp_path / "checkpoints" / "checkpoint-6" / "tensors.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-1] + b"?")
    train_tiny(tmp_path, llama)
    assert read_log(tmp_path) == expected


def test_a_checkpoint_is_saved_after_save_minutes(tmp_path: Path, llama: Path) -> None:
    train_tiny(tmp_path, llama, save_steps=1000, save_minutes=1e-9, save_total_limit=3)
    saved = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert saved == ["checkpoint-4", "checkpoint-5", "checkpoint-6"]


def test_training_continues_when_no_checkpoint_can_be_written(
    tmp_path: Path, llama: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train_tiny(tmp_path / "complete", llama)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "checkpoints").symlink_to("/proc/self", target_is_directory=True)
    train_tiny(tmp_path / "full", llama)
    assert read_log(tmp_path / "full") == read_log(tmp_path / "complete")
    assert "the checkpoint of step 2 could not be written to" in caplog.text
    assert "after an interruption, training would resume from the beginning" in caplog.text


@pytest.mark.parametrize("architecture", ["bloom", "llama"])
def test_gradient_checkpointing_does_not_change_the_losses(
    request: pytest.FixtureRequest, tmp_path: Path, architecture: str
) -> None:
    base = request.getfixturevalue(architecture)
    losses = {}
    for setting in ("on", "off"):
        model = make_model(base, dropout=0.3)
        train_tiny(tmp_path / setting, base, model=model, gradient_checkpointing=setting)
        losses[setting] = [entry["loss"] for entry in read_log(tmp_path / setting)]
    assert losses["on"] == pytest.approx(losses["off"], rel=1e-5)


class InputCancellation(BaseException):
    """The exception that Modal raises at an input's timeout."""


class InterruptedExamples(list[EncodedExample]):
    """Examples that raise `error` when they are read after `steps` steps of 16 examples."""

    def __init__(self, examples: list[EncodedExample], steps: int, error: type[BaseException]) -> None:
        super().__init__(examples)
        self._reads_left = 16 * steps
        self._error = error

    def __getitem__(self, index: int) -> EncodedExample:  # type: ignore[override]
        if self._reads_left == 0:
            raise self._error
        self._reads_left -= 1
        return super().__getitem__(index)


RESUMED = {"save_steps": 4, "logging_steps": 3, "weight_averaging": 0.5}


def assert_resumes_bitwise(base: Path, interrupted: Path, complete: Path) -> None:
    expected, model = make_model(base, dropout=0.3), make_model(base, dropout=0.3)
    train_tiny(complete, base, model=expected, **RESUMED)
    train_tiny(interrupted, base, model=model, **RESUMED)
    assert read_log(interrupted) == read_log(complete)
    weights = trained_weights(model)
    for name, tensor in trained_weights(expected).items():
        assert torch.equal(weights[name], tensor), name


@pytest.mark.parametrize(
    ("steps", "error"),
    [(1, KeyboardInterrupt), (2, KeyboardInterrupt), (5, KeyboardInterrupt), (3, InputCancellation)],
)
def test_an_interrupted_run_ends_bitwise_like_an_uninterrupted_one(
    tmp_path: Path, llama: Path, steps: int, error: type[BaseException]
) -> None:
    examples = InterruptedExamples(make_examples(20), steps, error)
    with pytest.raises(error):
        train_tiny(tmp_path / "cut", llama, model=make_model(llama, dropout=0.3), examples=examples, **RESUMED)
    newest = checkpoints.load_newest(tmp_path / "cut" / "checkpoints")
    assert newest is not None
    assert newest[1].step == steps, "the last complete step is saved"
    assert_resumes_bitwise(llama, tmp_path / "cut", tmp_path / "complete")


def test_an_interruption_within_a_step_saves_no_half_step(tmp_path: Path, llama: Path) -> None:
    updates = 0

    def interrupt(*_: object) -> None:
        nonlocal updates
        updates += 1
        if updates == 6:
            raise InputCancellation

    hook = register_optimizer_step_post_hook(interrupt)
    try:
        with pytest.raises(InputCancellation):
            train_tiny(tmp_path / "cut", llama, model=make_model(llama, dropout=0.3), **RESUMED)
    finally:
        hook.remove()
    newest = checkpoints.load_newest(tmp_path / "cut" / "checkpoints")
    assert newest is not None
    assert newest[1].step == 4
    assert_resumes_bitwise(llama, tmp_path / "cut", tmp_path / "complete")


def test_weight_averaging_is_the_mean_over_the_last_steps(tmp_path: Path, llama: Path) -> None:
    constant = {"lr_scheduler_type": "constant", "learning_rate": 0.01}
    after = {}
    for steps in (4, 5, 6):
        model = make_model(llama)
        train_tiny(tmp_path / str(steps), llama, model=model, max_steps=steps, **constant)
        after[steps] = trained_weights(model)
    model = make_model(llama)
    train_tiny(tmp_path / "mean", llama, model=model, weight_averaging=0.5, **constant)
    for name, tensor in trained_weights(model).items():
        assert not torch.allclose(tensor, after[6][name])
        torch.testing.assert_close(tensor, sum(weights[name] for weights in after.values()) / 3)


def test_out_of_memory_halves_the_micro_batches_and_no_more(
    tmp_path: Path, bloom: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    train_tiny(tmp_path / "large", bloom, micro_batch_tokens=1000)
    model = make_model(bloom)
    body = model.get_base_model().base_model
    forward = body.forward

    def small(input_ids: torch.Tensor, **inputs: object) -> object:
        if input_ids.numel() > 100:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(input_ids, **inputs)

    monkeypatch.setattr(body, "forward", small)
    train_tiny(tmp_path / "small", bloom, model=model, micro_batch_tokens=1000)
    losses = [[entry["loss"] for entry in read_log(tmp_path / name)] for name in ("small", "large")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert "micro-batches now have at most 62 tokens" in caplog.text
    manifest = json.loads((tmp_path / "small" / "manifest.json").read_text())
    assert manifest["batch_plan"] == {"micro_batch_tokens": 62, "parts": 1, "recompute": False}


def test_training_survives_real_memory_exhaustion(tmp_path: Path, llama: Path) -> None:
    """In a process that the kernel allows 50 MB more than the loaded model takes."""
    done = subprocess.run(
        [sys.executable, __file__, str(llama), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests")))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "train: out of memory; micro-batches now have at most" in done.stderr
    enough, scarce = (json.loads(line) for line in done.stdout.splitlines())
    assert scarce["loss"] == pytest.approx(enough["loss"], rel=1e-5)
    assert 1000 <= scarce["micro_batch_tokens"] <= 25_000


def train_with_little_memory(base: Path, scratch: Path) -> None:
    logging_setup.configure()
    examples = [
        EncodedExample([10 + (7 * i + j) % 500 for j in range(400)], [IGNORE_INDEX] * 390 + [11] * 10)
        for i in range(64)
    ]
    settings = {"max_steps": 2, "warmup_steps": 0, "batch_size": 64, "gradient_accumulation_steps": 1}
    for micro_batch_tokens in (1000, 100_000):
        path, model = scratch / str(micro_batch_tokens), make_model(base)
        if micro_batch_tokens == 100_000:
            held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (held + 50 * 2**20, resource.RLIM_INFINITY))
        result = train_tiny(
            path, base, model=model, examples=examples, micro_batch_tokens=micro_batch_tokens, **settings
        )
        plan = json.loads((path / "manifest.json").read_text())["batch_plan"]
        print(json.dumps({"loss": result.last_loss, "micro_batch_tokens": plan["micro_batch_tokens"]}))


def test_memory_that_never_suffices_ends_the_job(
    tmp_path: Path, bloom: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_model(bloom)

    def fail(**_: object) -> object:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(model.get_base_model().base_model, "forward", fail)
    with pytest.raises(JobError, match="out of memory with one example of 27 tokens"):
        train_tiny(tmp_path, bloom, model=model)
    assert "activations are now recomputed" in caplog.text


@pytest.mark.parametrize(
    ("schedule", "name"), [("linear", "linear"), ("cosine", "cosine"), ("constant", "constant_with_warmup")]
)
def test_learning_rates_equal_those_of_transformers(schedule: str, name: str) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2e-4)
    scheduler = get_scheduler(name, optimizer, 5, 20)
    settings = Train.model_validate(
        {"max_steps": 20, "warmup_steps": 5, "learning_rate": 2e-4, "lr_scheduler_type": schedule}
    )
    for step in range(20):
        assert learning_rate(settings, step) == pytest.approx(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()


if __name__ == "__main__":
    train_with_little_memory(Path(sys.argv[1]), Path(sys.argv[2]))
