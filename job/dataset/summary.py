"""Summarise a data set before money is spent on it: tags, rows that were left out, and what looks wrong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from job.dataset.prompts import prompt, target
from job.settings import Data
from job.types import DataReport, Example, SplitData

MOST_COMMON = 10
"""Tags that the summary lists."""
SUSPICIOUS = ("><", "|", ";", "\n", "/", " ")
"""Texts that often separate tags; `\\n` is a line feed."""
SUSPICIOUS_SHARE = 0.5
NEARLY_ALL = 0.95
MANY_DUPLICATES = 0.05


def summarise(data: SplitData, settings: Data) -> dict[str, Any]:
    """Return what `check --json` says of the data; its schema is job/runs/check.schema.json."""
    examples = (*data.train, *data.calibration, *data.held_out)
    counts = Counter(tag for example in examples for tag in example.tags)
    sizes = [len(example.tags) for example in examples]
    example = data.train[0]
    report = data.report
    return {
        "rows": report.rows,
        "used": report.rows - report.skipped_rows,
        "train": len(data.train),
        "calibration": len(data.calibration),
        "held_out": len(data.held_out),
        "skipped": _by_reason(report),
        "merged": report.merged,
        "near_duplicates": report.near_duplicates,
        "tags": {
            "different": len(counts),
            "per_text": {"mean": round(sum(sizes) / len(sizes), 2), "most": max(sizes)},
            "most_common": [[tag, count] for tag, count in counts.most_common(MOST_COMMON)],
            "on_one_text": round(sum(count == 1 for count in counts.values()) / len(counts), 4),
            "respelled": dict(report.respelled),
        },
        "example": {
            "text": example.text,
            "tags": list(example.tags),
            "rendered": prompt(example.text, settings.separator) + target(example.tags, settings.separator),
        },
        "warnings": list(_warnings(examples, counts, data)),
    }


def _by_reason(report: DataReport) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for entry in report.skipped:  # training and evaluation data may have the same reason
        known = found.setdefault(entry.reason, {"rows": 0, "first": entry.first})
        known["rows"] += entry.rows
    return found


def describe(summary: dict[str, Any]) -> Iterator[str]:
    """Yield the lines in which `check` and `run` show a summary."""
    tags = summary["tags"]
    aside = f", {summary['calibration']} set aside for the threshold" if summary["calibration"] else ""
    yield (
        f"data: {summary['rows']} rows read, {summary['used']} used; {summary['train']} examples to train on{aside}, "
        f"{summary['held_out']} held out"
    )
    for reason, entry in summary["skipped"].items():
        yield f"data: {entry['rows']} rows left out with {reason}, the first is {entry['first']}"
    if summary["merged"]:
        yield f"data: {summary['merged']} rows repeat the text of an earlier row; their tags were added to its"
    if summary["near_duplicates"]:
        yield f"data: {summary['near_duplicates']} examples left out as near-duplicates of held-out ones"
    common = ", ".join(f"{tag!r} {count}" for tag, count in tags["most_common"][:5])
    yield (
        f"tags: {tags['different']} different, {tags['per_text']['mean']:g} a text (most {tags['per_text']['most']}), "
        f"{tags['on_one_text']:.0%} on one text alone; most common: {common}"
    )
    if tags["respelled"]:
        pairs = list(tags["respelled"].items())
        shown = ", ".join(f"{old!r} as {new!r}" for old, new in pairs[:5])
        yield f"tags: {len(pairs)} spellings count as another one and are written like it: {shown}"
    yield f"example: {_shortened(summary['example']['rendered'])}"
    for warning in summary["warnings"]:
        yield f"warning: {warning}"


def _warnings(examples: tuple[Example, ...], counts: Counter[str], data: SplitData) -> Iterator[str]:
    if all(len(example.tags) == 1 for example in examples):
        for mark in SUSPICIOUS:
            holding = sum(mark in example.tags[0] for example in examples)
            if holding >= SUSPICIOUS_SHARE * len(examples):
                shown = {"\n": "\\n", " ": "\\s"}.get(mark, mark)
                yield (
                    f"every text has one tag, and {holding} of {len(examples)} hold {mark!r}, such as "
                    f"{examples[0].tags[0]!r}; if it separates tags, set TAGGER_DATA_TAG_DELIMITER='{shown}'"
                )
                break
    tag, count = counts.most_common(1)[0]
    if count >= NEARLY_ALL * len(examples):
        yield f"the tag {tag!r} is on {count} of {len(examples)} texts, so it says little"
    duplicates = data.report.near_duplicates
    if duplicates > MANY_DUPLICATES * (len(examples) + duplicates):
        share = duplicates / (len(examples) + duplicates)
        yield f"{share:.0%} of the examples are near-duplicates of held-out ones and are left out of training"


def _shortened(text: str) -> str:
    text = text.replace("\n", "\\n")
    return text if len(text) <= 160 else f"{text[:80]} ... {text[-75:]}"
