"""The variants to compare: ways to take the same optimizer steps on the same examples.

A variant is a function from Work to a Run. The variant prepares, which is not measured. Its Run takes the steps in
order, calls `tick` after each, and returns the loss of each (the mean over the step's label tokens).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from job.dataset.tokenization import IGNORE_INDEX
from job.settings import Settings
from job.system.device import ComputeSpec
from job.training.batching import MicroBatch, num_label_tokens
from job.training.gradients import GradientComputer
from job.training.kernels import Kernels
from job.training.optimizer import LossScale, make_optimizer, update_weights
from job.training.trainer import MICRO_BATCH_TOKENS, learning_rate
from job.types import EncodedExample

Tick = Callable[[], None]
Run = Callable[[Tick], list[float]]


@dataclass(frozen=True)
class Work:
    """The input of every variant: a model with adapters, on its device, and the steps to take."""

    model: peft.PeftModel
    tokenizer: PreTrainedTokenizerBase
    compute: ComputeSpec
    settings: Settings
    steps: list[list[EncodedExample]]
    folder: Path
    """A temporary folder for output, deleted afterwards."""


Variant = Callable[[Work], Run]


def variants() -> dict[str, Variant]:
    """Return every variant by name, in the order of the table; the first is the baseline."""
    return {"recipe": recipe, "trl": trl, "trl-best": trl_best, "trl-compiled": trl_compiled, **job_variants()}


# ---- the job itself ------------------------------------------------------------------------------------------------


def job_variants() -> dict[str, Variant]:
    """Return the job's own loop, with each of its techniques added in turn."""
    return {
        "fused loss of label logits": partial(_job, recompute=True),
        "+ no recomputation": _job,
        "+ split by tokens": partial(_job, split=True),
        "+ packed": partial(_job, split=True, packed=True),
        "+ memory-efficient: the job": partial(_job, split=True, packed=True, efficient=True),
        "the job, recomputing": partial(_job, split=True, packed=True, efficient=True, recompute=True),
    }


def _job(
    work: Work, *, recompute: bool = False, split: bool = False, packed: bool = False, efficient: bool = False
) -> Run:
    computer = GradientComputer(
        work.model, work.tokenizer.pad_token_id, work.compute, seed=work.settings.train.seed, packed=packed
    )
    if recompute:
        work.model.enable_input_require_grads()
        base: Any = work.model.get_base_model()
        base.activation_checkpointing_enable({"use_reentrant": True} if efficient else None)
    parameters = [parameter for parameter in work.model.parameters() if parameter.requires_grad]
    optimizer = make_optimizer(parameters, Kernels.for_device(work.compute.device))
    loss_scale = LossScale(enabled=work.compute.precision == "fp16")
    limit, rows = MICRO_BATCH_TOKENS[work.compute.device.type], work.settings.train.batch_size

    def run(tick: Tick) -> list[float]:
        losses = []
        with computer.installed(efficient=efficient):
            for number, step in enumerate(work.steps):
                if split:
                    batches = computer.split(step, limit=limit)
                else:
                    starts = range(0, len(step), rows)
                    batches = [MicroBatch(step[i : i + rows], list(range(i, i + rows))) for i in starts]
                labels, count, scale = num_label_tokens(step), len(batches), loss_scale.scale
                sums = computer.compute(batches, step=number, label_tokens=labels, count=count, loss_scale=scale)
                outcome = computer.exact.load(sums)
                assert not outcome.out_of_memory, "out of memory"
                if outcome.finite:
                    rate = learning_rate(work.settings.train, number)
                    gradient = computer.exact.gradient
                    update_weights(optimizer, gradient, grad_norm=outcome.grad_norm, learning_rate=rate)
                loss_scale.update(finite=outcome.finite)
                losses.append(outcome.loss)
                tick()
        return losses

    return run


# ---- other ways to train the adapters ------------------------------------------------------------------------------


def recipe(work: Work) -> Run:
    """Train as the recipe does: transformers' Trainer, four padded rows at a time, checkpointing, all logits."""
    work.model.enable_input_require_grads()
    arguments = TrainingArguments(**_options(work), activation_checkpointing=True)
    rows: Any = [example for step in work.steps for example in step]
    pad = partial(_padded, pad_token_id=work.tokenizer.pad_token_id)
    return _train_with(Trainer(work.model, arguments, train_dataset=rows, data_collator=pad))


def trl(work: Work) -> Run:
    """Train with TRL's SFTTrainer and the recipe's batches, without checkpointing.

    On a quantized base, SFTTrainer always casts the adapters to bf16.
    """
    return _trl(work)


def trl_best(work: Work) -> Run:
    """Train with the options that make SFTTrainer fastest: no padding, where the model supports it.

    BLOOM does not: it ignores position ids, and tokens would attend to the previous text. Not included because they
    were slower, or not available on a CPU: 16 rows at a time, Liger's kernels, packing, offloaded activations.
    """
    return _trl(work, padding_free=_takes_position_ids(work.model))


def trl_compiled(work: Work) -> Run:
    """Train as trl_best, compiled: later steps are faster, and the first one compiles for minutes."""
    return _trl(work, padding_free=_takes_position_ids(work.model), torch_compile=True)


def _takes_position_ids(model: peft.PeftModel) -> bool:
    return "position_ids" in inspect.signature(type(model.get_base_model()).forward).parameters


def _trl(work: Work, **options: Any) -> Run:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer  # type: ignore[attr-defined,import-not-found,unused-ignore]

    rows = [
        {"input_ids": example.input_ids, "completion_mask": [int(label != IGNORE_INDEX) for label in example.labels]}
        for step in work.steps
        for example in step
    ]
    config = {"gradient_checkpointing": False, "completion_only_loss": True, "max_length": None}
    arguments = SFTConfig(**(_options(work) | config | options))
    data = Dataset.from_list(rows)
    return _train_with(SFTTrainer(work.model, arguments, train_dataset=data, processing_class=work.tokenizer))


def _options(work: Work) -> dict[str, Any]:
    """Return the recipe's options, and those that make the Trainer only take the given steps, in order."""
    settings = work.settings.train
    return {
        "output_dir": str(work.folder),
        "max_steps": len(work.steps),
        "per_device_train_batch_size": settings.batch_size,
        "gradient_accumulation_steps": settings.gradient_accumulation_steps,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": "linear",
        "warmup_steps": settings.warmup_steps,
        "fp16": work.compute.precision == "fp16",
        "bf16": work.compute.precision == "bf16",
        "use_cpu": work.compute.device.type == "cpu",
        "train_sampling_strategy": "sequential",
        "remove_unused_columns": False,
        "dataloader_pin_memory": work.compute.device.type == "cuda",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": settings.seed,
    }


def _train_with(trainer: Trainer) -> Run:
    trainer.remove_callback(PrinterCallback)

    def run(tick: Tick) -> list[float]:
        trainer.add_callback(_Ticks(tick))
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    return run


class _Ticks(TrainerCallback):
    def __init__(self, tick: Tick) -> None:
        self._tick = tick

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._tick()


def _padded(examples: Sequence[EncodedExample], pad_token_id: int) -> dict[str, torch.Tensor]:
    ids = [torch.tensor(example.input_ids) for example in examples]
    labels = [torch.tensor(example.labels) for example in examples]
    return {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=pad_token_id),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX),
    }
