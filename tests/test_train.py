"""Training takes the same steps as the plain recipe, from less work."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
from conftest import CPU

from job.data import NO_LOSS
from job.freeze import freeze
from job.lora import add_adapters
from job.quantize import load_model, load_tokenizer
from job.results import Diverged, Encoded
from job.run_folder import RunFolder
from job.settings import Base, Lora, Train
from job.train import Collator, train


def examples(n: int, *, loss_on_all: bool = False) -> list[Encoded]:
    """Examples of many lengths, their last tokens labelled."""
    generator = torch.Generator().manual_seed(n)
    made = []
    for i in range(n):
        ids = torch.randint(10, 500, (5 + (7 * i) % 23,), generator=generator).tolist()
        unlabelled = 0 if loss_on_all else len(ids) - 2 - i % 3
        made.append(Encoded(ids, [NO_LOSS] * unlabelled + ids[unlabelled:]))
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
    run = RunFolder(path, {"timings": {}})
    run.begin("cpu")
    return run


def test_the_collator_keeps_the_positions_whose_next_token_is_a_label() -> None:
    batch = Collator(pad_token_id=9)([Encoded([1, 2, 3, 4], [-100, -100, 3, 4]), Encoded([5, 6], [5, 6])])
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4], [5, 6, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch["logits_to_keep"].tolist() == [[False, True, True, False], [True, False, False, False]]
    assert batch["shift_labels"].tolist() == [3, 4, 6]


@pytest.mark.parametrize("architecture", ["bloom", "llama"])
@pytest.mark.parametrize("quantize", ["int8", "none"])
@pytest.mark.parametrize("loss_on_all", [False, True])
def test_loss_and_gradients_of_a_step_are_those_of_the_full_computation(
    request: pytest.FixtureRequest, tmp_path: Path, architecture: str, quantize: str, loss_on_all: bool
) -> None:
    folder = request.getfixturevalue(architecture)
    rows = examples(11, loss_on_all=loss_on_all)  # micro-batches of 4, 4 and a last one of 3

    model = adapted(folder, quantize).train()
    summed, labelled = torch.zeros(()), 0
    for row in rows:  # no padding, no accumulation, every logit: what the recipe's formula says
        logits = model(input_ids=torch.tensor([row.input_ids])).logits[0, :-1]
        labels = torch.tensor(row.labels[1:])
        summed = summed + torch.nn.functional.cross_entropy(logits, labels, ignore_index=NO_LOSS, reduction="sum")
        labelled += int((labels != NO_LOSS).sum())
    (summed / labelled).backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    seen: dict[str, torch.Tensor] = {}
    model = adapted(folder, quantize)
    real_step = torch.optim.AdamW.step

    def step(optimizer: torch.optim.AdamW, *arguments: object, **keywords: object) -> object:
        seen.update({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        return real_step(optimizer, *arguments, **keywords)

    settings = Train(max_steps=1, batch_size=4, accumulation=3, warmup_steps=0, logging_steps=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", step)
        patch.setattr("accelerate.Accelerator.clip_grad_norm_", lambda *_, **__: torch.zeros(()))
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


def trained_on(tmp_path: Path, folder: Path, **knobs: object) -> list[dict[str, float]]:
    settings = Train.model_validate({"max_steps": 6, "warmup_steps": 2, "logging_steps": 2, "save_steps": 2, **knobs})
    run = run_folder(tmp_path)
    train(
        adapted(folder),
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
    (tmp_path / "checkpoints" / "checkpoint-6" / "trainer_state.json").unlink()
    assert [entry["loss"] for entry in trained_on(tmp_path, llama)] == [entry["loss"] for entry in whole]


def test_checkpointing_gives_the_same_losses(tmp_path: Path, bloom: Path) -> None:
    on = trained_on(tmp_path / "on", bloom, checkpointing="on")
    off = trained_on(tmp_path / "off", bloom, checkpointing="off")
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
    with pytest.raises(Diverged, match="not finite after training"):
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
    with pytest.raises(Diverged, match="the loss is nan at step 1"):
        train(
            model,
            examples(20),
            Train(max_steps=4),
            tokenizer=load_tokenizer(Base(model=str(llama))),
            machine=CPU,
            run=run_folder(tmp_path),
        )
