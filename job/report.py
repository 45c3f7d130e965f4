"""The report of a run: report.json for programs, report.md for CI, report.html for people."""

from __future__ import annotations

import json
import logging
import shlex
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from job import results
from job.dataset.tags import normalise_tag
from job.metrics.confusions import best_and_worst, confused_tags, possible_label_errors
from job.model_card import model_card, score_table
from job.runs import attempts, markup, plots
from job.runs.budget import price_per_hour
from job.runs.run_folder import RunFolder
from job.settings import Run, Settings, iter_fields, to_env
from job.types import Prediction, Published, Scores, ThresholdScores

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)

TAGS_SHOWN = 15
"""How many tags the report shows, the most frequent first; tags.jsonl has all."""
PAIRS_SHOWN = ANSWERS_SHOWN = 10
NEVER_FOUND_SHOWN = 40
LABEL_ERRORS_SHOWN = 20
TEXT_SHOWN = 400
"""Characters of a text or a setting; longer ones are shortened."""
CARD_PICTURES = ("scores.svg", "loss.svg")
"""Files of the run that the model card shows."""
F1_TITLE = "Micro-F1 with 95% intervals"
TAGGERS = {
    "adapter": "this adapter",
    "published": "published adapter",
    "base": "base model alone",
    "embedder": "sentence embeddings",
    "tfidf": "TF-IDF",
    "most_common_tags": "most common tags",
}
"""The taggers that are compared, in the order of the report."""


def save_card(
    adapter: Path, settings: Settings, scores: Mapping[str, Scores], run: RunFolder, *, licence: str | None
) -> None:
    """Write the model card over the one that peft made, and CARD_PICTURES, which it shows."""
    history = _columns(run.read_lines("log.jsonl"), "step", "loss")
    pictures = {
        "scores.svg": _picture("scores", plots.intervals, F1_TITLE, _f1_of_taggers(scores), on_page=False),
        "loss.svg": _picture("loss", plots.curve, "Training loss", *history, on_page=False),
    }
    for name, picture in pictures.items():
        run.write(name, picture or plots.NO_PICTURE)
    (adapter / "README.md").write_text(
        model_card(settings, scores, run.manifest["versions"], licence), encoding="utf-8"
    )


def save_report(run: RunFolder, outcome: str, published: Published | None = None) -> None:
    """Write report.json (its schema is job/runs/report.schema.json) and the same for readers: report.md, report.html.

    `outcome` is `judged` once the gate has decided, and finally `published`, `not pushed` or `refused`. A run whose
    report stays `judged` passed the gate and could not be published.
    """
    try:
        data = report_data(run, outcome, published)
        run.write("report.json", json.dumps(data, indent=2, ensure_ascii=False) + "\n")
        page = _page(run, data, published)
        for name in ("report.md", "report.html"):
            run.write(name, markup.render(f"{name}.jinja", **page))
    # a report that cannot be made must not keep an adapter from being published
    except OSError as error:
        log.warning("report: %s has no complete report (%s)", run.path, error.strerror or error)
    except Exception:
        log.warning("report: %s has no complete report; this is a defect of the job", run.path, exc_info=True)


def report_data(run: RunFolder, outcome: str, published: Published | None) -> dict[str, Any]:
    """Return the content of report.json."""
    values, metrics = run.manifest["settings"], results.metrics(run)
    dataset = {name: values[f"TAGGER_DATA_{name.upper()}"] for name in ("dataset", "revision")}
    decoding = json.loads((run.adapter / "tagger.json").read_text(encoding="utf-8"))
    predictions = results.predictions(run)
    confused = confused_tags([entry.gold for entry in predictions], [entry.predicted for entry in predictions])
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
        "seconds": dict(run.manifest["timings"]),
        "threshold": decoding["threshold"],
        "confused_tags": list(map(asdict, confused[:PAIRS_SHOWN])),
        "possible_label_errors": list(map(asdict, possible_label_errors(predictions)[:LABEL_ERRORS_SHOWN])),
        "tags_never_found": list(_never_found(run, decoding["tags"])),
        "cost": cost(run),
        "estimate": run.manifest.get("estimate"),
        "attempts": attempts.attempts(run),
    }


def _never_found(run: RunFolder, known_tags: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield the tags of held-out examples that no answer found, and whether the adapter knows them."""
    known = {normalise_tag(tag) for tag in known_tags}
    for tag in run.read_lines("tags.jsonl"):
        if tag["gold"] and not tag["recall"]:
            yield {"tag": tag["tag"], "gold": tag["gold"], "known": tag["tag"] in known}


def cost(run: RunFolder) -> dict[str, Any] | None:
    """Return what the run cost on its device, over all attempts; None where no price is known."""
    made = attempts.attempts(run)
    settings = Run(price_per_hour=run.manifest["settings"].get("TAGGER_RUN_PRICE_PER_HOUR"))
    found = price_per_hour(settings, run.manifest.get("device") or "", made[-1]["gpus"] if made else 1)
    if found is None:
        return None
    price, source = found
    seconds = max(sum(run.manifest["timings"].values()), attempts.used_seconds(run))
    return {"dollars": round(price * seconds / 3600, 4), "dollars_per_hour": round(price, 4), "source": source}


def _page(run: RunFolder, data: Mapping[str, Any], published: Published | None) -> dict[str, Any]:
    """Return what the templates of report.md and report.html need."""
    manifest, tags = run.manifest, run.read_lines("tags.jsonl")
    scores, verdict = results.scores(run), data["gate"]["verdict"]
    found = {name: scores[name] for name in TAGGERS if name in scores}
    predictions = results.predictions(run)
    best, worst = best_and_worst(predictions, ANSWERS_SHOWN)
    label_errors = dict.fromkeys(error["line"] for error in data["possible_label_errors"])
    thresholds = _thresholds(run)
    never_found = data["tags_never_found"]
    return {
        "report": data,
        "tone": {"pass": "pass", "fail": "fail"}.get(verdict, "open"),
        "link": data["adapter"] if data["adapter"].startswith(("https://", "http://")) else None,
        "started": manifest.get("started", "at an unknown time"),
        "device": manifest.get("device"),
        "versions": manifest["versions"],
        "taggers": [{"key": key, "name": TAGGERS[key], "scores": score} for key, score in found.items()],
        "score_table": score_table(scores),
        "thresholds": thresholds,
        "tags": tags[:TAGS_SHOWN],
        "tag_count": len(tags),
        "tag_table": [TAG_COLUMNS, *map(_tag_row, tags[:TAGS_SHOWN])],
        "confused_table": [["missed", "given instead", "texts"], *map(_pair_row, data["confused_tags"])],
        "unknown": sum(not tag["known"] for tag in never_found),
        "shown_never_found": NEVER_FOUND_SHOWN,
        "best": list(map(_answer, best)),
        "worst": list(map(_answer, worst)),
        "label_errors": [_answer(predictions[line - 1]) for line in label_errors],
        "chapters": list(_chapters(data["seconds"], (data["estimate"] or {}).get("seconds", {}))),
        "estimated_time": None if data["estimate"] is None else _duration(data["estimate"]["total_seconds"]),
        "elapsed": _duration(attempts.used_seconds(run)),
        "attempts": [_attempt(entry) for entry in data["attempts"]],
        "total_time": _duration(sum(data["seconds"].values())),
        "settings": list(changed_settings(manifest["settings"])),
        "steps": list(_next_steps(run, data, published)),
        "pictures": _pictures(run, found, thresholds, tags[:TAGS_SHOWN], data["threshold"]),
    }


TAG_COLUMNS = ["tag", "examples", "predicted", "precision", "recall", "F1", "95%"]


def _tag_row(tag: Mapping[str, Any]) -> list[str]:
    low, high = tag["f1_interval"]
    figures = [f"{tag[name]:.3f}" for name in ("precision", "recall", "f1")]
    return [tag["tag"], str(tag["gold"]), str(tag["predicted"]), *figures, f"{low:.3f} to {high:.3f}"]


def _pair_row(pair: Mapping[str, Any]) -> list[str]:
    return [pair["gold"], pair["predicted"], f"{pair['texts']} of {pair['gold_texts']}"]


def _thresholds(run: RunFolder) -> list[ThresholdScores]:
    """Return the scores at each threshold; nothing if none was chosen on examples."""
    name = "thresholds.jsonl"
    return [ThresholdScores(**point) for point in run.read_lines(name)] if run.is_intact(name) else []


def _answer(prediction: Prediction) -> dict[str, Any]:
    """Return a prediction with each tag marked as right, wrong or missed, and its confidence if it is known."""
    gold, predicted = ({normalise_tag(tag) for tag in side} for side in (prediction.gold, prediction.predicted))
    confidences = prediction.confidences or (None,) * len(prediction.predicted)
    return {
        "text": _shortened(prediction.text),
        "predicted": [
            {"name": tag, "confidence": confidence, "kind": "right" if normalise_tag(tag) in gold else "wrong"}
            for tag, confidence in zip(prediction.predicted, confidences, strict=True)
        ],
        "gold": [
            {"name": tag, "confidence": None, "kind": "" if normalise_tag(tag) in predicted else "missed"}
            for tag in prediction.gold
        ],
    }


def _shortened(text: str) -> str:
    return text if len(text) <= TEXT_SHOWN else f"{text[: TEXT_SHOWN - 1].rstrip()}…"


def _chapters(seconds: Mapping[str, float], estimate: Mapping[str, float]) -> Iterator[dict[str, Any]]:
    """Yield what each chapter took, its share of all, and what was expected of it (None if nothing was)."""
    total = sum(seconds.values()) or 1.0
    for name, value in seconds.items():
        expected = _duration(estimate[name]) if name in estimate else None
        title = name.replace("_", " ")
        yield {"name": title, "time": _duration(value), "share": value / total, "expected": expected}


def _attempt(entry: Mapping[str, Any]) -> dict[str, str]:
    """Return an attempt of the run as words; the present one has not ended."""
    took = "running" if entry["seconds"] is None else _duration(entry["seconds"])
    status = "this one" if entry["ended"] is None else entry["status"]
    return {"started": entry["started"], "took": took, "status": status, "device": entry["device"]}


def _duration(seconds: float) -> str:
    """Return a time as people write it: 4.1 s, 12 min 5 s, 3 h 20 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def changed_settings(values: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the settings of a manifest that differ from the defaults, with their descriptions."""
    unset = Settings.model_construct()
    defaults, of_result = unset.values(), unset.result_values()
    for name, group, field in iter_fields():
        if name in values and values[name] != defaults[name]:
            yield {
                "name": name,
                "value": _shortened(to_env(values[name], name)).replace("\n", "\\n"),
                "default": to_env(defaults[name], name),
                "description": type(getattr(unset, group)).model_fields[field].description,
                "changes_result": name in of_result,
            }


def _next_steps(run: RunFolder, data: Mapping[str, Any], published: Published | None) -> Iterator[dict[str, str]]:
    """Yield how to use this adapter, to publish it if it is not, and to go back to the one before it."""
    settings = run.manifest["settings"]
    changed = {setting["name"]: settings[setting["name"]] for setting in changed_settings(settings)}

    def command(arguments: str, *names: str, **values: str) -> str:
        kept = {name: str(changed[name]) for name in names if name in changed} | values
        return " ".join([*(f"{name}={shlex.quote(value)}" for name, value in kept.items()), "tagger-job", arguments])

    on_disk = {"TAGGER_RUN_ID": run.path.name}
    if data["outcome"] == "published" and published is not None:
        repo = {"TAGGER_HUB_REPO": published.repo}
        yield {"title": "Tag texts", "command": command("sample 'a text'", "TAGGER_HUB_REVISION", **repo), "note": ""}
        if earlier := data["gate"]["parent_commit"] or _version_before(published.tag):
            rollback = command(f"promote --revision {shlex.quote(earlier)}", "TAGGER_HUB_REVISION", **repo)
            yield {"title": "Go back to what was published before", "command": rollback, "note": "needs HF_TOKEN"}
        return
    use = command("sample 'a text'", "TAGGER_RUN_DIR", **on_disk)
    yield {"title": "Tag texts", "command": use, "note": "where the folder of the run is"}
    if published is not None:
        repo = {"TAGGER_HUB_REPO": published.repo}
        promote = command(f"promote --revision {published.revision}", "TAGGER_HUB_REVISION", **repo)
        yield {"title": "Publish it in spite of the gate", "command": promote, "note": "needs HF_TOKEN"}
    elif data["outcome"] != "refused":
        push = command("push", "TAGGER_RUN_DIR", "TAGGER_HUB_REPO", "TAGGER_HUB_REVISION", **on_disk)
        yield {"title": "Publish it", "command": push, "note": "needs HF_TOKEN"}


def _version_before(tag: str | None) -> str | None:
    """Return v2 for v3; None for the first version and for other names."""
    number = (tag or "").removeprefix("v")
    return f"v{int(number) - 1}" if number.isdecimal() and int(number) > 1 else None


def _pictures(
    run: RunFolder,
    scores: Mapping[str, Scores],
    thresholds: Sequence[ThresholdScores],
    tags: Sequence[Mapping[str, Any]],
    threshold: float,
) -> dict[str, str | None]:
    """Return the pictures of the page by name; None for one that could not be drawn."""
    history = run.read_lines("log.jsonl")
    f1_of_tags = tuple((tag["tag"], tag["f1"], tuple(tag["f1_interval"])) for tag in tags)
    loss, rate = _columns(history, "step", "loss"), _columns(history, "step", "learning_rate")
    pictures = {
        "taggers": _picture("taggers", plots.intervals, F1_TITLE, _f1_of_taggers(scores)),
        "loss": _picture("loss", plots.curve, "Training loss", *loss),
        "learning_rate": _picture("learning_rate", plots.curve, "Learning rate", *rate),
        "tags": _picture("tags", plots.intervals, "F1 of tags with 95% intervals", f1_of_tags),
    }
    if thresholds:
        points = tuple(thresholds)
        pictures["thresholds"] = _picture(
            "thresholds", plots.by_threshold, "Scores at other thresholds", points, threshold
        )
    return pictures


def _f1_of_taggers(scores: Mapping[str, Scores]) -> tuple[tuple[str, float, tuple[float, ...]], ...]:
    found = {name: scores[name] for name in TAGGERS if name in scores}
    return tuple((TAGGERS[name], score.f1, tuple(score.intervals["f1"])) for name, score in found.items())


def _columns(rows: Sequence[Mapping[str, Any]], *names: str) -> list[tuple[Any, ...]]:
    return [tuple(row[name] for row in rows) for name in names]


def _picture(name: str, draw: Callable[..., Figure], *values: Hashable, on_page: bool = True) -> str | None:
    """Return a picture as SVG; None, with a warning, if it cannot be drawn: a run is worth more than its pictures."""
    try:
        return _drawn(name, draw, *values, on_page=on_page)
    except Exception as error:
        log.warning("report: the picture %s could not be drawn (%s: %s)", name, type(error).__name__, error)
        return None


@lru_cache(maxsize=16)
def _drawn(name: str, draw: Callable[..., Figure], *values: Hashable, on_page: bool) -> str:
    """Draw a picture; the report is written twice, and its pictures are the same."""
    with plots.style():
        return plots.svg(draw(*values), name, on_page=on_page)
