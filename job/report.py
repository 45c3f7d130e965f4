"""What a run says of itself: metrics, predictions, samples, the model card, the summary."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from job import data
from job.card import card
from job.evaluate import score_tags
from job.plots import loss_curve
from job.results import Prediction, PushFailed, Refused, Scores, Summary, Tagged, Trained
from job.run_folder import RunFolder, try_to_write
from job.settings import Settings
from job.whole import json_lines, write_whole

log = logging.getLogger(__name__)

LONGEST_NAME = 200
"""Bytes; file systems take 255, and the name is longer while the file is being written."""

if TYPE_CHECKING:
    from job.sample import Tagger


def kept_evaluation(
    run: RunFolder, chapter: str, weights: str, evaluate: Callable[[], tuple[Scores, list[Prediction]]]
) -> tuple[Scores, list[Prediction]]:
    """An evaluation's outcome: the one that an attempt before kept for these weights, or else made now and kept."""
    name = f"checkpoints/{chapter}.json"
    with run.chapter(chapter):
        if run.sealed(name):
            found = json.loads((run.path / name).read_text(encoding="utf-8"))
            if found["weights"] == weights:
                return Scores(**found["scores"]), [
                    Prediction(was["text"], tuple(was["gold"]), tuple(was["predicted"]), was["raw"])
                    for was in found["predictions"]
                ]
        scores, predictions = evaluate()
        kept = {"weights": weights, "scores": asdict(scores), "predictions": list(map(asdict, predictions))}
        try:
            run.write(name, json.dumps(kept, ensure_ascii=False))
            run.seal(name)
        except OSError as error:
            log.warning("%s: not kept in case of an interruption (%s)", chapter, error.strerror or error)
    return scores, predictions


def scores(run: RunFolder) -> dict[str, Scores]:
    """The scores in metrics.json."""
    metrics = json.loads((run.path / "metrics.json").read_text(encoding="utf-8"))
    return {name: Scores(**score) for name, score in metrics["scores"].items()}


def save_metrics(
    run: RunFolder, scores: Mapping[str, Scores], trained: Trained, predictions: Sequence[Prediction]
) -> None:
    """Write metrics.json, predictions.jsonl and tags.jsonl."""
    run.write_lines("predictions.jsonl", map(asdict, predictions))
    tags = score_tags([was.gold for was in predictions], [was.predicted for was in predictions])
    run.write_lines("tags.jsonl", map(asdict, tags))
    metrics = {
        "schema_version": 1,
        "split": {"examples": len(predictions), "sha256": data.split_digest(predictions)},
        "scores": {name: asdict(score) for name, score in scores.items()},
        "training": asdict(trained),
    }
    run.write("metrics.json", json.dumps(metrics, indent=2) + "\n")


def save_card(
    adapter: Path, settings: Settings, scores: Mapping[str, Scores], run: RunFolder, *, licence: str | None
) -> None:
    """Write the model card in the place of the one that peft made, and the picture that it shows."""
    history = [json.loads(line) for line in (run.path / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    run.write("loss.svg", loss_curve([entry["step"] for entry in history], [entry["loss"] for entry in history]))
    (adapter / "README.md").write_text(card(settings, scores, run.manifest["versions"], licence), encoding="utf-8")


def save_samples(run: RunFolder, samples: Sequence[Tagged]) -> None:
    """Write samples.jsonl: the answers of the model in memory."""
    run.write_lines("samples.jsonl", map(asdict, samples))


def check_round_trip(run: RunFolder, load: Callable[[], Tagger], settings: Settings) -> None:
    """Tag the samples' texts anew, show the answers, and compare them with those of the model in memory.

    Raises PushFailed when the adapter cannot be loaded back, or when an answer differs: then what
    others load is not what was trained.
    """
    before = [json.loads(line) for line in (run.path / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    try:
        samples = load().tag([sample["text"] for sample in before])
    except Refused as refusal:
        raise PushFailed(
            f"what was saved cannot be loaded back: {refusal} "
            f"Try again with: TAGGER_RUN_ID={run.path.name} tagger-job push"
        ) from refusal
    show_samples(samples, settings.sample.output)
    for old, new in zip(before, samples, strict=True):
        if old["raw"] != new.raw:
            raise PushFailed(
                f"loaded anew, the adapter answers {new.raw!r} to {new.text!r}, and answered {old['raw']!r} after "
                f"training: what was saved is not what was trained; look at {run.path} before using it"
            )


def show_samples(samples: Sequence[Tagged], output: Path | None) -> None:
    """Print a line for each answer, `prompt ['tag', ...]`, and write the file that is asked for."""
    for sample in samples:
        unparsed = "" if sample.parsed else f"   (not a whole list: {sample.raw!r})"
        print(f"{sample.prompt} {list(sample.tags)}{unparsed}", flush=True)
    if output is not None:
        write_whole(output, json_lines(map(asdict, samples)))


def check_output(output: Path | None, *inputs: str | Path | None) -> None:
    """Raise Refused when the file that is to get the answers cannot be written, or is something else's.

    It is replaced by renaming, which would put a plain file in the place of a device or a link.
    """
    if output is None:
        return
    try:
        taken = os.path.lexists(output) and (output.is_symlink() or not output.is_file())
    except OSError as error:
        raise Refused(f"TAGGER_SAMPLE_OUTPUT={output} cannot be written: {error.strerror or error}") from error
    if taken or not output.name or len(output.name.encode()) > LONGEST_NAME:
        raise Refused(
            f"TAGGER_SAMPLE_OUTPUT={output} is not a file that can be written anew; expected the path of a plain file"
        )
    if any(output.resolve() == Path(other).resolve() for other in inputs if other):
        raise Refused(f"TAGGER_SAMPLE_OUTPUT={output} is also read by this job; name another file")
    try_to_write(output.parent, "the answers' folder", "TAGGER_SAMPLE_OUTPUT to a file in one")


def summary(run: RunFolder) -> Summary:
    """How a complete run ended."""
    published = run.manifest["published"]
    if published is not None:
        return Summary(run.path, published["url"], pushed=True)
    return Summary(run.path, str(run.adapter), pushed=False)
