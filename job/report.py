"""The report of a run, and the model card: what the results are, on a page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from job import results
from job.model_card import model_card, score_table
from job.runs import markup, plots
from job.runs.markup import Block, Picture
from job.runs.run_folder import RunFolder
from job.settings import Settings
from job.types import Published, Scores

TAGS_SHOWN = 15
"""How many tags the report shows, the most frequent first; tags.jsonl has all."""


def save_card(
    adapter: Path, settings: Settings, scores: Mapping[str, Scores], run: RunFolder, *, licence: str | None
) -> None:
    """Write the model card over the one that peft made, and the loss curve that it shows."""
    history = run.read_lines("log.jsonl")
    run.write("loss.svg", _curve("training loss", history, "loss"))
    (adapter / "README.md").write_text(
        model_card(settings, scores, run.manifest["versions"], licence), encoding="utf-8"
    )


def save_report(run: RunFolder, outcome: str, published: Published | None = None) -> None:
    """Write report.json (its schema is job/runs/report.schema.json) and the same on a page: report.md and report.html.

    `outcome` is `judged` once the gate has decided, and finally `published`, `not pushed` or `refused`. A run whose
    report stays `judged` passed the gate and could not be published.
    """
    data = _report_data(run, outcome, published)
    run.write("report.json", json.dumps(data, indent=2, ensure_ascii=False) + "\n")
    title, blocks = f"{run.path.name}: {outcome}", _report_blocks(run, data)
    run.write("report.md", markup.markdown(title, blocks))
    run.write("report.html", markup.html(title, blocks))


def _report_data(run: RunFolder, outcome: str, published: Published | None) -> dict[str, Any]:
    """Return the content of report.json."""
    values, metrics = run.manifest["settings"], results.metrics(run)
    dataset = {name: values[f"TAGGER_DATA_{name.upper()}"] for name in ("dataset", "revision")}
    return {
        "schema_version": 1,
        "run_id": run.path.name,
        "outcome": outcome,
        "adapter": str(run.adapter) if published is None else published.url,
        "revision": None if published is None else published.revision,
        "tag": None if published is None else published.tag,
        "base": {name: values[f"TAGGER_BASE_{name.upper()}"] for name in ("model", "revision", "quantize")},
        "data": dataset | run.manifest["dataset"],
        **{name: metrics[name] for name in ("split", "scores", "gate", "training")},
        "seconds": run.manifest["timings"],
    }


def _report_blocks(run: RunFolder, data: Mapping[str, Any]) -> list[Block]:
    """Return the report's paragraphs, tables and pictures, in the order of the page."""
    gate, split, dataset = data["gate"], data["split"], data["data"]
    history, tags = run.read_lines("log.jsonl"), run.read_lines("tags.jsonl")[:TAGS_SHOWN]
    tagged = f", tagged {data['tag']}" if data["tag"] else ""
    names, f1, intervals = ([tag[column] for tag in tags] for column in ("tag", "f1", "f1_interval"))
    return [
        f"{gate['verdict'].capitalize()}, by TAGGER_EVAL_GATE={gate['gate']}: {gate['reason']}.",
        f"The adapter is at {data['adapter']}{tagged}.",
        score_table(results.scores(run)),
        f"On {split['examples']} held-out examples (split {split['sha256'][:16]}), after training on "
        f"{dataset['train']} of {dataset['dataset']}. The interval is that of micro-F1.",
        Picture(_curve("training loss", history, "loss")),
        Picture(_curve("learning rate", history, "learning_rate")),
        [["tag", "examples", "predicted", "precision", "recall", "F1", "95%"], *map(_tag_row, tags)],
        Picture(plots.bars("F1 of the most frequent tags", names, f1, intervals)),
        "Seconds: " + ", ".join(f"{chapter} {seconds:g}" for chapter, seconds in data["seconds"].items()) + ".",
    ]


def _curve(title: str, history: Sequence[Mapping[str, Any]], column: str) -> str:
    return plots.curve(title, [entry["step"] for entry in history], [entry[column] for entry in history])


def _tag_row(tag: Mapping[str, Any]) -> list[str]:
    low, high = tag["f1_interval"]
    figures = [f"{tag[name]:.3f}" for name in ("precision", "recall", "f1")]
    return [tag["tag"], str(tag["gold"]), str(tag["predicted"]), *figures, f"{low:.3f} to {high:.3f}"]
