"""Estimate what a run takes from a few real steps and answers: time by chapter, memory, price."""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from job import pipeline
from job.decoding.blend import Blend
from job.decoding.config import initial_config
from job.evaluate import evaluate, fit
from job.metrics.baselines import score_baselines
from job.metrics.embeddings import load_embedding_baseline
from job.preflight import PreflightResult
from job.runs.atomic import atomic_write
from job.runs.budget import price_per_hour
from job.runs.estimates import estimate_file
from job.runs.run_folder import RunFolder
from job.sample import Tagger
from job.settings import Train
from job.system.device import ComputeSpec
from job.training.exchange import SingleProcess
from job.training.trainer import Trainer
from job.types import Example

STEPS = 6
"""Steps that are taken; the first one is left out, because it also starts what later ones reuse."""
ANSWERS = 8
"""Texts that are tagged with the adapter, and with the base model alone."""
REPORT_SECONDS = 4.0
"""Reports with pictures, model card, and the end of the run."""


@dataclass(frozen=True)
class Measurement:
    """What a run is expected to take."""

    seconds: dict[str, float]
    """By chapter, as in the manifest's `timings`, with what is in none of them as `checks` and `report`."""
    peak_memory: dict[str, float]
    """GiB, as in the manifest."""
    dollars: float | None
    price_from: str | None
    device: str
    processes: int

    @property
    def total(self) -> float:
        """Seconds of the complete run, without publishing."""
        return sum(self.seconds.values())

    def describe(self) -> list[str]:
        """Return lines to print."""
        chapters = ", ".join(f"{name.replace('_', ' ')} {value:.0f} s" for name, value in self.seconds.items())
        kinds = {name.partition("_")[0]: value for name, value in self.peak_memory.items()}
        memory = ", ".join(f"{value:.1f} GiB of {kind} memory" for kind, value in kinds.items())
        price = "" if self.dollars is None else f", about ${self.dollars:.2f} ({self.price_from})"
        return [
            f"estimate: {self.total:.0f} s in all{price}, {memory}",
            f"measured with {STEPS} steps and {ANSWERS} answers on {self.device}, without the upload",
            f"estimate: {chapters}",
        ]


def measure(checked: PreflightResult, processes: int = 1, *, checks_seconds: float = 0.0) -> Measurement:
    """Take a few steps and give a few answers on the device, and extrapolate to the complete run.

    Nothing of it is kept but the estimate, which the run's report shows beside what it took. `checks_seconds` is what
    the checks took so far, in this process. Training and answers are measured with one process and divided by
    `processes`.
    """
    settings = checked.settings
    compute = ComputeSpec.resolve(settings.run.device, settings.train.precision)
    compute.reset_peak_memory()
    seconds = {"checks": checks_seconds}
    with tempfile.TemporaryDirectory(prefix="tagger-") as folder:
        started = time.monotonic()
        loaded = pipeline.load(checked, compute)
        more_baselines = load_embedding_baseline(settings.eval, str(compute.device))
        seconds["load"] = time.monotonic() - started
        scratch = RunFolder(Path(folder), dict(checked.run.manifest))
        train = _at_the_peak(settings.train)
        loop = Trainer(loaded.model, loaded.encoded, train, loaded.tokenizer, compute, scratch, SingleProcess())
        seconds["train"] = _training_seconds(loop, settings.train.max_steps) / processes
    tagger = Tagger(loaded.model, loaded.tokenizer, settings, compute, initial_config(settings.sample, loaded.examples))
    seconds |= {name: value / processes for name, value in _evaluation_seconds(checked, tagger, loaded.model).items()}
    started = time.monotonic()
    examples = checked.examples
    score_baselines(examples.train + examples.calibration, examples.held_out[: settings.eval.limit], more_baselines)
    seconds["report"] = time.monotonic() - started + REPORT_SECONDS
    # the pushed or saved adapter is loaded once more, and tags the sample texts as after training
    seconds["sample"] = seconds["load"]
    price = price_per_hour(settings.run, str(compute), compute.gpus)
    found = Measurement(
        {name: round(value, 1) for name, value in seconds.items()},
        compute.peak_memory(),
        None if price is None else round(price[0] * sum(seconds.values()) / 3600, 4),
        None if price is None else price[1],
        str(compute),
        processes,
    )
    save(found, checked.run)
    return found


def _at_the_peak(settings: Train) -> Train:
    """Return settings whose first steps have the peak learning rate: answers then soon are lists of usual length."""
    return settings.model_copy(update={"max_steps": STEPS, "warmup_steps": 0, "lr_scheduler_type": "constant"})


def _training_seconds(loop: Trainer, steps: int) -> float:
    """Return the seconds of all steps, by the tokens of their examples."""
    times = loop.time_steps(STEPS)
    measured = sum(loop.tokens_of(step) for step in range(1, STEPS))
    total = sum(loop.tokens_of(step) for step in range(steps))
    return times[0] + sum(times[1:]) * max(0.0, total - loop.tokens_of(0)) / measured


def _evaluation_seconds(checked: PreflightResult, tagger: Tagger, model: Any) -> dict[str, float]:
    settings, examples = checked.settings, checked.examples
    held_out = examples.held_out[: settings.eval.limit]
    sample = _spread(held_out, ANSWERS)

    def seconds_each() -> float:
        started = time.monotonic()
        evaluate(tagger, sample)
        return (time.monotonic() - started) / len(sample)

    if "head" in tagger.decoding.parts:  # how many tags a head has makes no difference next to the forward pass
        texts = [Example(example.text, tagger.decoding.tags[:1]) for example in (*sample, *sample)]
        tagger.set_scorers(fit(tagger, texts))
        parts = dict.fromkeys(tagger.decoding.parts, 1.0)
        tagger.decoding = tagger.decoding.model_copy(update={"blend": Blend(weights=parts)})
    each = seconds_each()
    with model.disable_adapter(), tagger.without_scorers():
        base = seconds_each()
    answers = len(examples.calibration) if settings.sample.threshold == "auto" else 0
    answers += len(examples.train) if "head" in tagger.decoding.parts else 0
    found = {"calibrate": each * answers} if answers else {}
    found |= {"evaluate_base": base * len(held_out), "evaluate": each * len(held_out)}
    if settings.eval.gate == "published":
        found["evaluate_published"] = each * len(held_out)
    return found


def _spread(examples: tuple[Example, ...], count: int) -> list[Example]:
    """Return some examples of all lengths, from the shortest to the longest."""
    by_length = sorted(examples, key=lambda example: len(example.text))
    step = max(1, math.ceil(len(by_length) / count))
    return by_length[step // 2 :: step] or list(by_length)


def save(found: Measurement, run: RunFolder) -> None:
    """Keep the estimate in the cache, for the report of the run."""
    file = estimate_file(run.path.name)
    file.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(file, json.dumps(as_json(found)))


def as_json(found: Measurement) -> Mapping[str, Any]:
    """Return a measurement as JSON types, with the total."""
    return {**asdict(found), "total_seconds": round(found.total, 1)}
