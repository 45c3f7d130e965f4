"""Speed and memory of training: the recipe as written, TRL, this job and its kernels; where the time of a step goes."""

from __future__ import annotations

import cProfile
import statistics
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import torch
from torch.profiler import ProfilerActivity, profile

from bench import measure
from bench.gpu.harness import Row, Rows, installed
from bench.gpu.models import BLOOM, SHAPES, SPECIAL, Work, examples
from bench.gpu.texts import make_tokenizer
from job.system.device import ComputeSpec
from job.training.batching import num_label_tokens
from job.training.gradients import GradientComputer
from job.training.kernels import Kernels
from job.training.optimizer import LossScale, make_optimizer, update_weights
from job.types import EncodedExample

EXAMPLES_PER_STEP = 16
WARM_UP = 6
"""Steps before those that are profiled: kernels are loaded, sizes are recorded."""
MAX_TOKENS = 8192
LEARNING_RATE = 2e-4
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
"""Calls in which the CPU waits for the GPU; a copy to memory of the CPU ends in one of them."""


Steps = Sequence[Sequence[EncodedExample]]
Way = Callable[[Steps, Callable[[], None]], list[float]]
"""Takes steps, calls a function after each, and returns the loss of each."""


class OwnTraining:
    """Takes optimizer steps as the job does."""

    def __init__(
        self, model: peft.PeftModel, compute: ComputeSpec, kernels: Kernels | None = None, *, recompute: bool = False
    ) -> None:
        kernels = kernels or Kernels.for_device(compute.device)
        self._computer = GradientComputer(model, SPECIAL["pad_token_id"], compute, seed=42, kernels=kernels)
        self._recompute = recompute
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._optimizer = make_optimizer(parameters, kernels)
        self._loss_scale = LossScale(enabled=compute.precision == "fp16")

    def __call__(self, steps: Steps, tick: Callable[[], None] = lambda: None) -> list[float]:
        """Take the steps, call `tick` after each, and return the loss of each."""
        computer, losses = self._computer, []
        computer.set_recompute(self._recompute)
        with computer.installed():
            for number, step in enumerate(steps):
                batches = computer.split(step, limit=MAX_TOKENS)
                labels, count, scale = num_label_tokens(step), len(batches), self._loss_scale.scale
                sums = computer.compute(batches, step=number, label_tokens=labels, count=count, loss_scale=scale)
                outcome = computer.exact.load(sums)
                assert not outcome.out_of_memory, "out of memory"
                if outcome.finite:
                    gradient, norm = computer.exact.gradient, outcome.grad_norm
                    update_weights(self._optimizer, gradient, grad_norm=norm, learning_rate=LEARNING_RATE)
                self._loss_scale.update(finite=outcome.finite)
                losses.append(outcome.loss)
                tick()
        computer.set_recompute(False)
        return losses


@dataclass
class Measurements:
    """What a way to train took, in all rounds."""

    seconds: list[float] = field(default_factory=list)
    """Of each step after the warm-up."""
    tokens: list[int] = field(default_factory=list)
    useful_gflop: list[float] = field(default_factory=list)
    gib: float = 0.0
    """Peak memory above what was allocated before the steps."""
    first: float = 0.0
    """Seconds of the very first step."""
    loss: float = 0.0
    """Of the last step of the first round."""
    error: str = ""

    @property
    def tokens_per_second(self) -> float:
        """Tokens of the steps in the median of the rates."""
        return statistics.median(n / s for n, s in zip(self.tokens, self.seconds, strict=True))

    def figure(self, baseline: float, peak: float) -> str:
        """Describe it in one line; `peak` is in GFLOP/s."""
        share = statistics.median(f / s for f, s in zip(self.useful_gflop, self.seconds, strict=True)) / peak
        quickest, slowest = (1000 * f(self.seconds) for f in (min, max))
        return (
            f"{self.tokens_per_second / baseline:.2f} x, {self.tokens_per_second:,.0f} tokens/s, "
            f"{1000 * statistics.median(self.seconds):.0f} ms a step ({quickest:.0f} to {slowest:.0f}, the very first "
            f"{self.first:.2f} s), {self.gib:.2f} GiB, {share:.1%} of the peak, loss {self.loss:.4f}"
        )


def check_speed(work: Work) -> Rows:
    """Measure each way to train on the same texts of real length, in rounds in which the ways take turns."""
    compute = work.compute()
    peak = measure.peak_gflops(compute)
    yield Row("peak of matrix products", None, f"{peak / 1000:.1f} TFLOP/s in {compute.precision}", {"gflops": peak})
    for shape, quantize in ((BLOOM, work.quantizations[0]), (SHAPES[1], "none")):
        found = _take_turns(work, shape, quantize)
        baseline = next((m.tokens_per_second for m in found.values() if m.seconds), 1.0)
        for name, measurements in found.items():
            what = f"{shape}, {quantize}, {compute.precision}: {name}"
            if measurements.error:
                yield Row(what, False, measurements.error)
            else:
                yield Row(what, None, measurements.figure(baseline, peak), dict(vars(measurements)))
        work.release()


def _take_turns(work: Work, shape: str, quantize: str) -> dict[str, Measurements]:
    ways = _ways(work, work.model(shape, quantize, work.compute(), dropout=0.05))
    found = {name: Measurements() for name in ways}
    for number in range(work.rounds):
        for name, (model, way) in ways.items():
            slow = name in LIBRARY_WAYS
            count = 1 if slow else work.steps
            steps = [examples(4 if work.toy else EXAMPLES_PER_STEP, seed=i) for i in range(count)]
            # in steps that are not measured kernels are loaded, and at first each size is seen twice, and recorded
            warm_up = steps[:1] if slow or number else 2 * steps
            if not found[name].error:
                _measure(found[name], model, way, [*warm_up, *steps], len(warm_up), work.compute())
    return found


def _measure(
    found: Measurements, model: peft.PeftModel, way: Way, steps: Steps, warm_up: int, compute: ComputeSpec
) -> None:
    memory = measure.watch_memory(compute.device)
    clock = measure.Clock(compute.device)
    try:
        losses = way(steps, clock.tick)
    except (RuntimeError, TypeError, ValueError, ImportError) as error:  # the others are measured all the same
        traceback.print_exc(file=sys.stderr)
        found.error = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        return
    found.first, found.loss = found.first or clock.seconds[0], found.loss or losses[-1]
    found.gib = max(found.gib, memory())
    found.seconds += clock.seconds[warm_up:]
    found.tokens += [sum(len(example.input_ids) for example in step) for step in steps[warm_up:]]
    found.useful_gflop += [measure.useful_gflop(model, step) for step in steps[warm_up:]]


LIBRARY_WAYS = {"the recipe as written": "recipe", "TRL's best": "trl-best"}
"""The ways of the libraries by their name in bench/variants.py; they take fewer steps, because they are slow."""


def _ways(work: Work, model: peft.PeftModel) -> dict[str, tuple[peft.PeftModel, Way]]:
    """Return the ways to take steps by name, each with its model; the first is the baseline."""
    compute = work.compute()

    def library(variant: str) -> Way:
        def way(steps: Steps, tick: Callable[[], None]) -> list[float]:
            from bench import variants
            from job.settings import Train

            tokenizer = make_tokenizer(min(4000, model.config.vocab_size))
            settings: Any = SimpleNamespace(train=Train())
            given = variants.Work(model, tokenizer, compute, settings, [list(step) for step in steps], work.folder)
            torch.backends.cuda.enable_cudnn_sdp(True)  # the default, which the job turns off
            try:
                return variants.variants()[variant](given)(tick)
            finally:
                torch.backends.cuda.enable_cudnn_sdp(False)
                base: Any = model.get_base_model()
                base.activation_checkpointing_disable()
                for parameter in model.parameters():
                    if parameter.requires_grad and parameter.dtype != torch.float32:  # TRL makes them bf16
                        parameter.grad, parameter.data = None, parameter.data.float()

        return way

    names = ["the recipe as written", *(["TRL's best"] if installed("trl") else [])]
    ways = {name: library(LIBRARY_WAYS[name]) for name in names} if installed("pydantic_settings") else {}
    ways["this job"] = OwnTraining(model, compute)
    ways["this job, recomputing"] = OwnTraining(model, compute, recompute=True)
    for name, kernels in kernel_variants(work.device).items():
        ways[name] = OwnTraining(model, compute, kernels)
    return {name: (model, way) for name, way in ways.items()}


def kernel_variants(device: torch.device) -> dict[str, Kernels]:
    """Return the kernels to compare with the default ones: each other choice alone."""
    default = Kernels.for_device(device)
    found = {}
    for name in (entry.name for entry in fields(Kernels)):
        for value in Kernels.choices(name, device):
            if value != getattr(default, name):
                found[f"{name}={value}"] = replace(default, **{name: value})
    return found


def check_profile(work: Work) -> Rows:
    """Count the kernels of a step, the waits of the CPU, and the share of the time in which the GPU computes."""
    compute = work.compute()
    texts = [examples(4 if work.toy else EXAMPLES_PER_STEP, seed=i % 2) for i in range(WARM_UP + 4)]
    default = Kernels.for_device(work.device)
    variants = {"this job": default}
    if default.graphs == "on":
        variants["graphs=off"] = replace(default, graphs="off")
    for shape, quantize in ((BLOOM, work.quantizations[0]), (SHAPES[1], "none")):
        for name, kernels in variants.items():
            profiled = _Profiled(work.device)
            OwnTraining(work.model(shape, quantize, compute, dropout=0.05), compute, kernels)(texts, profiled.tick)
            yield Row(f"{shape}, {quantize}: {name}", None, profiled.figure(), profiled.data())


class _Profiled:
    """Times a step, then profiles one with PyTorch and one with Python's profiler, and finds the waits in one."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._ticks = 0
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._on_gpu else [])]
        self._profile = profile(activities=activities)
        self._python = cProfile.Profile()
        self._clock = measure.Clock(device)
        self._warnings: list[warnings.WarningMessage] = []

    def tick(self) -> None:
        """Note the end of a step."""
        self._ticks += 1
        self._clock.tick()
        if self._ticks == WARM_UP + 1:
            self._profile.__enter__()
        elif self._ticks == WARM_UP + 2:
            self._profile.__exit__(None, None, None)
            self._python.enable()
        elif self._ticks == WARM_UP + 3:
            self._python.disable()
            self._watch_waits()
        elif self._ticks == WARM_UP + 4:
            self._stop_watching()

    def _watch_waits(self) -> None:
        """Let PyTorch warn where the CPU waits for the GPU."""
        self._caught = warnings.catch_warnings(record=True)
        self._warnings = self._caught.__enter__() or []
        warnings.simplefilter("always")
        if self._on_gpu:
            torch.cuda.set_sync_debug_mode("warn")

    def _stop_watching(self) -> None:
        if self._on_gpu:
            torch.cuda.set_sync_debug_mode("default")
        self._caught.__exit__(None, None, None)

    def _places_of_waits(self) -> list[tuple[str, int]]:
        """Return the lines in which the CPU waits for the GPU, with how often in a step."""
        found = [f"{Path(w.filename).name}:{w.lineno}" for w in self._warnings if "synchroniz" in str(w.message)]
        return Counter(found).most_common()

    def _functions(self) -> list[tuple[str, int, float]]:
        """Return the functions of the main thread with the most time of their own: name, calls, milliseconds."""
        rows = sorted(self._python.getstats(), key=lambda row: -row.inlinetime)[:25]
        return [(_function_name(row.code), row.callcount, round(row.inlinetime * 1e3, 2)) for row in rows]

    def data(self) -> dict[str, Any]:
        """Return counts and times of the profiled step, and the operations that take longest."""
        events = self._profile.key_averages()
        kernels = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
        busy = sum(event.self_device_time_total for event in kernels) / 1e6
        operations = [event for event in events if event.device_type == torch.autograd.DeviceType.CPU]
        unprofiled, wall = self._clock.seconds[WARM_UP], self._clock.seconds[WARM_UP + 1]
        by_time = sorted(operations, key=lambda event: -event.self_cpu_time_total)
        return {
            "wall": unprofiled,
            "wall_profiled": wall,
            "gpu_busy": busy,
            "launch_bound": 1 - min(1.0, busy / unprofiled),
            "kernels": sum(event.count for event in kernels),
            "operations": sum(event.count for event in operations if event.key.startswith("aten::")),
            "waits": sum(event.count for event in operations if event.key in WAITS),
            "places_of_waits": self._places_of_waits(),
            "slowest_functions": self._functions(),
            "slowest_operations": [
                (event.key, event.count, round(event.self_cpu_time_total / 1e3, 2)) for event in by_time[:20]
            ],
            "slowest_kernels": [
                (event.key[:120], event.count, round(event.self_device_time_total / 1e3, 2))
                for event in sorted(kernels, key=lambda event: -event.self_device_time_total)[:20]
            ],
        }

    def figure(self) -> str:
        """Describe the profiled step in one line."""
        data = self.data()
        slowest = {
            what: ", ".join(f"{key[:60]} {count} x {ms:.1f} ms" for key, count, ms in data[f"slowest_{what}"][:8])
            for what in ("operations", "functions", "kernels")
        }
        gpu = ""
        if self._on_gpu:
            gpu = f"{data['kernels']} kernels, {data['waits']} waits, GPU busy {1000 * data['gpu_busy']:.0f} ms: "
            places = ", ".join(f"{place} {count} x" for place, count in data["places_of_waits"])
            gpu += f"launch-bound {data['launch_bound']:.0%}; waits in {places or 'no line'}; "
        step = f"step {1000 * data['wall']:.0f} ms, {data['operations']} operations; "
        return step + gpu + "; ".join(f"most time of {what}: {names}" for what, names in slowest.items() if names)


def _function_name(code: Any) -> str:
    return code if isinstance(code, str) else f"{Path(code.co_filename).name}:{code.co_firstlineno}({code.co_name})"
