"""The outcome of a job in a container, as its caller needs it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from job import model_card, results
from job.runs import markup
from job.runs.run_folder import RunFolder, read_manifest


def describe(run: Path) -> dict[str, Any]:
    """Return status, timings, scores, verdict and publication of a run, from its files, as JSON types."""
    manifest = read_manifest(run)
    description = {"run_id": run.name, "status": manifest["status"], "device": manifest.get("device")}
    description |= {"published": manifest.get("published"), "seconds": manifest["timings"]}
    if (run / "metrics.json").is_file():
        folder = RunFolder(run, manifest)
        verdict = results.verdict(folder)
        scores = results.scores(folder)
        table = markup.markdown_table(model_card.score_table(scores))
        description |= {"scores": {name: asdict(score) for name, score in scores.items()}, "table": table}
        description |= {"gate": None if verdict is None else asdict(verdict)}
    return description
