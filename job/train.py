"""Train the adapters: check the examples, run the loop of training/trainer.py, and check its result."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import peft
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from job.errors import DivergedError, InvalidInputError
from job.runs.run_folder import RunFolder
from job.settings import Train
from job.system.device import ComputeSpec
from job.training import trainer
from job.training.batching import num_label_tokens
from job.training.exchange import Exchange, SingleProcess
from job.types import EncodedExample, TrainResult

log = logging.getLogger(__name__)


def train(
    model: peft.PeftModel,
    examples: Sequence[EncodedExample],
    settings: Train,
    *,
    tokenizer: PreTrainedTokenizerBase,
    compute: ComputeSpec,
    run: RunFolder,
    exchange: Exchange | None = None,
) -> TrainResult:
    """Train the model's adapters in place, from the run's newest checkpoint if it has one.

    The loss of a step is the mean over its label tokens and does not depend on the micro-batches. When memory runs out,
    micro-batches are halved and the step is repeated. With TAGGER_TRAIN_WEIGHT_AVERAGING, the result is the mean of the
    adapters' weights after each of the last steps. An interruption saves the last complete step. If a checkpoint cannot
    be written, a warning is logged and training continues. With an `exchange`, the other processes compute their share
    of each step (`trainer.follow`), and have the trained weights at the end.

    Raises InvalidInputError for an example without a label token, and DivergedError when the loss or the weights of the
    adapters are not finite.
    """
    if unlabelled := sum(num_label_tokens([example]) == 0 for example in examples):
        raise InvalidInputError(
            f"{unlabelled} of {len(examples)} examples have no label token; expected at least one tag in each"
        )
    if settings.warmup_steps >= settings.max_steps:
        log.warning(
            "train: the learning rate never reaches its peak: TAGGER_TRAIN_WARMUP_STEPS=%d is not below "
            "TAGGER_TRAIN_MAX_STEPS=%d",
            settings.warmup_steps,
            settings.max_steps,
        )
    base: PreTrainedModel = model.get_base_model()  # type: ignore[assignment]
    if settings.gradient_checkpointing == "auto" and not base.supports_gradient_checkpointing:
        log.info("train: activations cannot be recomputed for the architecture %s", base.config.model_type)
        settings = settings.model_copy(update={"gradient_checkpointing": "off"})
    loop = trainer.Trainer(model, examples, settings, tokenizer, compute, run, exchange or SingleProcess())
    loop.resume()
    loop.run()
    if not all(torch.isfinite(parameter).all() for parameter in model.parameters() if parameter.requires_grad):
        raise DivergedError(
            "the weights of the adapters are not finite after training; lower TAGGER_TRAIN_LEARNING_RATE"
        )
    if unused := unused_adapters(model):
        log.warning(
            "train: the adapters on %s have no effect: the forward pass does not use these layers, or has no gradient "
            "there; leave them out of TAGGER_LORA_TARGETS",
            ", ".join(unused),
        )
    losses = [entry["loss"] for entry in loop.history()]
    return TrainResult(loop.state.step, losses[0], losses[-1], loop.state.seconds, loop.tokens())


def unused_adapters(model: peft.PeftModel) -> list[str]:
    """Return the names of layers whose adapters training has not changed, on none of the model's blocks.

    Training always changes lora_B, which begins at zero, where there is a gradient. Empty if it changed no adapter.
    """
    changed: dict[str, bool] = {}
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            layer = name.partition(".lora_B.")[0].rpartition(".")[2]
            changed[layer] = changed.get(layer, False) or bool(parameter.any())
    return sorted(layer for layer, any_changed in changed.items() if not any_changed) if any(changed.values()) else []


def follow(
    model: peft.PeftModel,
    examples: Sequence[EncodedExample],
    settings: Train,
    *,
    tokenizer: PreTrainedTokenizerBase,
    compute: ComputeSpec,
    exchange: Exchange,
) -> None:
    """Compute this process's share of each step that process 0 takes; the model then has the trained weights."""
    trainer.follow(model, examples, settings, tokenizer, compute, exchange)
