"""Train on one part of the examples and answer another part: what `tagger-job tune` and the quality bench compare."""

from __future__ import annotations

import gc
import json
import logging
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from job import pipeline
from job.data import fingerprint
from job.dataset.split import split_calibration
from job.decoding.config import initial_config
from job.errors import DivergedError
from job.evaluate import calibrate, fit
from job.lora import save_adapter
from job.preflight import PreflightResult
from job.runs import run_folder
from job.runs.run_folder import RunFolder
from job.sample import Tagger
from job.settings import Settings
from job.system.device import ComputeSpec
from job.train import train
from job.types import Example, SplitData

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Answers:
    """The answers of an adapter to the held-out texts, and what they took."""

    predicted: list[list[str]]
    """The tags that reach the threshold."""
    scored: list[list[tuple[str, float]]]
    """All tags with their confidences; with greedy decoding only those that reach the threshold."""
    well_formed: list[bool]
    threshold: float
    training_seconds: float
    tagging_seconds: float

    @property
    def seconds(self) -> float:
        return self.training_seconds + self.tagging_seconds


def parts_of(examples: SplitData, settings: Settings) -> SplitData:
    """Return the examples with those set aside on which a threshold of `auto` is found."""
    return split_calibration(examples, settings.data) if settings.sample.threshold == "auto" else examples


def fold_of(train: Sequence[Example], held_out: Sequence[Example]) -> SplitData:
    """Return a fold as the examples of a run."""
    return SplitData(tuple(train), tuple(held_out), fingerprint(train, held_out))


def answers(
    settings: Settings,
    examples: SplitData,
    folder: Path,
    *,
    make: Callable[..., Tagger] = Tagger,
    on_saved: Callable[[RunFolder], None] | None = None,
) -> Answers:
    """Return the answers to the held-out examples; trains if `folder` has no adapter of these settings and examples.

    What is finished there, training or answers, is not repeated, and a training that was interrupted resumes. An
    adapter does not depend on how it is decoded, so settings that differ in decoding alone share one.
    Raises DivergedError, again without training, if the training diverged.
    """
    key = f"answers-{settings.digest(make.__name__)}.json"
    run = open_trial(settings, examples, folder)
    run.on_saved = on_saved
    if (failure := run.manifest.get("diverged")) is not None:
        raise DivergedError(failure)
    if run.is_intact(key):
        return _from_json(json.loads((run.path / key).read_text(encoding="utf-8")))
    compute = ComputeSpec.resolve(settings.run.device, settings.train.precision)
    free_memory()  # of a trial that has failed
    with run.released_afterwards():
        run.begin(str(compute))
        found = _answers(settings, examples, run, compute, make)
        run.write(key, json.dumps(asdict(found), ensure_ascii=False))
        run.record_checksums(key)
        run.update(status="complete")
    free_memory()
    return found


def open_trial(settings: Settings, examples: SplitData, folder: Path) -> RunFolder:
    """Open the folder of a training, new or started; nothing is written."""
    place = settings.run.model_copy(update={"dir": folder.parent, "id": folder.name, "store": None})
    return RunFolder.open(settings.with_published_decoding().model_copy(update={"run": place}), examples)


def _answers(
    settings: Settings, examples: SplitData, run: RunFolder, compute: ComputeSpec, make: Callable[..., Tagger]
) -> Answers:
    checked = PreflightResult(settings, examples, run, None, None, run_folder.utc_now())
    loaded = pipeline.load(checked, compute)
    seconds = _train(loaded, settings, run, compute)
    tagger = make(loaded.model, loaded.tokenizer, settings, compute, initial_config(settings.sample, loaded.examples))
    if tagger.decoding.needs_scorers:
        tagger.set_scorers(fit(tagger, loaded.examples))
    if settings.sample.threshold == "auto":
        with run.chapter("calibrate"):
            calibrate(tagger, examples.calibration)
    threshold = tagger.decoding.threshold
    if tagger.decoding.decoding != "greedy":  # keep what other thresholds would keep
        tagger.decoding = tagger.decoding.model_copy(update={"threshold": 0.0})
    started = time.monotonic()
    with run.chapter("evaluate"):
        given = tagger.tag([example.text for example in examples.held_out[: settings.eval.limit]])
    scored = [list(zip(answer.tags, answer.confidences, strict=True)) for answer in given]
    return Answers(
        predicted=[[tag for tag, confidence in tags if confidence >= threshold] for tags in scored],
        scored=scored,
        well_formed=[answer.well_formed for answer in given],
        threshold=threshold,
        training_seconds=seconds,
        tagging_seconds=time.monotonic() - started,
    )


def _train(loaded: pipeline.Loaded, settings: Settings, run: RunFolder, compute: ComputeSpec) -> float:
    """Train the adapters, or load those that are trained; return the seconds that training took."""
    if run.is_intact("adapter"):
        loaded.model.load_adapter(str(run.adapter), "default")
        return float(run.manifest["training_seconds"])
    run.update(base_weights=loaded.weights)
    try:
        with run.chapter("train"):
            trained = train(
                loaded.model, loaded.encoded, settings.train, tokenizer=loaded.tokenizer, compute=compute, run=run
            )
    except DivergedError as error:
        run.update(diverged=str(error), status="failed")
        raise
    with run.folder("adapter") as into:
        save_adapter(loaded.model, loaded.tokenizer, into, settings.base)
    run.update(training_seconds=round(trained.seconds, 2))
    run.record_checksums("adapter", "log.jsonl")
    for checkpoint in run.checkpoints.iterdir():
        shutil.rmtree(checkpoint) if checkpoint.is_dir() else checkpoint.unlink()
    return trained.seconds


def _from_json(values: Mapping[str, Any]) -> Answers:
    scored = [[(tag, confidence) for tag, confidence in tags] for tags in values["scored"]]
    return Answers(**{**values, "scored": scored})


def with_share_of_steps(settings: Settings, share: float) -> Settings:
    """Return settings with a share of the steps, of which as large a part is warm-up."""
    trained = settings.train
    update = {
        "max_steps": max(1, round(share * trained.max_steps)),
        "warmup_steps": round(share * trained.warmup_steps),
    }
    return settings.model_copy(update={"train": trained.model_copy(update=update)})


def free_memory() -> None:
    """Free the memory of a model that nothing refers to any more."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
