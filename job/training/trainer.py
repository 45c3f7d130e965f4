"""The training loop: optimizer steps, micro-batches, checkpoints, resume."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import Any

import peft
import torch
from transformers import PreTrainedTokenizerBase

from job.errors import DivergedError, JobError
from job.runs import shutdown
from job.runs.run_folder import RunFolder
from job.settings import Train
from job.system.device import ComputeSpec
from job.system.events import event
from job.system.progress import Progress, duration
from job.training import checkpoints
from job.training.batching import num_label_tokens
from job.training.checkpoints import TrainerState
from job.training.exchange import Exchange
from job.training.gradients import FRACTION_BITS, StepComputer, StepOutcome, StepRequest
from job.training.kernels import Kernels
from job.training.memory_budget import BatchPlan, packed_layer_bytes, plan_batches
from job.training.optimizer import LossScale, initial_step, make_optimizer, update_weights
from job.types import EncodedExample

log = logging.getLogger(__name__)

MICRO_BATCH_TOKENS = {"cpu": 256, "cuda": 8192}
"""Maximum tokens of a micro-batch if memory allows; larger ones are barely faster and take more memory."""

FEWER_FRACTION_BITS = 20
"""By how many places the fixed point of the gradients' sum moves if they are too large for it."""


def learning_rate(settings: Train, step: int) -> float:
    """Return the learning rate of a step (counted from 0): a linear warm-up from zero, then the schedule.

    The cosine schedule is half a period from the peak to zero (Loshchilov and Hutter, 2017, without restarts).
    """
    if step < settings.warmup_steps:
        return settings.learning_rate * step / settings.warmup_steps
    remaining = max(0.0, (settings.max_steps - step) / max(1, settings.max_steps - settings.warmup_steps))
    factors = {"linear": remaining, "cosine": (1 - math.cos(math.pi * remaining)) / 2, "constant": 1.0}
    return settings.learning_rate * factors[settings.lr_scheduler_type]


class Trainer:
    """Train adapters step by step, with checkpoints from which a later attempt resumes (on a CPU, bitwise).

    It runs in process 0, which alone changes weights, decides and writes files. The other processes only compute
    their shares of the gradients (`follow`).
    """

    def __init__(
        self,
        model: peft.PeftModel,
        examples: Sequence[EncodedExample],
        settings: Train,
        tokenizer: PreTrainedTokenizerBase,
        compute: ComputeSpec,
        run: RunFolder,
        exchange: Exchange,
    ) -> None:
        self._examples, self._settings = examples, settings
        self._run, self._exchange = run, exchange
        self._computer = StepComputer(model, examples, settings, tokenizer.pad_token_id, compute)
        self._adapters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._kernels = Kernels.for_device(compute.device)
        self._optimizer = make_optimizer(self._adapters.values(), self._kernels)
        self._loss_scale = LossScale(enabled=compute.precision == "fp16")
        self.swa_weights: dict[str, torch.Tensor] = {}
        """For each adapter weight its mean over the averaged steps so far."""
        # reuse the previous attempt's batch plan: a different split would round differently
        plan = run.manifest.get("batch_plan") or {
            **asdict(_plan(model, examples, settings, compute, exchange.local_size)),
            # a configured size is kept, and the split then does not depend on the number of processes at all
            "parts": 1 if settings.micro_batch_tokens else exchange.size,
        }
        self.state = TrainerState(**plan)
        self.step_is_complete = True
        """False while weights and optimizer are being updated: a checkpoint would then hold half a step."""
        self._saved_step = 0
        self._sent_step: int | None = None
        """The step whose weights the other processes have."""
        self._last_save = self._last_count = time.monotonic()

    def resume(self) -> None:
        """Load the newest intact checkpoint, if there is one."""
        found = checkpoints.load_newest(self._run.checkpoints)
        if found is None:
            return
        tensors, self.state = found
        self._saved_step = self.state.step
        for name, parameter in self._adapters.items():
            parameter.data.copy_(tensors[name])
            moments = {"exp_avg": tensors[f"{name}.exp_avg"], "exp_avg_sq": tensors[f"{name}.exp_avg_sq"]}
            self._optimizer.state[parameter] = {
                "step": initial_step(parameter, self._kernels).fill_(self.state.step - self.skipped_steps()),
                **{key: moment.to(parameter.device) for key, moment in moments.items()},
            }
            if (mean := tensors.get(f"{name}.mean")) is not None:
                self.swa_weights[name] = mean.to(parameter.device)
        self._loss_scale.load_state_dict(self.state.loss_scale)
        if self.state.step >= self._settings.max_steps:
            log.info("train: all %d steps are in %s", self.state.step, self._run.checkpoints)
        else:
            log.info("train: resuming after step %d of %d", self.state.step, self._settings.max_steps)

    def run(self) -> None:
        """Take the remaining steps, with checkpoints in between and at the end."""
        self.try_write("the batch plan", self._record_batch_plan)
        with self._computer.installed() as switched_off:
            if switched_off:
                log.info("train: the base model's own dropout is off (%s)", ", ".join(switched_off))
            try:
                self._take_steps()
            except BaseException as stop:
                # save only after Ctrl-C, a signal or Modal's timeout: after an error the state may be wrong
                if not isinstance(stop, Exception) and self.step_is_complete and self.state.step > self._saved_step:
                    with shutdown.deferred():  # a lost process may be followed by a signal
                        self._save()
                raise
        for name, mean in self.swa_weights.items():
            self._adapters[name].data.copy_(mean)
        self._exchange.send({"do": "trained"})
        broadcast_weights(self._exchange, self._adapters.values())
        self._run.write_lines("log.jsonl", self.history())
        self._record_batch_plan()

    def _take_steps(self) -> None:
        settings, step = self._settings, self.state.step
        last_time, last_step, tokens = time.monotonic(), step, 0
        with Progress("train", settings.max_steps, "steps", initial=step, bar_after=0) as progress:
            while step < settings.max_steps:
                shutdown.check()
                self._step()
                tokens += self.tokens_of(step)
                step = self.state.step
                progress.add()
                if self.should_log(step):
                    now = time.monotonic()
                    seconds = max(now - last_time, 1e-9)
                    self.log_progress(progress, seconds / (step - last_step), tokens / seconds)
                    last_time, last_step, tokens = now, step, 0
                if self._save_is_due():
                    with shutdown.deferred():
                        self._save()

    def _record_batch_plan(self) -> None:
        state = self.state
        self._run.update(
            batch_plan={
                "micro_batch_tokens": state.micro_batch_tokens,
                "parts": state.parts,
                "recompute": state.recompute,
            }
        )

    def _step(self) -> None:
        """Take one optimizer step; raises DivergedError when its loss is not finite."""
        settings, step = self._settings, self.state.step
        examples = self._computer.examples_of(step)
        outcome = self._compute_gradients(max(len(example.input_ids) for example in examples))
        if not math.isfinite(outcome.loss):
            raise DivergedError(
                f"the loss is {outcome.loss} at step {step + 1}: training diverged or overflowed. "
                "Lower TAGGER_TRAIN_LEARNING_RATE, or use TAGGER_TRAIN_PRECISION=fp32"
            )
        labels = num_label_tokens(examples)
        with shutdown.deferred():
            # Modal's timeout is not deferred, so this flag keeps it from saving half a step
            self.step_is_complete = False
            rate = learning_rate(settings, step)
            if outcome.finite:
                update_weights(
                    self._optimizer, self._computer.exact.gradient, grad_norm=outcome.grad_norm, learning_rate=rate
                )
            self._loss_scale.update(finite=outcome.finite)
            entry = {"loss": outcome.loss * labels, "labels": labels, "grad_norm": outcome.grad_norm}
            self.state.steps.append({**entry, "learning_rate": rate})
            self.state.step += 1
            self._average_weights()
            self.step_is_complete = True

    def _compute_gradients(self, longest: int) -> StepOutcome:
        """Compute the step's gradients, with smaller micro-batches if memory runs out.

        `longest` is the length of the step's longest example, in tokens.
        """
        state, fraction_bits = self.state, FRACTION_BITS
        while True:
            scale = self._loss_scale.scale
            request = StepRequest(
                state.step, state.micro_batch_tokens, state.parts, state.recompute, scale, fraction_bits
            )
            outcome = self._computer.exact.load(self._sums(request), fraction_bits=fraction_bits)
            if outcome.out_of_memory:
                self.handle_oom(longest)
            elif outcome.too_large:
                fraction_bits -= FEWER_FRACTION_BITS
            else:
                return outcome

    def _sums(self, request: StepRequest) -> torch.Tensor:
        """Return the exact sums over all micro-batches of a step, computed by all processes."""
        exchange = self._exchange
        if exchange.size > 1:
            send_weights = self._sent_step != request.step
            exchange.send({"do": "gradients", "weights": send_weights, **asdict(request)})
            if send_weights:
                broadcast_weights(exchange, self._adapters.values())
                self._sent_step = request.step
        self._computer.set_recompute(request.recompute)
        return exchange.sum(self._computer.share(request, exchange.rank, exchange.size))

    def _average_weights(self) -> None:
        """Update the mean of the weights over the last steps (stochastic weight averaging, Izmailov et al., 2018).

        With a high learning rate the weights move around a minimum; their mean is closer to it.
        """
        settings = self._settings
        count = self.state.step - (settings.max_steps - round(settings.weight_averaging * settings.max_steps))
        if count < 1:
            return
        for name, parameter in self._adapters.items():
            if count == 1:
                self.swa_weights[name] = parameter.detach().clone()
            else:
                self.swa_weights[name].lerp_(parameter.detach(), 1 / count)

    def handle_oom(self, longest: int) -> None:
        """Halve the micro-batches; once each is a single example, recompute activations; then raise JobError.

        `longest` is the length of the step's longest example, in tokens.
        """
        state = self.state
        if state.micro_batch_tokens > longest:
            state.micro_batch_tokens = max(longest, state.micro_batch_tokens // 2)
            log.warning("train: out of memory; micro-batches now have at most %d tokens", state.micro_batch_tokens)
        elif state.micro_batch_tokens > 1:
            state.micro_batch_tokens = 1
            log.warning("train: out of memory; each micro-batch is now a single example")
        elif self._settings.gradient_checkpointing == "auto" and not state.recompute:
            state.recompute = True
            log.warning("train: out of memory; activations are now recomputed")
        else:
            raise JobError(
                f"out of memory with one example of {longest} tokens at a time; lower TAGGER_DATA_MAX_LENGTH, "
                + ("" if state.recompute else "set TAGGER_TRAIN_GRADIENT_CHECKPOINTING=auto, ")
                + "or use a larger machine"
            )

    def _save_is_due(self) -> bool:
        step, settings = self.state.step, self._settings
        is_old = time.monotonic() - self._last_save >= 60 * settings.save_minutes
        return is_old or step % settings.save_steps == 0 or step == settings.max_steps

    def _save(self) -> None:
        self._last_save = now = time.monotonic()
        self.state.seconds += now - self._last_count
        self._last_count = now
        tensors = {}
        for name, parameter in self._adapters.items():
            moments = self._optimizer.state[parameter]
            tensors[name] = parameter.data
            for key in ("exp_avg", "exp_avg_sq"):
                tensors[f"{name}.{key}"] = moments[key] if moments else torch.zeros_like(parameter)
            if name in self.swa_weights:
                tensors[f"{name}.mean"] = self.swa_weights[name]
        self.state.loss_scale = self._loss_scale.state_dict()
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        if self.try_write(
            f"the checkpoint of step {self.state.step}",
            lambda: checkpoints.save(
                self._run.checkpoints, tensors, self.state, save_total_limit=self._settings.save_total_limit
            ),
        ):
            self._saved_step = step = self.state.step
            log.debug("train: the state after step %d is saved", step, extra=event("checkpoint_saved", step=step))
            self._run.notify_saved()

    def try_write(self, what: str, write: Callable[[], None]) -> bool:
        """Call `write` and return whether it succeeded; on a full or read-only disk, warn that `what` is missing."""
        try:
            write()
        except OSError as error:
            newest = f"step {self._saved_step}" if self._saved_step else "the beginning"
            log.warning(
                "train: %s could not be written to %s (%s); after an interruption, training would resume from %s",
                *(what, self._run.path, error.strerror or error, newest),
            )
            return False
        return True

    def skipped_steps(self) -> int:
        """Count the steps without an update, whose fp16 gradients overflowed."""
        return sum(not math.isfinite(step["grad_norm"]) for step in self.state.steps)

    def tokens(self) -> int:
        """Count the tokens of the examples of all steps so far, without padding."""
        return sum(self.tokens_of(step) for step in range(self.state.step))

    def tokens_of(self, step: int) -> int:
        """Count the tokens of the examples of a step (counted from 0), without padding."""
        return sum(len(example.input_ids) for example in self._computer.examples_of(step))

    def time_steps(self, steps: int) -> list[float]:
        """Take some steps without logging or saving; return the seconds of each."""
        times = []
        with self._computer.installed():
            for _ in range(steps):
                shutdown.check()
                started = time.monotonic()
                self._step()
                times.append(time.monotonic() - started)
        return times

    def should_log(self, step: int) -> bool:
        """Return whether a step (counted from 1) has an entry in log.jsonl."""
        return step in (1, self._settings.max_steps) or step % self._settings.logging_steps == 0

    def history(self) -> list[dict[str, float]]:
        """Return the entries of log.jsonl; a loss is the mean over the label tokens since the previous entry."""
        entries, loss, labels = [], 0.0, 0.0
        per_step = self._settings.batch_size * self._settings.gradient_accumulation_steps
        for number, step in enumerate(self.state.steps, 1):
            loss, labels = loss + step["loss"], labels + step["labels"]
            if self.should_log(number):
                epoch = number * per_step / len(self._examples)
                norm = step["grad_norm"] if math.isfinite(step["grad_norm"]) else 0.0  # a step that fp16 skipped
                optimizer = {"grad_norm": norm, "learning_rate": step["learning_rate"]}
                entries.append({"step": number, "loss": loss / labels, **optimizer, "epoch": epoch})
                loss = labels = 0.0
        return entries

    def log_progress(self, progress: Progress, seconds_per_step: float, tokens_per_second: float) -> None:
        """Write log.jsonl, and show its last entry above the progress bar or, without a terminal, as a log line."""
        entries, step, most = self.history(), self.state.step, self._settings.max_steps
        speed = {"seconds_per_step": seconds_per_step, "tokens_per_second": tokens_per_second}
        self._run.record_speed(step, **speed)
        self.try_write("log.jsonl", lambda: self._run.write_lines("log.jsonl", entries))
        left = (most - step) * seconds_per_step
        entry = entries[-1]
        line = (
            f"step {step}/{most}: loss {entry['loss']:.4f}, learning rate {entry['learning_rate']:.2e}, "
            f"{seconds_per_step:.1f} s a step" + (f", {duration(left)} left" if left else "")
        )
        if not progress.write(line):
            fields = {**entry, "max_steps": most, **speed, "seconds_left": left}
            log.info("train: %s", line, extra=event("train_step", **fields))


def _plan(
    model: peft.PeftModel, examples: Sequence[EncodedExample], settings: Train, compute: ComputeSpec, processes: int
) -> BatchPlan:
    """Choose the micro-batches for the memory that is free now."""
    base: Any = model.get_base_model()
    on_gpu = compute.device.type == "cuda"
    return plan_batches(
        base.config,
        examples,
        settings,
        compute,
        max_tokens=MICRO_BATCH_TOKENS.get(compute.device.type, MICRO_BATCH_TOKENS["cuda"]),
        processes=processes,
        layer_bytes=packed_layer_bytes(base, compute.dtype.itemsize) if on_gpu else None,
    )


def follow(
    model: peft.PeftModel,
    examples: Sequence[EncodedExample],
    settings: Train,
    tokenizer: PreTrainedTokenizerBase,
    compute: ComputeSpec,
    exchange: Exchange,
) -> None:
    """Compute this process's share of each step until process 0 has trained; the model then has its weights."""
    adapters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    computer = StepComputer(model, examples, settings, tokenizer.pad_token_id, compute)
    with computer.installed():
        while (message := exchange.receive()).pop("do") == "gradients":
            if message.pop("weights"):
                broadcast_weights(exchange, adapters)
            request = StepRequest(**message)
            computer.set_recompute(request.recompute)
            exchange.sum(computer.share(request, exchange.rank, exchange.size))
    broadcast_weights(exchange, adapters)


def broadcast_weights(exchange: Exchange, adapters: Iterable[torch.nn.Parameter]) -> None:
    """Give the adapters of all processes the weights of process 0."""
    if exchange.size == 1:
        return
    adapters = list(adapters)
    flat = torch.cat([parameter.detach().flatten() for parameter in adapters]).cpu()
    exchange.broadcast(flat)
    if exchange.rank > 0:
        for parameter, values in zip(adapters, torch.split(flat, [p.numel() for p in adapters]), strict=True):
            parameter.data.copy_(values.view_as(parameter))
