"""What a run says of itself: metrics, predictions, samples, the model card, the summary."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from job.card import card
from job.results import Prediction, Scores, Summary, Tagged, Trained
from job.run_folder import RunFolder, json_lines, try_to_write, write_whole
from job.settings import Settings


def save_metrics(
    run: RunFolder, scores: Mapping[str, Scores], trained: Trained, predictions: Sequence[Prediction]
) -> None:
    """Write metrics.json and predictions.jsonl."""
    run.write_lines("predictions.jsonl", map(asdict, predictions))
    metrics = {"scores": {name: asdict(score) for name, score in scores.items()}, "training": asdict(trained)}
    run.write("metrics.json", json.dumps(metrics, indent=2) + "\n")


def save_card(adapter: Path, settings: Settings, scores: Mapping[str, Scores]) -> None:
    """Write the model card in the place of the one that peft made."""
    (adapter / "README.md").write_text(card(settings, scores), encoding="utf-8")


def save_samples(run: RunFolder, samples: Sequence[Tagged], output: Path | None) -> None:
    """Print the answers, and write samples.jsonl and whichever other file is asked for."""
    run.write_lines("samples.jsonl", map(asdict, samples))
    show_samples(samples, output)


def show_samples(samples: Sequence[Tagged], output: Path | None) -> None:
    """Print a line for each answer, `prompt ['tag', ...]`, and write the file that is asked for."""
    for sample in samples:
        unparsed = "" if sample.parsed else f"   (not a whole list: {sample.raw!r})"
        print(f"{sample.prompt} {list(sample.tags)}{unparsed}", flush=True)
    if output is not None:
        write_whole(output, json_lines(map(asdict, samples)))


def check_output(output: Path | None) -> None:
    """Raise Refused when the file that is to get the answers cannot be written."""
    if output is not None:
        try_to_write(output.parent, "the answers' folder", "TAGGER_SAMPLE_OUTPUT to a file in one")


def summary(run: RunFolder) -> Summary:
    """How a complete run ended."""
    published = run.manifest["published"]
    if published is not None:
        return Summary(run.path, published["url"], pushed=True)
    return Summary(run.path, str(run.adapter), pushed=False)
