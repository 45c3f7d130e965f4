"""Look at earlier runs: list them, and show in what two of them differ."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from job import results
from job.dataset.tags import normalise_tag
from job.errors import InvalidInputError
from job.metrics.bootstrap import f1_difference
from job.metrics.confusions import answer_f1
from job.metrics.scores import score
from job.runs import stored_run
from job.runs.run_folder import RunFolder, read_manifest, run_folders
from job.settings import Run, to_env
from job.types import Prediction

FIGURES = {"precision": "precision", "recall": "recall", "f1": "micro-F1", "macro_f1": "macro-F1"}
"""The scores that are compared, and what tables call them."""
NOT_SHOWN = ("TAGGER_RUN_DIR", "TAGGER_RUN_ID")
"""Settings that only say where a run is."""


@dataclass(frozen=True)
class ChangedAnswer:
    """An example that two runs answered differently, and by how much the F1 of its answer changed."""

    text: str
    gold: tuple[str, ...]
    before: tuple[str, ...]
    after: tuple[str, ...]
    f1_difference: float


@dataclass(frozen=True)
class Comparison:
    """What differs between two runs; each pair of values is that of the first run and that of the second one."""

    runs: tuple[str, str]
    settings: dict[str, tuple[str, str]]
    """Settings, and after them the fingerprint of the data, versions and device."""
    examples: int
    """Held-out examples with the same text and the same tags in both runs: what is scored here."""
    other_examples: tuple[int, int]
    """Held-out examples of each run that the other one does not have."""
    scores: dict[str, tuple[float, float]]
    """The figures of FIGURES; empty without common examples."""
    interval: list[float] | None
    """95% interval of the difference in micro-F1 by a paired bootstrap."""
    changed: tuple[ChangedAnswer, ...]
    """The examples with other answers, the most improved first."""


def list_runs(settings: Run) -> list[dict[str, Any]]:
    """Return name, status, start, scores, verdict and publication of each run, the newest first.

    Runs in TAGGER_RUN_DIR, and those that only TAGGER_RUN_STORE has. A run whose files cannot be read has the status
    `unreadable`. Raises InvalidInputError if there is no run.
    """
    runs = [_describe(path) for path in run_folders(settings.dir)]
    known = {run["run"] for run in runs}
    with tempfile.TemporaryDirectory() as folder:
        for copy in stored_run.download_records(settings, Path(folder), except_for=known):
            entry = _describe(Path(folder, copy.run_id))
            runs.append(entry | {"adapter": entry["adapter"] or copy.name})
    if not runs:
        also = "" if settings.store is None else f", nor in {settings.store}"
        raise InvalidInputError(
            f"there is no run in {settings.dir}{also}; set TAGGER_RUN_DIR to a folder that holds runs"
        )
    return sorted(runs, key=lambda run: (run["started"] or "", run["run"]), reverse=True)


def _describe(path: Path) -> dict[str, Any]:
    names = ("status", "started", "f1", "interval", "tfidf_f1", "verdict", "adapter")
    entry: dict[str, Any] = {"run": path.name} | dict.fromkeys(names)
    try:
        run = RunFolder(path, read_manifest(path))
        entry |= {"status": run.manifest["status"], "started": run.manifest.get("started")}
        if (path / "metrics.json").is_file():
            scores, verdict = results.scores(run), results.verdict(run)
            entry |= {"f1": scores["adapter"].f1, "interval": scores["adapter"].intervals["f1"]}
            entry |= {"tfidf_f1": scores["tfidf"].f1, "verdict": None if verdict is None else verdict.verdict}
        published = run.manifest.get("published")
        entry["adapter"] = published["url"] if published else str(run.adapter) if run.adapter.is_dir() else None
    except (InvalidInputError, OSError, ValueError, KeyError, TypeError):  # a damaged run must not hide the others
        entry["status"] = "unreadable"
    return entry


def runs_table(runs: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Return a header and a row for each run."""
    rows = [["run", "status", "started", "micro-F1", "95%", "TF-IDF", "verdict", "adapter"]]
    for run in runs:
        f1, tfidf = ("" if run[name] is None else f"{run[name]:.3f}" for name in ("f1", "tfidf_f1"))
        interval = "" if run["interval"] is None else "{:.3f} to {:.3f}".format(*run["interval"])
        others = (run[name] or "" for name in ("verdict", "adapter"))
        rows.append([run["run"], run["status"], run["started"] or "", f1, interval, tfidf, *others])
    return rows


def compare(settings: Run, first: str, second: str) -> Comparison:
    """Compare two runs, each a name in TAGGER_RUN_DIR or a folder.

    Raises InvalidInputError if one of them does not exist or has no evaluation.
    """
    old, new = (_open(settings, name) for name in (first, second))
    before, after = (_predictions(run) for run in (old, new))
    common = [key for key in before if key in after]
    gold = [before[key].gold for key in common]
    answers = tuple([side[key].predicted for key in common] for side in (before, after))
    scores, interval = {}, None
    if common:
        scored = [score(gold, predicted) for predicted in answers]
        scores = {name: (getattr(scored[0], name), getattr(scored[1], name)) for name in FIGURES}
        _, interval = f1_difference(gold, answers[1], answers[0])
    return Comparison(
        runs=(old.path.name, new.path.name),
        settings=dict(_differences(old.manifest, new.manifest)),
        examples=len(common),
        other_examples=(len(before) - len(common), len(after) - len(common)),
        scores=scores,
        interval=interval,
        changed=tuple(_changed([(before[key], after[key]) for key in common])),
    )


def _open(settings: Run, name: str) -> RunFolder:
    path = next((path for path in (settings.dir / name, Path(name)) if (path / "manifest.json").is_file()), None)
    if path is None:
        raise InvalidInputError(
            f"there is no run {name} in {settings.dir}; `tagger-job runs` lists them, and TAGGER_RUN_DIR names another "
            "folder"
        )
    return RunFolder(path.resolve(), read_manifest(path))


def _predictions(run: RunFolder) -> dict[tuple[str, frozenset[str]], Prediction]:
    """Return the run's predictions by text and gold tags: only the same example is compared."""
    try:
        predictions = results.predictions(run)
    except FileNotFoundError:
        raise InvalidInputError(
            f"the run {run.path.name} has no predictions yet (its status is {run.manifest['status']}); resume it first"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        file = run.path / "predictions.jsonl"
        raise InvalidInputError(f"{file} cannot be read ({error}); resume the run first") from None
    return {(entry.text, frozenset(map(normalise_tag, entry.gold))): entry for entry in predictions}


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[tuple[str, tuple[str, str]]]:
    """Yield what differs between two manifests: settings, fingerprint of the data, versions, device."""
    for name in dict.fromkeys((*old["settings"], *new["settings"])):
        values = tuple(manifest["settings"].get(name) for manifest in (old, new))
        if values[0] != values[1] and name not in NOT_SHOWN:
            yield name, (to_env(values[0], name), to_env(values[1], name))
    fingerprints = (old["dataset"]["fingerprint"][:16], new["dataset"]["fingerprint"][:16])
    if fingerprints[0] != fingerprints[1]:
        yield "data", fingerprints
    for name in dict.fromkeys((*old["versions"], *new["versions"])):
        versions = (old["versions"].get(name, ""), new["versions"].get(name, ""))
        if versions[0] != versions[1]:
            yield name, versions
    devices = (old.get("device") or "", new.get("device") or "")
    if devices[0] != devices[1]:
        yield "device", devices


def _changed(pairs: Sequence[tuple[Prediction, Prediction]]) -> list[ChangedAnswer]:
    """Return the examples whose answers have other tags, the most improved first."""
    changed = [
        ChangedAnswer(old.text, old.gold, old.predicted, new.predicted, round(answer_f1(new) - answer_f1(old), 4))
        for old, new in pairs
        if set(map(normalise_tag, old.predicted)) != set(map(normalise_tag, new.predicted))
    ]
    return sorted(changed, key=lambda answer: -answer.f1_difference)


def describe(comparison: Comparison, shown: int) -> Iterator[str]:
    """Yield the lines that `tagger-job compare` prints, with at most `shown` examples in each direction."""
    first, second = comparison.runs
    yield f"{first} -> {second}"
    yield ""
    yield "settings:" if comparison.settings else "settings: the same"
    for name, (old, new) in comparison.settings.items():
        yield f"  {name}: {old or '(empty)'} -> {new or '(empty)'}"
    yield ""
    only = comparison.other_examples
    left_out = f"; {only[0]} only in {first} and {only[1]} only in {second} are left out" if any(only) else ""
    if not comparison.examples:
        yield f"scores: nothing to compare, they share no held-out example{left_out}"
        return
    yield f"scores on the {comparison.examples} held-out examples of both{left_out}:"
    for figure, (before, after) in comparison.scores.items():
        line = f"  {FIGURES[figure]:<10}{before:.3f} -> {after:.3f}   {after - before:+.3f}"
        if figure == "f1" and comparison.interval is not None:
            low, high = comparison.interval
            verdict = "" if low <= 0 <= high else ", more than chance"
            line += f" (95% interval {low:+.3f} to {high:+.3f}{verdict})"
        yield line
    yield ""
    yield from _describe_changes(comparison, shown)


def _describe_changes(comparison: Comparison, shown: int) -> Iterator[str]:
    better = [answer for answer in comparison.changed if answer.f1_difference > 0]
    worse = [answer for answer in reversed(comparison.changed) if answer.f1_difference < 0]
    yield (
        f"answers: {len(comparison.changed)} of {comparison.examples} differ, {len(better)} are better and "
        f"{len(worse)} worse"
    )
    for title, answers in (("better", better), ("worse", worse)):
        for answer in answers[:shown]:
            yield f"  {title} by {abs(answer.f1_difference):.2f}: {json.dumps(answer.text, ensure_ascii=False)}"
            yield f"    in the data {list(answer.gold)}, {list(answer.before)} -> {list(answer.after)}"
        if len(answers) > shown:
            yield f"  {len(answers) - shown} more are {title}"
