"""Training takes the same steps as the plain recipe, from less work."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from conftest import CPU
from transformers import get_scheduler

from job.dataset.tokenization import IGNORE_INDEX
from job.errors import DivergedError, InvalidInputError, JobError
from job.freeze import freeze
from job.lora import add_adapters
from job.quantize import load_model, load_tokenizer
from job.runs.run_folder import RunFolder
from job.settings import Base, Lora, Train
from job.system import logging_setup
from job.train import train
from job.training import checkpoints
from job.training.batching import num_label_tokens
from job.training.packing import PackedAttention
from job.training.trainer import is_out_of_memory, learning_rate
from job.types import EncodedExample

ROOT = Path(__file__).parents[1]


def examples(n: int, *, loss_on_all: bool = False) -> list[EncodedExample]:
    """Examples of many lengths, their last tokens labelled."""
    generator = torch.Generator().manual_seed(n)
    made = []
    for i in range(n):
        ids = torch.randint(10, 500, (5 + (7 * i) % 23,), generator=generator).tolist()
        unlabelled = 0 if loss_on_all else len(ids) - 2 - i % 3
        made.append(EncodedExample(ids, [IGNORE_INDEX] * unlabelled + ids[unlabelled:]))
    return made


def adapted(folder: Path, quantize: str = "none") -> peft.PeftModel:
    model = load_model(Base.model_validate({"model": str(folder), "quantize": quantize}), CPU)
    freeze(model)
    model = add_adapters(model, Lora(dropout=0.0), seed=42)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at the start, and then nothing would reach lora_A
            torch.nn.init.normal_(parameter.data, std=0.02)
    return model


def run_folder(path: Path) -> RunFolder:
    manifest = {"schema_version": 1, "status": "running", "settings": {}, "dataset": {"fingerprint": "f"}}
    run = RunFolder(path, {**manifest, "versions": {}, "timings": {}})
    run.begin("cpu")
    return run


@pytest.mark.parametrize("architecture", ["bloom", "llama"])
@pytest.mark.parametrize("quantize", ["int8", "none"])
@pytest.mark.parametrize(
    ("loss_on_all", "micro_batch_tokens", "packed"), [(False, None, True), (True, 40, True), (False, 40, False)]
)
def test_loss_and_gradients_of_a_step_are_those_of_the_full_computation(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    architecture: str,
    quantize: str,
    loss_on_all: bool,
    micro_batch_tokens: int | None,
    packed: bool,
) -> None:
    folder = request.getfixturevalue(architecture)
    rows = examples(11, loss_on_all=loss_on_all)

    model = adapted(folder, quantize).train()
    summed, labelled = torch.zeros(()), 0
    for row in rows:  # no padding, no accumulation, every logit: what the recipe's formula says
        logits = model(input_ids=torch.tensor([row.input_ids])).logits[0, :-1]
        labels = torch.tensor(row.labels[1:])
        summed = summed + torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum")
        labelled += int((labels != IGNORE_INDEX).sum())
    (summed / labelled).backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    seen: dict[str, torch.Tensor] = {}
    model = adapted(folder, quantize)
    real_step = torch.optim.AdamW.step

    def step(optimizer: torch.optim.AdamW, *arguments: object, **keywords: object) -> object:
        seen.update({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        return real_step(optimizer, *arguments, **keywords)

    settings = Train(
        max_steps=1, batch_size=11, gradient_accumulation_steps=1, warmup_steps=0, micro_batch_tokens=micro_batch_tokens
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", step)
        patch.setattr(PackedAttention, "supports", lambda model: packed)
        patch.setattr("torch.nn.utils.clip_grad_norm_", lambda *_, **__: torch.zeros(()))
        trained = train(
            model,
            rows,
            settings,
            tokenizer=load_tokenizer(Base(model=str(folder))),
            machine=CPU,
            run=run_folder(tmp_path / "run"),
        )
    assert trained.first_loss == pytest.approx(float(summed.detach() / labelled), rel=1e-5)
    assert seen.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient is not None
        torch.testing.assert_close(seen[name], gradient, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


def trained_on(
    tmp_path: Path, folder: Path, *, model: peft.PeftModel | None = None, **knobs: object
) -> list[dict[str, float]]:
    settings = Train.model_validate({"max_steps": 6, "warmup_steps": 2, "logging_steps": 2, "save_steps": 2, **knobs})
    run = run_folder(tmp_path)
    train(
        model or adapted(folder),
        examples(20),
        settings,
        tokenizer=load_tokenizer(Base(model=str(folder))),
        machine=CPU,
        run=run,
    )
    return [json.loads(line) for line in (run.path / "log.jsonl").read_text().splitlines()]


def test_the_log_holds_loss_and_learning_rate_and_training_lowers_the_loss(tmp_path: Path, llama: Path) -> None:
    log = trained_on(tmp_path, llama, max_steps=20, learning_rate=1e-2, logging_steps=5)
    assert [entry["step"] for entry in log] == [1, 5, 10, 15, 20]
    assert log[-1]["loss"] < 0.96 * log[0]["loss"]
    assert max(entry["learning_rate"] for entry in log) <= 1e-2
    assert {"loss", "learning_rate", "grad_norm", "epoch"} <= log[0].keys()


def test_a_run_with_checkpoints_goes_on_from_the_newest(tmp_path: Path, llama: Path) -> None:
    whole = trained_on(tmp_path / "whole", llama)
    trained_on(tmp_path / "cut", llama)
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "checkpoint-6")
    resumed = trained_on(tmp_path / "cut", llama)
    assert [entry["loss"] for entry in resumed] == [entry["loss"] for entry in whole]


def test_a_checkpoint_that_was_cut_off_is_passed_over(tmp_path: Path, llama: Path) -> None:
    whole = trained_on(tmp_path, llama)
    weights = tmp_path / "checkpoints" / "checkpoint-6" / "tensors.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    assert [entry["loss"] for entry in trained_on(tmp_path, llama)] == [entry["loss"] for entry in whole]


def test_a_checkpoint_is_made_when_the_last_is_old_and_so_many_are_kept(tmp_path: Path, llama: Path) -> None:
    trained_on(tmp_path, llama, save_steps=1000, save_minutes=1e-9, save_total_limit=3)
    checkpoints = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert checkpoints == ["checkpoint-4", "checkpoint-5", "checkpoint-6"]


def test_a_folder_that_takes_no_checkpoint_is_said_and_training_goes_on(
    tmp_path: Path, llama: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = trained_on(tmp_path / "whole", llama)
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "checkpoints").symlink_to("/proc/self", target_is_directory=True)
    assert trained_on(tmp_path / "cut", llama) == whole
    assert "step 2 could not be written to" in caplog.text
    assert "an interruption would go back to the beginning" in caplog.text


@pytest.mark.parametrize("architecture", ["bloom", "llama"])
def test_checkpointing_gives_the_same_losses(request: pytest.FixtureRequest, tmp_path: Path, architecture: str) -> None:
    folder = request.getfixturevalue(architecture)
    on = trained_on(tmp_path / "on", folder, model=with_dropout(folder), gradient_checkpointing="on")
    off = trained_on(tmp_path / "off", folder, model=with_dropout(folder), gradient_checkpointing="off")
    assert [e["loss"] for e in on] == pytest.approx([e["loss"] for e in off], rel=1e-5)


def test_adapters_that_are_not_finite_at_the_end_stop_the_run(
    tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted(llama)
    real_step = torch.optim.AdamW.step

    def step(optimizer: torch.optim.AdamW, *arguments: object, **keywords: object) -> object:
        done = real_step(optimizer, *arguments, **keywords)
        next(p for p in model.parameters() if p.requires_grad).data.fill_(float("inf"))
        return done

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    with pytest.raises(DivergedError, match="not finite after training"):
        train(
            model,
            examples(20),
            Train(max_steps=1),
            tokenizer=load_tokenizer(Base(model=str(llama))),
            machine=CPU,
            run=run_folder(tmp_path),
        )


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(tmp_path: Path, llama: Path) -> None:
    model = adapted(llama)
    next(p for name, p in model.named_parameters() if "lora_B" in name).data.fill_(float("nan"))
    with pytest.raises(DivergedError, match="the loss is nan at step 1"):
        train(
            model,
            examples(20),
            Train(max_steps=4),
            tokenizer=load_tokenizer(Base(model=str(llama))),
            machine=CPU,
            run=run_folder(tmp_path),
        )


def state(model: peft.PeftModel) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def with_dropout(folder: Path) -> peft.PeftModel:
    model = load_model(Base.model_validate({"model": str(folder), "quantize": "none"}), CPU)
    freeze(model)
    return add_adapters(model, Lora(dropout=0.3), seed=42)


class InputCancellation(BaseException):
    """What Modal raises when an input's time is over."""


@pytest.mark.parametrize(
    ("interrupted_at", "by"),
    [(1, KeyboardInterrupt), (2, KeyboardInterrupt), (5, KeyboardInterrupt), (3, InputCancellation)],
)
def test_a_run_that_was_interrupted_ends_bitwise_as_one_that_was_not(
    tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch, interrupted_at: int, by: type[BaseException]
) -> None:
    model = with_dropout(llama)
    knobs = {"save_steps": 4, "logging_steps": 3, "weight_averaging": 0.5}
    whole = trained_on(tmp_path / "whole", llama, model=model, **knobs)
    expected = state(model)

    calls = 0

    def interrupt(*_: object, **__: object) -> None:
        nonlocal calls
        calls += 1
        if calls > interrupted_at:
            raise by

    with monkeypatch.context() as patch:
        patch.setattr(
            "job.training.trainer.num_label_tokens", lambda examples: interrupt() or num_label_tokens(examples)
        )
        with pytest.raises(by):
            trained_on(tmp_path / "cut", llama, model=with_dropout(llama), **knobs)
    newest = checkpoints.load_newest(tmp_path / "cut" / "checkpoints")
    assert newest is not None
    assert newest[1].step == interrupted_at, "the last whole step is saved"
    model = with_dropout(llama)
    assert trained_on(tmp_path / "cut", llama, model=model, **knobs) == whole
    for name, tensor in state(model).items():
        assert torch.equal(tensor, expected[name]), name


def test_the_adapter_is_the_mean_of_the_weights_after_the_last_steps(tmp_path: Path, llama: Path) -> None:
    after = {}
    for steps in (4, 5, 6):
        model = adapted(llama)
        trained_on(
            tmp_path / str(steps), llama, model=model, max_steps=steps, lr_scheduler_type="constant", learning_rate=0.01
        )
        after[steps] = state(model)
    model = adapted(llama)
    trained_on(
        tmp_path / "mean", llama, model=model, lr_scheduler_type="constant", learning_rate=0.01, weight_averaging=0.5
    )
    for name, tensor in state(model).items():
        assert not torch.allclose(tensor, after[6][name])
        torch.testing.assert_close(tensor, sum(weights[name] for weights in after.values()) / 3)


def test_out_of_memory_halves_the_micro_batches_and_changes_nothing_else(
    tmp_path: Path, bloom: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    whole = trained_on(tmp_path / "whole", bloom, micro_batch_tokens=1000)
    model = adapted(bloom)
    body = model.get_base_model().base_model
    forward = body.forward

    def small(input_ids: torch.Tensor, **more: object) -> object:
        if input_ids.numel() > 100:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(input_ids, **more)

    monkeypatch.setattr(body, "forward", small)
    log = trained_on(tmp_path / "small", bloom, model=model, micro_batch_tokens=1000)
    assert [e["loss"] for e in log] == pytest.approx([e["loss"] for e in whole], rel=1e-5)
    assert "at most 62 tokens from now on" in caplog.text
    assert json.loads((tmp_path / "small" / "manifest.json").read_text())["batch_plan"] == {
        "micro_batch_tokens": 62,
        "recompute": False,
    }


def test_memory_that_really_runs_out_is_survived(tmp_path: Path, llama: Path) -> None:
    """In a process that the kernel gives no more than 50 MB on top of what the model takes."""
    done = subprocess.run(
        [sys.executable, __file__, str(llama), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests")))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "train: out of memory; micro-batches have at most" in done.stderr
    enough, scarce = (json.loads(line) for line in done.stdout.splitlines())
    assert scarce["loss"] == pytest.approx(enough["loss"], rel=1e-5)
    assert 1000 <= scarce["micro_batch_tokens"] <= 25_000


def train_with_little_memory(folder: Path, scratch: Path) -> None:
    logging_setup.configure()
    long = [
        EncodedExample([10 + (7 * i + j) % 500 for j in range(400)], [IGNORE_INDEX] * 390 + [11] * 10)
        for i in range(64)
    ]
    for micro_batch_tokens in (1000, 100_000):
        model, run = adapted(folder), run_folder(scratch / str(micro_batch_tokens))
        settings = Train(
            max_steps=2,
            warmup_steps=0,
            batch_size=64,
            gradient_accumulation_steps=1,
            micro_batch_tokens=micro_batch_tokens,
        )
        tokenizer = load_tokenizer(Base(model=str(folder)))
        if micro_batch_tokens == 100_000:
            held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (held + 50 * 2**20, resource.RLIM_INFINITY))
        trained = train(model, long, settings, tokenizer=tokenizer, machine=CPU, run=run)
        print(
            json.dumps(
                {"loss": trained.last_loss, "micro_batch_tokens": run.manifest["batch_plan"]["micro_batch_tokens"]}
            )
        )


def test_memory_that_never_suffices_is_said_to_be_too_small(
    tmp_path: Path, bloom: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = adapted(bloom)

    def never(**_: object) -> object:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(model.get_base_model().base_model, "forward", never)
    with pytest.raises(JobError, match="out of memory with one example of 27 tokens"):
        trained_on(tmp_path, bloom, model=model)
    assert "activations are recomputed from now on" in caplog.text


def test_other_errors_are_not_taken_for_a_lack_of_memory() -> None:
    assert not is_out_of_memory(RuntimeError("shape mismatch"))
    assert is_out_of_memory(MemoryError())


def test_examples_without_a_label_are_refused(tmp_path: Path, llama: Path) -> None:
    with pytest.raises(InvalidInputError, match="1 of 2 examples have no token with a loss"):
        train(
            adapted(llama),
            [*examples(1), EncodedExample([5, 6, 7], [IGNORE_INDEX] * 3)],
            Train(max_steps=1),
            tokenizer=load_tokenizer(Base(model=str(llama))),
            machine=CPU,
            run=run_folder(tmp_path),
        )


@pytest.mark.parametrize(
    ("schedule", "name"), [("linear", "linear"), ("cosine", "cosine"), ("constant", "constant_with_warmup")]
)
def test_the_learning_rate_follows_the_schedule_as_the_library_s_does(schedule: str, name: str) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2e-4)
    theirs = get_scheduler(name, optimizer, 5, 20)
    settings = Train.model_validate(
        {"max_steps": 20, "warmup_steps": 5, "learning_rate": 2e-4, "lr_scheduler_type": schedule}
    )
    for step in range(20):
        assert learning_rate(settings, step) == pytest.approx(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()


if __name__ == "__main__":
    train_with_little_memory(Path(sys.argv[1]), Path(sys.argv[2]))
