"""Speed and memory of training: the recipe as written, TRL, this job and its kernels; where the time of a step goes."""

from __future__ import annotations

import cProfile
import functools
import statistics
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import torch
from torch.profiler import ProfilerActivity, profile

from bench import measure
from bench.gpu.harness import Row, Rows, installed
from bench.gpu.models import BLOOM, SHAPES, SPECIAL, Work, examples
from job.system.device import ComputeSpec
from job.training.batching import num_label_tokens
from job.training.gradients import GradientComputer
from job.training.kernels import Kernels
from job.training.optimizer import LossScale, make_optimizer, update_weights
from job.types import EncodedExample

EXAMPLES_PER_STEP = 16
WARM_UP = 2
"""Steps before those that are measured: kernels are loaded, and memory is allocated."""
MAX_TOKENS = 8192
LEARNING_RATE = 2e-4
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
"""Calls in which the CPU waits for the GPU; a copy to memory of the CPU ends in one of them."""


def own_steps(
    model: peft.PeftModel,
    compute: ComputeSpec,
    steps: Sequence[Sequence[EncodedExample]],
    *,
    kernels: Kernels | None = None,
    recompute: bool = False,
    tick: Callable[[], None] = lambda: None,
) -> list[float]:
    """Take optimizer steps as the job does, call `tick` after each, and return the loss of each."""
    kernels = kernels or Kernels.for_device(compute.device)
    computer = GradientComputer(model, SPECIAL["pad_token_id"], compute, seed=42, kernels=kernels)
    computer.set_recompute(recompute)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = make_optimizer(parameters, kernels)
    loss_scale = LossScale(enabled=compute.precision == "fp16")
    losses = []
    with computer.installed():
        for number, step in enumerate(steps):
            batches = computer.split(step, limit=MAX_TOKENS)
            labels, count, scale = num_label_tokens(step), len(batches), loss_scale.scale
            sums = computer.compute(batches, step=number, label_tokens=labels, count=count, loss_scale=scale)
            outcome = computer.exact.load(sums)
            assert not outcome.out_of_memory, "out of memory"
            if outcome.finite:
                norm = outcome.grad_norm
                update_weights(optimizer, computer.exact.gradient, grad_norm=norm, learning_rate=LEARNING_RATE)
            loss_scale.update(finite=outcome.finite)
            losses.append(outcome.loss)
            tick()
    computer.set_recompute(False)
    return losses


Way = Callable[[peft.PeftModel, Sequence[Sequence[EncodedExample]], Callable[[], None]], list[float]]
"""Takes the steps with a model, calls a function after each, and returns the loss of each."""


@dataclass(frozen=True)
class Speed:
    """What a way to train takes, as medians over steps."""

    tokens_per_second: float
    seconds: float
    """Of a step."""
    first: float
    """Seconds of the first step."""
    gib: float
    """Peak memory above the loaded model."""
    share_of_peak: float
    """Useful FLOP/s as a share of what large matrix products reach."""
    loss: float
    """Of the last step."""

    def __str__(self) -> str:
        return (
            f"{self.tokens_per_second:,.0f} tokens/s, {1000 * self.seconds:.0f} ms a step (the first "
            f"{self.first:.2f} s), {self.gib:.2f} GiB above the weights, {self.share_of_peak:.1%} of the peak, "
            f"loss {self.loss}"
        )


def measured(
    model: peft.PeftModel,
    compute: ComputeSpec,
    steps: Sequence[Sequence[EncodedExample]],
    take: Callable[[Callable[[], None]], list[float]],
    peak: float,
) -> Speed:
    """Take the steps and measure them; `peak` is in GFLOP/s."""
    memory = measure.watch_memory(compute.device)
    clock = measure.Clock(compute.device)
    losses = take(clock.tick)
    later = slice(WARM_UP, None)
    seconds = statistics.median(clock.seconds[later])
    tokens = [sum(len(example.input_ids) for example in step) for step in steps][later]
    useful = [measure.useful_gflop(model, step) for step in steps][later]
    total = sum(clock.seconds[later])
    return Speed(
        sum(tokens) / total, seconds, clock.seconds[0], memory(), sum(useful) / total / peak, round(losses[-1], 4)
    )


def check_speed(work: Work) -> Rows:
    """Measure each way to train on the same texts of real length, in the recipe's base and quantization."""
    compute = work.compute()
    peak = measure.peak_gflops(compute)
    yield Row("peak of matrix products", None, f"{peak / 1000:.1f} TFLOP/s in {compute.precision}", {"gflops": peak})
    steps = [examples(4 if work.toy else EXAMPLES_PER_STEP, seed=i) for i in range(WARM_UP + work.steps)]
    for shape, quantize in ((BLOOM, work.quantizations[0]), (SHAPES[1], "none")):
        baseline: float | None = None
        for name, way in _ways(work).items():
            what = f"{shape}, {quantize}, {compute.precision}: {name}"
            try:
                speed = _measure_way(work, shape, quantize, way, steps, peak)
            except (RuntimeError, TypeError, ValueError, ImportError) as error:  # the others are measured all the same
                yield Row(what, False, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
                continue
            baseline = baseline or speed.tokens_per_second
            times = speed.tokens_per_second / baseline
            yield Row(what, None, f"{times:.2f} x, {speed}", {**speed.__dict__, "times": times})
            work.release()


def _measure_way(
    work: Work, shape: str, quantize: str, way: Way, steps: Sequence[Sequence[EncodedExample]], peak: float
) -> Speed:
    model = work.model(shape, quantize, work.compute(), dropout=0.05)
    return measured(model, work.compute(), steps, functools.partial(way, model, steps), peak)


def _ways(work: Work) -> dict[str, Way]:
    """Return the ways to take steps, by name; the first is the baseline."""
    compute = work.compute()

    def library(name: str) -> Way:
        """Return one of the ways in bench/variants.py, with the settings of the recipe."""

        def way(model: peft.PeftModel, steps: Any, tick: Callable[[], None]) -> list[float]:
            from bench import variants
            from job.settings import Train

            tokenizer: Any = SimpleNamespace(pad_token_id=SPECIAL["pad_token_id"])
            settings: Any = SimpleNamespace(train=Train())
            prepared = variants.Work(model, tokenizer, compute, settings, steps, work.folder)
            return variants.variants()[name](prepared)(tick)

        return way

    def own(kernels: Kernels | None = None, *, recompute: bool = False) -> Way:
        return lambda model, steps, tick: own_steps(
            model, compute, steps, kernels=kernels, recompute=recompute, tick=tick
        )

    ways: dict[str, Way] = {}
    if installed("pydantic_settings"):
        ways["the recipe as written"] = library("recipe")
        if installed("trl"):
            ways["TRL's best"] = library("trl-best")
    ways |= {"this job": own(), "this job, recomputing": own(recompute=True)}
    for name, kernels in kernel_variants(work.device).items():
        ways[name] = own(kernels)
    return ways


def kernel_variants(device: torch.device) -> dict[str, Kernels]:
    """Return the kernels to compare with the default ones: each change alone, then all together."""
    default = Kernels.for_device(device)
    changed: dict[str, Any] = {}
    found = {}
    for name in (field.name for field in fields(Kernels)):
        for value in Kernels.choices(name, device):
            if value != getattr(default, name):
                found[f"{name}={value}"] = Kernels(**{**default.__dict__, name: value})
                changed.setdefault(name, value)
    if len(changed) > 1:
        found["all of these"] = Kernels(**{**default.__dict__, **changed})
    return found


def check_profile(work: Work) -> Rows:
    """Count the kernels of a step, the waits of the CPU, and the share of the time in which the GPU computes."""
    compute = work.compute()
    texts = [examples(4 if work.toy else EXAMPLES_PER_STEP, seed=i) for i in range(WARM_UP + 4)]
    default = Kernels.for_device(work.device)
    variants = {"this job": default}
    if all_of_them := kernel_variants(work.device).get("all of these"):
        variants["all variants"] = all_of_them
    for name, kernels in variants.items():
        model = work.model(BLOOM, work.quantizations[0], compute, dropout=0.05)
        profiled = _Profiled(work.device)
        own_steps(model, compute, texts, kernels=kernels, tick=profiled.tick)
        yield Row(f"{BLOOM}, {work.quantizations[0]}: {name}", None, profiled.figure(), profiled.data())


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
