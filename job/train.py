"""Train the adapters with transformers' Trainer."""

from __future__ import annotations

import logging
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import (
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint

from job.data import NO_LOSS
from job.device import Machine
from job.results import Diverged, Encoded, Trained
from job.run_folder import RunFolder
from job.settings import Train

log = logging.getLogger(__name__)


def train(
    model: peft.PeftModel,
    examples: Sequence[Encoded],
    settings: Train,
    *,
    tokenizer: PreTrainedTokenizerBase,
    machine: Machine,
    run: RunFolder,
) -> Trained:
    """Train the model's adapters in place, from the run's newest checkpoint if it has one.

    The loss of a step is the mean over its label tokens, whatever the micro-batches.
    Raises Diverged when the loss is not finite.
    """
    if settings.checkpointing == "on":
        model.enable_input_require_grads()
    if settings.warmup_steps >= settings.max_steps:
        log.warning(
            "train: the learning rate never reaches its peak: TAGGER_TRAIN_WARMUP_STEPS=%d, TAGGER_TRAIN_MAX_STEPS=%d",
            settings.warmup_steps,
            settings.max_steps,
        )
    started = time.monotonic()
    history = _History(run)
    trainer = Trainer(
        model=model,
        args=_arguments(settings, machine, run.checkpoints),
        train_dataset=_Rows(examples),
        data_collator=Collator(tokenizer.pad_token_id),
        callbacks=[history],
    )
    for callback in list(trainer.callback_handler.callbacks):
        if type(callback).__name__ in ("ProgressCallback", "PrinterCallback"):
            trainer.remove_callback(callback)  # ours shows both
    checkpoint = _newest_whole(run.checkpoints)
    if checkpoint is not None and _steps(checkpoint) >= settings.max_steps:
        # the Trainer would take one more step
        log.info("train: all %d steps are in %s", settings.max_steps, checkpoint)
        trainer._load_from_checkpoint(checkpoint)
        trainer.state = TrainerState.load_from_json(str(Path(checkpoint, TRAINER_STATE_NAME)))
    else:
        trainer.train(resume_from_checkpoint=checkpoint)
    if not all(torch.isfinite(parameter).all() for parameter in model.parameters() if parameter.requires_grad):
        raise Diverged("the adapters are not finite after training; lower TAGGER_TRAIN_LEARNING_RATE")
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return Trained(trainer.state.global_step, losses[0], losses[-1], time.monotonic() - started)


def _newest_whole(checkpoints: Path) -> str | None:
    """The newest checkpoint that was written to its end; one that was not is removed."""
    newest: str | None
    while (newest := get_last_checkpoint(str(checkpoints))) is not None:
        try:
            _steps(newest)  # the Trainer writes this file last
        except (OSError, ValueError, TypeError):
            log.warning("train: %s was cut off while it was written; going back to the one before", newest)
            shutil.rmtree(newest)
        else:
            break
    return newest


def _steps(checkpoint: str) -> int:
    return int(TrainerState.load_from_json(str(Path(checkpoint, TRAINER_STATE_NAME))).global_step)


def _arguments(settings: Train, machine: Machine, checkpoints: Path) -> TrainingArguments:
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        max_steps=settings.max_steps,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulation,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=settings.warmup_steps,
        fp16=machine.precision == "fp16",
        bf16=machine.precision == "bf16",
        activation_checkpointing=settings.checkpointing == "on",
        logging_steps=settings.logging_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # it would put the running mean in the place of a NaN
        save_strategy="steps",
        save_steps=settings.save_steps,
        save_total_limit=2,
        seed=settings.seed,
        use_cpu=machine.device.type == "cpu",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=machine.device.type == "cuda",
        report_to="none",
    )
    # one process trains on one GPU: with more in sight the Trainer would scale rows and loss by their number
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


class _Rows(torch.utils.data.Dataset[Encoded]):
    def __init__(self, examples: Sequence[Encoded]) -> None:
        self._examples = examples

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Encoded:
        return self._examples[index]


class Collator:
    """Pads examples on the right into one micro-batch, and picks the positions that carry loss.

    Emits `input_ids`, `attention_mask` and `labels`, int64 [rows, width]; `logits_to_keep`, bool
    [rows, width], true where the next token is a label; `shift_labels`, int64 [kept], those labels
    in order. The model computes logits for the kept positions alone: with a large vocabulary most
    of the memory and nearly half of the work of a step are logits.
    """

    def __init__(self, pad_token_id: int) -> None:
        self._pad_token_id = pad_token_id

    def __call__(self, examples: Sequence[Encoded]) -> dict[str, torch.Tensor]:
        ids = [torch.tensor(example.input_ids) for example in examples]
        labels = pad_sequence([torch.tensor(e.labels) for e in examples], batch_first=True, padding_value=NO_LOSS)
        shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=NO_LOSS)
        keep = shifted != NO_LOSS
        return {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=self._pad_token_id),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
            "labels": labels,
            "shift_labels": shifted[keep],
            "logits_to_keep": keep,
        }


class _History(TrainerCallback):
    """Shows progress (a bar on a terminal, lines elsewhere), keeps log.jsonl, stops at a loss that is not finite."""

    def __init__(self, run: RunFolder) -> None:
        self._run = run
        self._bar: tqdm[Any] | None = None
        self._last_log = time.monotonic()
        self._last_step = 0

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._last_log, self._last_step = time.monotonic(), state.global_step
        if state.global_step:
            log.info("train: goes on after step %d of %d", state.global_step, state.max_steps)
        if sys.stderr.isatty():
            self._bar = tqdm(total=state.max_steps, initial=state.global_step, desc="train", unit="step")

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_log(
        self, args: Any, state: TrainerState, control: TrainerControl, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        if logs is None or "loss" not in logs:
            return
        if not torch.isfinite(torch.tensor(logs["loss"])):
            raise Diverged(
                f"the loss is {logs['loss']} at step {state.global_step}: training diverged or overflowed. "
                "Lower TAGGER_TRAIN_LEARNING_RATE, or use TAGGER_TRAIN_PRECISION=fp32"
            )
        self._run.write_lines("log.jsonl", [entry for entry in state.log_history if "loss" in entry])
        now = time.monotonic()
        pace = (now - self._last_log) / max(1, state.global_step - self._last_step)
        self._last_log, self._last_step = now, state.global_step
        line = (
            f"step {state.global_step}/{state.max_steps}: loss {logs['loss']:.4f}, "
            f"learning rate {logs['learning_rate']:.2e}, {pace:.1f} s a step"
        )
        if self._bar is None:
            log.info("train: %s", line)
        else:
            self._bar.write(line)

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.close()
