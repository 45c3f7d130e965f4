"""The results of a run as files: evaluations, metrics, predictions and samples."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from job.dataset.sources import find_files
from job.dataset.split import split_digest
from job.decoding.blend import Blend
from job.decoding.equivalence import same_answer
from job.errors import InvalidInputError, PublishError
from job.metrics.scores import score_tags
from job.runs import shutdown
from job.runs.atomic import atomic_write, json_lines
from job.runs.run_folder import RunFolder, check_writable
from job.settings import Data, Sample, Settings
from job.types import Prediction, Scores, Summary, TaggedText, ThresholdScores, TrainResult, Verdict

if TYPE_CHECKING:
    from job.decoding.scorers import Scorers
    from job.sample import Tagger

log = logging.getLogger(__name__)

MAX_NAME_BYTES = 200
"""File systems allow 255 bytes, and the temporary name during the write is longer than the final one."""


def cached_evaluation(
    run: RunFolder, chapter: str, cache_key: str, evaluate: Callable[[], tuple[Scores, list[Prediction]]]
) -> tuple[Scores, list[Prediction]]:
    """Return the result of `evaluate`, or the one that an earlier attempt saved for the same `cache_key`.

    A result that cannot be saved is returned all the same.
    """
    name = f"checkpoints/{chapter}.json"
    with run.chapter(chapter):
        if run.is_intact(name):
            saved = json.loads((run.path / name).read_text(encoding="utf-8"))
            if saved["weights"] == cache_key:
                return Scores(**saved["scores"]), list(map(_prediction, saved["predictions"]))
        scores, predictions = evaluate()
        result = {"weights": cache_key, "scores": asdict(scores), "predictions": list(map(asdict, predictions))}
        try:
            run.write(name, json.dumps(result, ensure_ascii=False))
            run.record_checksums(name)
        except OSError as error:
            log.warning("%s: result not saved, a resumed run evaluates again (%s)", chapter, error.strerror or error)
    return scores, predictions


def cached_scorers(run: RunFolder, cache_key: str, fit: Callable[[], Scorers]) -> Scorers:
    """Return the scorers of `fit`, or those that an earlier attempt saved for the same `cache_key`."""
    from job.decoding.scorers import Scorers  # imports torch

    name = f"checkpoints/scorers-{cache_key[:16]}"
    with run.chapter("calibrate"):
        if run.is_intact(name):
            return Scorers.from_folder(run.path / name)
        scorers = fit()
        try:
            with run.folder(name) as folder:
                scorers.save(folder)
            run.record_checksums(name)
        except OSError as error:
            log.warning("calibrate: head not saved, a resumed run fits it again (%s)", error.strerror or error)
    return scorers


def cached_threshold(
    run: RunFolder, cache_key: str, tagger: Tagger, calibrate: Callable[[], Sequence[ThresholdScores]]
) -> None:
    """Set threshold and blend of the tagger with `calibrate`, or to those found earlier for the same `cache_key`.

    thresholds.jsonl has what `calibrate` returns.
    """
    with run.chapter("calibrate"):
        saved = run.manifest.get("threshold")
        if saved is not None and saved["weights"] == cache_key:
            with suppress(
                ValidationError
            ):  # of a blend that an earlier version found, which is computed in another way
                blend = Blend.model_validate(saved["blend"]) if "blend" in saved else None
                tagger.decoding = tagger.decoding.model_copy(update={"threshold": saved["value"], "blend": blend})
                return
        run.write_lines("thresholds.jsonl", map(asdict, calibrate()))
        run.record_checksums("thresholds.jsonl")
        found, blend = {"weights": cache_key, "value": tagger.decoding.threshold}, tagger.decoding.blend
        run.update(threshold=found if blend is None else {**found, "blend": blend.model_dump()})


def metrics(run: RunFolder) -> dict[str, Any]:
    """Read metrics.json."""
    found: dict[str, Any] = json.loads((run.path / "metrics.json").read_text(encoding="utf-8"))
    return found


def scores(run: RunFolder) -> dict[str, Scores]:
    """Read the scores in metrics.json."""
    return {name: Scores(**values) for name, values in metrics(run)["scores"].items()}


def predictions(run: RunFolder) -> list[Prediction]:
    """Read predictions.jsonl."""
    return list(map(_prediction, run.read_lines("predictions.jsonl")))


def _prediction(values: dict[str, Any]) -> Prediction:
    gold, predicted, confidences = (tuple(values.get(name, ())) for name in ("gold", "predicted", "confidences"))
    return Prediction(values["text"], gold, predicted, values["raw"], confidences)


def verdict(run: RunFolder) -> Verdict | None:
    """Read the gate's verdict in metrics.json; None if the gate has not run yet."""
    values = metrics(run).get("gate")
    return None if values is None else Verdict(**values)


def save_verdict(run: RunFolder, verdict: Verdict, published: Scores | None) -> None:
    """Add the verdict, and the scores of the published adapter it was compared with, to metrics.json."""
    saved = metrics(run)
    saved["scores"].pop("published", None)
    saved["scores"] |= {} if published is None else {"published": asdict(published)}
    with shutdown.deferred():
        run.write("metrics.json", json.dumps(saved | {"gate": asdict(verdict)}, indent=2) + "\n")
        run.record_checksums("metrics.json")


def save_metrics(
    run: RunFolder, scores: Mapping[str, Scores], trained: TrainResult, predictions: Sequence[Prediction]
) -> None:
    """Write metrics.json, predictions.jsonl and tags.jsonl."""
    run.write_lines("predictions.jsonl", map(asdict, predictions))
    tags = score_tags([entry.gold for entry in predictions], [entry.predicted for entry in predictions])
    run.write_lines("tags.jsonl", map(asdict, tags))
    metrics = {
        "schema_version": 1,
        "split": {"examples": len(predictions), "sha256": split_digest(predictions)},
        "scores": {name: asdict(score) for name, score in scores.items()},
        "training": asdict(trained),
    }
    run.write("metrics.json", json.dumps(metrics, indent=2) + "\n")


def save_samples(run: RunFolder, samples: Sequence[TaggedText]) -> None:
    """Write samples.jsonl: the answers of the model that was trained."""
    run.write_lines("samples.jsonl", map(asdict, samples))


def check_round_trip(run: RunFolder, load: Callable[[], Tagger], settings: Settings) -> None:
    """Tag the texts of samples.jsonl with a reloaded adapter, show the answers, and compare them with the saved ones.

    Raises PublishError if the adapter cannot be loaded, or if an answer differs: then others would load something
    else than what was trained.
    """
    old_samples = run.read_lines("samples.jsonl")
    try:
        tagger = load()
        new_samples = tagger.tag([sample["text"] for sample in old_samples])
    except InvalidInputError as error:
        raise PublishError(
            f"the saved adapter cannot be loaded back: {error}. "
            f"Try again with: TAGGER_RUN_ID={run.path.name} tagger-job push"
        ) from error
    show_samples(new_samples, settings.sample.output)
    for old, sample in zip(old_samples, new_samples, strict=True):
        new = asdict(sample)
        if not same_answer(old, new, tagger.decoding):
            old_tags, new_tags = (dict(zip(s["tags"], s["confidences"], strict=True)) for s in (old, new))
            raise PublishError(
                f"the reloaded adapter answers {new['raw']!r} to {new['text']!r} ({new_tags}), but after training it "
                f"answered {old['raw']!r} ({old_tags}): what was saved is not what was trained; inspect {run.path} "
                "before using it"
            )


def show_samples(samples: Sequence[TaggedText], output: Path | None) -> None:
    """Print a line for each answer, `prompt ['tag', ...]`, and write them as JSON lines to `output` if it is set."""
    for sample in samples:
        print(sample, flush=True)
    if output is not None:
        atomic_write(output, json_lines(map(asdict, samples)))


def check_output(sample: Sample, data: Data | None = None) -> None:
    """Raise InvalidInputError if the file for the answers cannot be written, or is one of the inputs.

    The file is replaced by renaming, which would put a regular file in the place of a device or a link.
    """
    output = sample.output
    if output is None:
        return
    try:
        is_special = os.path.lexists(output) and (output.is_symlink() or not output.is_file())
    except OSError as error:
        raise InvalidInputError(
            f"TAGGER_SAMPLE_OUTPUT={output} cannot be written: {error.strerror or error}"
        ) from error
    if is_special or not output.name or len(output.name.encode()) > MAX_NAME_BYTES:
        raise InvalidInputError(
            f"TAGGER_SAMPLE_OUTPUT={output} is not a file that can be replaced; expected the path of a regular file"
        )
    inputs = [sample.input, sample.vocabulary, *([] if data is None else [data.dataset, data.eval_dataset])]
    if any(output.resolve() == file.resolve() for name in inputs if name for file in _local_files(str(name))):
        raise InvalidInputError(f"TAGGER_SAMPLE_OUTPUT={output} is also read by this job; name another file")
    check_writable(output.parent, "the folder for the answers", "TAGGER_SAMPLE_OUTPUT to a file in a folder")


def _local_files(name: str) -> Iterator[Path]:
    """Yield the files of this machine that a setting may name: a file, those of a folder or a glob, or several."""
    for part in (name, *name.split(",")):
        yield Path(part)
        if "://" not in part:
            with suppress(InvalidInputError, OSError):  # a repo of the Hub, or no data file; the data's checks say so
                yield from (Path(file.path) for file in find_files(part))


def summary(run: RunFolder) -> Summary:
    """Return how a complete run ended."""
    published = run.manifest["published"]
    if published is not None:
        return Summary(run.path, published["url"], pushed=True)
    return Summary(run.path, str(run.adapter), pushed=False)
