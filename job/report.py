"""What a run says of itself: metrics, predictions, samples, the model card, the summary."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from job.dataset.split import split_digest
from job.decoding.equivalence import same_answer
from job.errors import InvalidInputError, PublishError
from job.metrics.scores import score_tags
from job.model_card import model_card, score_table
from job.runs import markup, plots, shutdown
from job.runs.atomic import atomic_write, json_lines
from job.runs.markup import Block, Picture
from job.runs.run_folder import RunFolder, check_writable
from job.settings import Settings
from job.types import Prediction, Published, Scores, Summary, TaggedText, TrainResult, Verdict

log = logging.getLogger(__name__)

LONGEST_NAME = 200
"""Bytes; file systems take 255, and the name is longer while the file is being written."""

TAGS_SHOWN = 15
"""The most frequent ones; tags.jsonl has all."""

if TYPE_CHECKING:
    from job.sample import Tagger


def cached_evaluation(
    run: RunFolder, chapter: str, weights: str, evaluate: Callable[[], tuple[Scores, list[Prediction]]]
) -> tuple[Scores, list[Prediction]]:
    """An evaluation's outcome: the one that an attempt before kept for these weights, or else made now and kept."""
    name = f"checkpoints/{chapter}.json"
    with run.chapter(chapter):
        if run.is_intact(name):
            found = json.loads((run.path / name).read_text(encoding="utf-8"))
            if found["weights"] == weights:
                return Scores(**found["scores"]), [_prediction(was) for was in found["predictions"]]
        scores, predictions = evaluate()
        kept = {"weights": weights, "scores": asdict(scores), "predictions": list(map(asdict, predictions))}
        try:
            run.write(name, json.dumps(kept, ensure_ascii=False))
            run.record_checksums(name)
        except OSError as error:
            log.warning("%s: not kept in case of an interruption (%s)", chapter, error.strerror or error)
    return scores, predictions


def cached_threshold(run: RunFolder, weights: str, tagger: Tagger, calibrate: Callable[[], None]) -> None:
    """Give a tagger the threshold that an attempt before found for these weights, or find and note it now."""
    with run.chapter("calibrate"):
        kept = run.manifest.get("threshold")
        if kept is not None and kept["weights"] == weights:
            tagger.decoding = replace(tagger.decoding, threshold=kept["value"])
            return
        calibrate()
        run.update(threshold={"weights": weights, "value": tagger.decoding.threshold})


def scores(run: RunFolder) -> dict[str, Scores]:
    """The scores in metrics.json."""
    metrics = json.loads((run.path / "metrics.json").read_text(encoding="utf-8"))
    return {name: Scores(**score) for name, score in metrics["scores"].items()}


def predictions(run: RunFolder) -> list[Prediction]:
    """The lines of predictions.jsonl."""
    return [_prediction(was) for was in _lines(run, "predictions.jsonl")]


def _prediction(was: dict[str, Any]) -> Prediction:
    return Prediction(was["text"], tuple(was["gold"]), tuple(was["predicted"]), was["raw"])


def verdict(run: RunFolder) -> Verdict | None:
    """The gate's verdict in metrics.json, if there was one."""
    found = json.loads((run.path / "metrics.json").read_text(encoding="utf-8")).get("gate")
    return None if found is None else Verdict(**found)


def save_verdict(run: RunFolder, verdict: Verdict, published: Scores | None) -> None:
    """Add the verdict, and the scores of the adapter that was compared with, to metrics.json."""
    metrics = json.loads((run.path / "metrics.json").read_text(encoding="utf-8"))
    metrics["scores"].pop("published", None)
    metrics["scores"] |= {} if published is None else {"published": asdict(published)}
    with shutdown.deferred():
        run.write("metrics.json", json.dumps(metrics | {"gate": asdict(verdict)}, indent=2) + "\n")
        run.record_checksums("metrics.json")


def save_metrics(
    run: RunFolder, scores: Mapping[str, Scores], trained: TrainResult, predictions: Sequence[Prediction]
) -> None:
    """Write metrics.json, predictions.jsonl and tags.jsonl."""
    run.write_lines("predictions.jsonl", map(asdict, predictions))
    tags = score_tags([was.gold for was in predictions], [was.predicted for was in predictions])
    run.write_lines("tags.jsonl", map(asdict, tags))
    metrics = {
        "schema_version": 1,
        "split": {"examples": len(predictions), "sha256": split_digest(predictions)},
        "scores": {name: asdict(score) for name, score in scores.items()},
        "training": asdict(trained),
    }
    run.write("metrics.json", json.dumps(metrics, indent=2) + "\n")


def save_card(
    adapter: Path, settings: Settings, scores: Mapping[str, Scores], run: RunFolder, *, licence: str | None
) -> None:
    """Write the model card in the place of the one that peft made, and the picture that it shows."""
    history = _lines(run, "log.jsonl")
    run.write("loss.svg", _curve("training loss", history, "loss"))
    (adapter / "README.md").write_text(
        model_card(settings, scores, run.manifest["versions"], licence), encoding="utf-8"
    )


def save_samples(run: RunFolder, samples: Sequence[TaggedText]) -> None:
    """Write samples.jsonl: the answers of the model in memory."""
    run.write_lines("samples.jsonl", map(asdict, samples))


def check_round_trip(run: RunFolder, load: Callable[[], Tagger], settings: Settings) -> None:
    """Tag the samples' texts anew, show the answers, and compare them with those of the model in memory.

    Raises PublishError when the adapter cannot be loaded back, or when an answer differs: then what
    others load is not what was trained.
    """
    before = _lines(run, "samples.jsonl")
    try:
        tagger = load()
        samples = tagger.tag([sample["text"] for sample in before])
    except InvalidInputError as refusal:
        raise PublishError(
            f"what was saved cannot be loaded back: {refusal} "
            f"Try again with: TAGGER_RUN_ID={run.path.name} tagger-job push"
        ) from refusal
    show_samples(samples, settings.sample.output)
    for old, new in zip(before, samples, strict=True):
        if not same_answer(old, asdict(new), tagger.decoding):
            was, now = (dict(zip(t["tags"], t["confidences"], strict=True)) for t in (old, asdict(new)))
            raise PublishError(
                f"loaded anew, the adapter answers {new.raw!r} to {new.text!r} ({now}), and answered {old['raw']!r} "
                f"after training ({was}): what was saved is not what was trained; look at {run.path} before using it"
            )


def show_samples(samples: Sequence[TaggedText], output: Path | None) -> None:
    """Print a line for each answer, `prompt ['tag', ...]`, and write the file that is asked for."""
    for sample in samples:
        print(sample, flush=True)
    if output is not None:
        atomic_write(output, json_lines(map(asdict, samples)))


def check_output(output: Path | None, *inputs: str | Path | None) -> None:
    """Raise InvalidInputError when the file that is to get the answers cannot be written, or is something else's.

    It is replaced by renaming, which would put a plain file in the place of a device or a link.
    """
    if output is None:
        return
    try:
        taken = os.path.lexists(output) and (output.is_symlink() or not output.is_file())
    except OSError as error:
        raise InvalidInputError(
            f"TAGGER_SAMPLE_OUTPUT={output} cannot be written: {error.strerror or error}"
        ) from error
    if taken or not output.name or len(output.name.encode()) > LONGEST_NAME:
        raise InvalidInputError(
            f"TAGGER_SAMPLE_OUTPUT={output} is not a file that can be written anew; expected the path of a plain file"
        )
    if any(output.resolve() == Path(other).resolve() for other in inputs if other):
        raise InvalidInputError(f"TAGGER_SAMPLE_OUTPUT={output} is also read by this job; name another file")
    check_writable(output.parent, "the answers' folder", "TAGGER_SAMPLE_OUTPUT to a file in one")


def save_report(run: RunFolder, outcome: str, published: Published | None = None) -> None:
    """Write report.json (its schema is job/runs/report.schema.json), and report.md and report.html: the run on a page.

    `outcome` is `judged` until more is known, then `published`, `not pushed` or `refused`; a run that
    stays `judged` could not be published.
    """
    metrics = json.loads((run.path / "metrics.json").read_text(encoding="utf-8"))
    values, manifest = run.manifest["settings"], run.manifest
    found = {
        "schema_version": 1,
        "run_id": run.path.name,
        "outcome": outcome,
        "adapter": str(run.adapter) if published is None else published.url,
        "revision": None if published is None else published.revision,
        "tag": None if published is None else published.tag,
        "base": {name: values[f"TAGGER_BASE_{name.upper()}"] for name in ("model", "revision", "quantize")},
        "data": {name: values[f"TAGGER_DATA_{name.upper()}"] for name in ("dataset", "revision")} | manifest["dataset"],
        **{name: metrics[name] for name in ("split", "scores", "gate", "training")},
        "seconds": manifest["timings"],
    }
    run.write("report.json", json.dumps(found, indent=2, ensure_ascii=False) + "\n")
    gate, data_ = metrics["gate"], found["data"]
    history, tags = _lines(run, "log.jsonl"), _lines(run, "tags.jsonl")[:TAGS_SHOWN]
    blocks: list[Block] = [
        f"{gate['verdict'].capitalize()}, by TAGGER_EVAL_GATE={gate['gate']}: {gate['reason']}.",
        f"The adapter is at {found['adapter']}{f', tagged {published.tag}' if published and published.tag else ''}.",
        score_table(scores(run)),
        f"On {metrics['split']['examples']} held-out examples (split {metrics['split']['sha256'][:16]}), after "
        f"training on {data_['train']} of {data_['dataset']}. The interval is that of micro-F1.",
        Picture(_curve("training loss", history, "loss")),
        Picture(_curve("learning rate", history, "learning_rate")),
        [["tag", "examples", "predicted", "precision", "recall", "F1", "95%"], *map(_tag_row, tags)],
        Picture(
            plots.bars(
                "F1 of the most frequent tags",
                [tag["tag"] for tag in tags],
                [tag["f1"] for tag in tags],
                [tag["f1_interval"] for tag in tags],
            )
        ),
        "Seconds: " + ", ".join(f"{chapter} {seconds:g}" for chapter, seconds in manifest["timings"].items()) + ".",
    ]
    title = f"{run.path.name}: {outcome}"
    run.write("report.md", markup.markdown(title, blocks))
    run.write("report.html", markup.html(title, blocks))


def _curve(title: str, history: Sequence[Mapping[str, Any]], what: str) -> str:
    return plots.curve(title, [entry["step"] for entry in history], [entry[what] for entry in history])


def _lines(run: RunFolder, name: str) -> list[dict[str, Any]]:
    with (run.path / name).open(encoding="utf-8") as file:  # not splitlines(), which also splits at U+2028
        return [json.loads(line) for line in file]


def _tag_row(tag: Mapping[str, Any]) -> list[str]:
    low, high = tag["f1_interval"]
    figures = [f"{tag[name]:.3f}" for name in ("precision", "recall", "f1")]
    return [tag["tag"], str(tag["gold"]), str(tag["predicted"]), *figures, f"{low:.3f} to {high:.3f}"]


def summary(run: RunFolder) -> Summary:
    """How a complete run ended."""
    published = run.manifest["published"]
    if published is not None:
        return Summary(run.path, published["url"], pushed=True)
    return Summary(run.path, str(run.adapter), pushed=False)
