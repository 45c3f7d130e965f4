"""The training loop: optimizer steps, micro-batches, checkpoints, resume."""

from __future__ import annotations

import gc
import logging
import math
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

import peft
import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from job.errors import DivergedError, JobError
from job.runs import shutdown
from job.runs.run_folder import RunFolder
from job.settings import Train
from job.system.device import ComputeSpec
from job.training import checkpoints, memory_efficient
from job.training.batching import Collator, examples_of_step, micro_batches, num_label_tokens
from job.training.checkpoints import TrainerState
from job.training.memory_budget import plan_batches
from job.training.packing import PackedAttention
from job.types import EncodedExample

log = logging.getLogger(__name__)


MICRO_BATCH_TOKENS = {"cpu": 256, "cuda": 8192}
"""Tokens of a micro-batch, if that many fit: more gain little speed and cost memory."""

MICRO_BATCH_OVERHEAD_TOKENS = {"cpu": 96, "cuda": 2048}
"""What one more micro-batch costs, in tokens: weights are packed or unpacked anew, kernels started."""

MAX_GRAD_NORM = 1.0


def learning_rate(settings: Train, step: int) -> float:
    """The rate of a step (counted from 0): it rises linearly from zero over the warm-up, then follows the schedule.

    The cosine is its half period from peak to zero (Loshchilov and Hutter, 2017, without restarts).
    """
    if step < settings.warmup_steps:
        return settings.learning_rate * step / settings.warmup_steps
    left = max(0.0, (settings.max_steps - step) / max(1, settings.max_steps - settings.warmup_steps))
    shares = {"linear": left, "cosine": (1 - math.cos(math.pi * left)) / 2, "constant": 1.0}
    return settings.learning_rate * shares[settings.lr_scheduler_type]


def accumulate(
    model: peft.PeftModel,
    parts: Iterable[Sequence[EncodedExample]],
    collator: Collator,
    *,
    labels: int,
    machine: ComputeSpec,
    packing: PackedAttention | None,
    scaler: torch.amp.GradScaler,
) -> float:
    """Add the scaled gradients of a step's mean loss, one micro-batch after the other; return the summed loss.

    `labels` are the label tokens of all its micro-batches.
    """
    total = torch.zeros((), device=machine.device)
    for part in parts:
        batch = {name: tensor.to(machine.device) for name, tensor in collator(part).items()}
        if packing is not None:
            packing.set_sequence_lengths([len(example.input_ids) for example in part], machine.device)
        with machine.autocast():
            loss = model(**batch, num_items_in_batch=labels, use_cache=False).loss
        scaler.scale(loss).backward()
        total += loss.detach()
    return float(total) * labels


def micro_batch_overhead(machine: ComputeSpec) -> int:
    """What one more micro-batch costs on this machine, in tokens."""
    return MICRO_BATCH_OVERHEAD_TOKENS.get(machine.device.type, MICRO_BATCH_OVERHEAD_TOKENS["cuda"])


class Trainer:
    """The state of one training: adapters, Adam's moments, the mean of the last weights, progress."""

    def __init__(
        self,
        model: peft.PeftModel,
        examples: Sequence[EncodedExample],
        settings: Train,
        tokenizer: PreTrainedTokenizerBase,
        machine: ComputeSpec,
        run: RunFolder,
    ) -> None:
        self._model, self._examples, self._settings = model, examples, settings
        self._machine, self._run = machine, run
        base: Any = model.get_base_model()
        self._packing = PackedAttention(base) if PackedAttention.supports(base) else None
        self._collator = Collator(tokenizer.pad_token_id, packed=self._packing is not None)
        self._named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._optimizer = torch.optim.AdamW(self._named.values(), lr=0.0, weight_decay=0.0)
        self._scaler = torch.amp.GradScaler(machine.device.type, enabled=machine.precision == "fp16")
        self._swa_weights: dict[str, torch.Tensor] = {}
        """Of each adapter weight over the steps that are averaged, so far."""
        most = MICRO_BATCH_TOKENS.get(machine.device.type, MICRO_BATCH_TOKENS["cuda"])
        # as an attempt before chose, whatever is free now: another cut would round otherwise
        chosen = run.manifest.get("batch_plan") or asdict(
            plan_batches(base.config, examples, settings, machine, most=most)
        )
        self.progress = TrainerState(**chosen)
        self.step_is_complete = True
        self._saved = 0  # the step of the newest checkpoint
        self._last_save = self._last_count = time.monotonic()
        self._set_recompute(self.progress.recompute)

    def resume(self) -> None:
        """Take up the newest whole checkpoint, if there is one."""
        found = checkpoints.load_newest(self._run.checkpoints)
        if found is None:
            return
        tensors, self.progress = found
        self._saved = self.progress.step
        for name, parameter in self._named.items():
            parameter.data.copy_(tensors[name])
            moments = {"exp_avg": tensors[f"{name}.exp_avg"], "exp_avg_sq": tensors[f"{name}.exp_avg_sq"]}
            self._optimizer.state[parameter] = {
                "step": torch.tensor(float(self.progress.step - self.skipped_steps())),
                **{key: moment.to(parameter.device) for key, moment in moments.items()},
            }
            if (mean := tensors.get(f"{name}.mean")) is not None:
                self._swa_weights[name] = mean.to(parameter.device)
        if self.progress.loss_scale:
            self._scaler.load_state_dict(self.progress.loss_scale)
        self._set_recompute(self.progress.recompute)
        if self.progress.step >= self._settings.max_steps:
            log.info("train: all %d steps are in %s", self.progress.step, self._run.checkpoints)
        else:
            log.info("train: goes on after step %d of %d", self.progress.step, self._settings.max_steps)

    def run(self) -> None:
        """Take the steps that are left, with checkpoints on the way and at the end."""
        settings, progress = self._settings, self.progress
        self.try_write(self._record_budget)
        self._model.train()
        bar = tqdm(total=settings.max_steps, initial=progress.step, desc="train", disable=not sys.stderr.isatty())
        last, last_step = time.monotonic(), progress.step
        with (
            memory_efficient.patched(self._model),
            self._packing.installed() if self._packing else nullcontext(),
            bar,
        ):
            try:
                while self.progress.step < settings.max_steps:
                    shutdown.check()
                    self._step()
                    bar.update()
                    step = self.progress.step
                    if self.should_log(step):
                        now = time.monotonic()
                        self.log_progress(bar, (now - last) / (step - last_step))
                        last, last_step = now, step
                    if self._save_is_due():
                        with shutdown.deferred():
                            self._save()
            except BaseException as stop:
                # Ctrl-C, a signal, or Modal's end of time: not an error
                if not isinstance(stop, Exception) and self.step_is_complete and self.progress.step > self._saved:
                    self._save()
                raise
        for name, mean in self._swa_weights.items():
            self._named[name].data.copy_(mean)
        self._run.write_lines("log.jsonl", self.history())
        self._record_budget()

    def _record_budget(self) -> None:
        self._run.update(
            batch_plan={"micro_batch_tokens": self.progress.micro_batch_tokens, "recompute": self.progress.recompute}
        )

    def _step(self) -> None:
        """One optimizer step, done again with smaller micro-batches when memory runs out."""
        settings, progress = self._settings, self.progress
        chosen = examples_of_step(
            self._examples,
            progress.step,
            per_step=settings.batch_size * settings.gradient_accumulation_steps,
            seed=settings.seed,
        )
        labels = num_label_tokens(chosen)
        while True:
            torch.manual_seed(settings.seed * 1_000_003 + progress.step)  # of dropout: the same when done again
            self._optimizer.zero_grad()
            try:
                loss = accumulate(
                    self._model,
                    micro_batches(
                        chosen,
                        limit=progress.micro_batch_tokens,
                        overhead=micro_batch_overhead(self._machine),
                        padded=self._packing is None,
                    ),
                    self._collator,
                    labels=labels,
                    machine=self._machine,
                    packing=self._packing,
                    scaler=self._scaler,
                )
                break
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            self.handle_oom(max(len(example.input_ids) for example in chosen))
        if not math.isfinite(loss):
            raise DivergedError(
                f"the loss is {loss / labels} at step {progress.step + 1}: training diverged or overflowed. "
                "Lower TAGGER_TRAIN_LEARNING_RATE, or use TAGGER_TRAIN_PRECISION=fp32"
            )
        rate = learning_rate(settings, progress.step)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        with shutdown.deferred():
            self.step_is_complete = (
                False  # what comes through all the same (Modal's end of time) must not save half a step
            )
            self._scaler.unscale_(self._optimizer)
            norm = float(torch.nn.utils.clip_grad_norm_(self._named.values(), MAX_GRAD_NORM))
            self._scaler.step(self._optimizer)
            self._scaler.update()
            progress.steps.append({"loss": loss, "labels": labels, "grad_norm": norm, "learning_rate": rate})
            progress.step += 1
            self._average()
            self.step_is_complete = True

    def _average(self) -> None:
        """Take the weights into the mean over the last steps (stochastic weight averaging, Izmailov et al., 2018).

        Steps with a high rate end all around a minimum; the mean of their weights lies nearer to it.
        """
        settings = self._settings
        count = self.progress.step - (settings.max_steps - round(settings.weight_averaging * settings.max_steps))
        if count < 1:
            return
        for name, parameter in self._named.items():
            if count == 1:
                self._swa_weights[name] = parameter.detach().clone()
            else:
                self._swa_weights[name].lerp_(parameter.detach(), 1 / count)

    def handle_oom(self, longest: int) -> None:
        """Halve the micro-batches; when each is one example already, recompute activations; then give up."""
        progress = self.progress
        self._optimizer.zero_grad()
        gc.collect()
        if self._machine.device.type == "cuda":
            torch.cuda.empty_cache()
        if progress.micro_batch_tokens > longest:
            progress.micro_batch_tokens = max(longest, progress.micro_batch_tokens // 2)
            log.warning(
                "train: out of memory; micro-batches have at most %d tokens from now on", progress.micro_batch_tokens
            )
        elif progress.micro_batch_tokens > 1:
            progress.micro_batch_tokens = 1
            log.warning("train: out of memory; micro-batches are one example each from now on")
        elif self._settings.gradient_checkpointing == "auto" and not progress.recompute:
            self._set_recompute(True)
            log.warning("train: out of memory; activations are recomputed from now on")
        else:
            raise JobError(
                f"out of memory with one example of {longest} tokens at a time; lower TAGGER_DATA_MAX_LENGTH, "
                + ("" if progress.recompute else "set TAGGER_TRAIN_GRADIENT_CHECKPOINTING=auto, ")
                + "or take a larger machine"
            )

    def _set_recompute(self, on: bool) -> None:
        self.progress.recompute = on
        base: Any = self._model.get_base_model()
        if on:
            self._model.enable_input_require_grads()
            # reentrant: what bitsandbytes' layers keep on the side is kept in the other form all the same
            base.activation_checkpointing_enable({"use_reentrant": True})
        else:
            base.activation_checkpointing_disable()

    def _save_is_due(self) -> bool:
        step, settings = self.progress.step, self._settings
        old = time.monotonic() - self._last_save >= 60 * settings.save_minutes
        return old or step % settings.save_steps == 0 or step == settings.max_steps

    def _save(self) -> None:
        self._last_save = now = time.monotonic()
        self.progress.seconds += now - self._last_count
        self._last_count = now
        tensors = {}
        for name, parameter in self._named.items():
            state = self._optimizer.state[parameter]
            tensors[name] = parameter.data
            for moment in ("exp_avg", "exp_avg_sq"):
                tensors[f"{name}.{moment}"] = state[moment] if state else torch.zeros_like(parameter)
            if name in self._swa_weights:
                tensors[f"{name}.mean"] = self._swa_weights[name]
        self.progress.loss_scale = self._scaler.state_dict()
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        if self.try_write(
            lambda: checkpoints.save(
                self._run.checkpoints, tensors, self.progress, save_total_limit=self._settings.save_total_limit
            )
        ):
            self._saved = self.progress.step
            self._run.notify_saved()

    def try_write(self, write: Callable[[], None]) -> bool:
        """Whether something could be written; a disk that is full or read-only does not end training."""
        try:
            write()
        except OSError as error:
            kept = f"step {self._saved}" if self._saved else "the beginning"
            log.warning(
                "train: step %d could not be written to %s (%s); an interruption would go back to %s",
                *(self.progress.step, self._run.path, error.strerror or error, kept),
            )
            return False
        return True

    def skipped_steps(self) -> int:
        """Steps without an update, because fp16 gradients overflowed."""
        return sum(not math.isfinite(step["grad_norm"]) for step in self.progress.steps)

    def should_log(self, step: int) -> bool:
        return step in (1, self._settings.max_steps) or step % self._settings.logging_steps == 0

    def history(self) -> list[dict[str, float]]:
        """The entries of log.jsonl; a loss is the mean over the label tokens since the entry before."""
        entries, loss, labels = [], 0.0, 0.0
        per_step = self._settings.batch_size * self._settings.gradient_accumulation_steps
        for number, step in enumerate(self.progress.steps, 1):
            loss, labels = loss + step["loss"], labels + step["labels"]
            if self.should_log(number):
                epoch = number * per_step / len(self._examples)
                norm = step["grad_norm"] if math.isfinite(step["grad_norm"]) else 0.0  # a step that fp16 skipped
                own = {"grad_norm": norm, "learning_rate": step["learning_rate"]}
                entries.append({"step": number, "loss": loss / labels, **own, "epoch": epoch})
                loss = labels = 0.0
        return entries

    def log_progress(self, bar: tqdm[Any], pace: float) -> None:
        entries = self.history()
        self.try_write(lambda: self._run.write_lines("log.jsonl", entries))
        line = (
            f"step {self.progress.step}/{self._settings.max_steps}: loss {entries[-1]['loss']:.4f}, "
            f"learning rate {entries[-1]['learning_rate']:.2e}, {pace:.1f} s a step"
        )
        if bar.disable:
            log.info("train: %s", line)
        else:
            bar.write(line)


def is_out_of_memory(error: Exception) -> bool:
    """Whether a device or this process had no memory left; on a CPU torch says so by its text alone."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)
