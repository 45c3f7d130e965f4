"""The report of a run shows what happened on one page that needs nothing else, whatever is in the data."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from json_schema import violations

from job import report, results
from job.decoding.config import DEFAULT_CONFIG
from job.metrics.scores import score
from job.metrics.thresholds import threshold_curve
from job.runs import plots
from job.runs.run_folder import RunFolder
from job.settings import Settings
from job.types import Prediction, Published, TrainResult, Verdict

SCHEMA = json.loads((Path(report.__file__).parent / "runs" / "report.schema.json").read_text())
NASTY = "</text></svg></style><script>alert(1)</script>\" onload='x' {{ 7 * 7 }} | `&` \u2028"
PUBLISHED = Published("ada/tagger", "c0ffee" * 6, "https://huggingface.co/ada/tagger/commit/c0ffee", "v3")
VOID = {"meta", "br", "hr", "img", "link"}


def make_run(
    folder: Path, word: str = "sea", *, device: str = "cpu", verdict: Verdict | None = None, **groups: Mapping[str, Any]
) -> RunFolder:
    """Make a run of which everything up to the gate is done, with `word` in all texts that come from outside."""
    settings = Settings.model_validate(groups)
    manifest = {
        "schema_version": 1,
        "status": "running",
        "started": "2026-11-26T01:15:37Z",
        "settings": settings.values(),
        "dataset": {"fingerprint": "f" * 64, "train": 9, "calibration": 3, "held_out": 4}
        | dict.fromkeys(("near_duplicates", "merged", "skipped"), 0),
        "versions": {"python": "3.11.7", "torch": "2.13.0"},
        "timings": {"load": 4.0, "train": 3600.5, "evaluate": 55.5},
    }
    run = RunFolder(folder, manifest)
    run.begin(device)
    predictions = [
        Prediction(f"a text about {word}", (word, "rain"), (word,), f"['{word}']", (0.75,)),
        Prediction("another", ("rain", "sun"), ("rain", "sun"), "['rain', 'sun']", (0.5, 0.4)),
        Prediction("a third", ("hope",), ("love",), "['love']", (0.875,)),
        Prediction("a fourth", ("hope",), ("love",), "['love']", (0.25,)),
    ]
    gold = [prediction.gold for prediction in predictions]
    given = [prediction.predicted for prediction in predictions]
    curve = threshold_curve(gold, [list(zip(p.predicted, p.confidences, strict=True)) for p in predictions])
    run.write_lines("thresholds.jsonl", map(asdict, curve))
    run.record_checksums("thresholds.jsonl")
    history = [{"step": step, "loss": 4 / step, "learning_rate": 1e-3, "grad_norm": 1.0} for step in (1, 2, 3)]
    run.write_lines("log.jsonl", history)
    names = ("most_common_tags", "tfidf", "base", "adapter")
    results.save_metrics(
        run, {name: score(gold, given) for name in names}, TrainResult(3, 4.0, 1.3, 9.0, 600), predictions
    )
    results.save_verdict(run, verdict or Verdict("off", "pass", f"the gate is off, {word}", 0.5, 0.0, 0.0), None)
    run.adapter.mkdir()
    DEFAULT_CONFIG.model_copy(update={"threshold": 0.07, "tags": (word, "rain", "sun", "love")}).save(run.adapter)
    return run


class Page(HTMLParser):
    """The elements, attributes and text of a page; fails where an element is closed that is not open."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += f"{data} " if data.strip() else data

    def attributes(self) -> Iterator[tuple[str, str]]:
        for _, attributes in self.elements:
            yield from ((name, value or "") for name, value in attributes.items())


def save(run: RunFolder, outcome: str = "not pushed", published: Published | None = None) -> tuple[Page, str]:
    """Save the report of a run, and return its pages: HTML and Markdown."""
    report.save_report(run, outcome, published)
    data = json.loads((run.path / "report.json").read_text())
    assert list(violations(data, SCHEMA, SCHEMA)) == []
    return Page((run.path / "report.html").read_text()), (run.path / "report.md").read_text()


def test_nothing_from_outside_becomes_an_element_an_attribute_or_a_request(tmp_path: Path) -> None:
    plain, _ = save(make_run(tmp_path / "plain", lora={"targets": ["sea"]}))
    run = make_run(tmp_path / "nasty", NASTY, device=NASTY, lora={"targets": [NASTY]})
    nasty, markdown = save(run, published=Published("r", "c", f"javascript:{NASTY}", NASTY))
    assert {tag for tag, _ in nasty.elements} <= {tag for tag, _ in plain.elements} | {"pre"}
    assert "script" not in {tag for tag, _ in nasty.elements}
    for name, value in nasty.attributes():
        assert not name.startswith("on") and name not in ("src", "srcset", "xlink:href", "action"), name
        assert name != "href" or value.startswith("#"), value
    html = (run.path / "report.html").read_text()
    assert not re.search(r"url\((?!#)|@import", html)
    assert "default-src 'none'" in html
    assert "<script>alert(1)</script>" in nasty.text and "{{ 7 * 7 }}" in nasty.text, "shown as it is"
    assert "<script" not in markdown


def test_the_page_starts_with_the_verdict_and_has_every_section(tmp_path: Path) -> None:
    page, markdown = save(make_run(tmp_path / "run"))
    headings = [element for element, _ in page.elements if element == "h2"]
    assert len(headings) == 9
    assert page.text.index("the gate is off") < page.text.index("micro-F1") < page.text.index("Training")
    assert [tag for tag, _ in page.elements].count("svg") == 5
    for text in ("this adapter", "base model alone", "TF-IDF", "most common tags", "below 0.07", "1 h 1 min"):
        assert text in page.text, text
    words = " ".join(page.text.split())
    assert "hope love 2 of 2" in words, "the tags that were confused"
    assert "1 of them cannot be, because the adapter does not know them" in words
    assert words.index("another predicted") < words.index("Worst") < words.index("a third") < words.index("a fourth")
    assert "love 0.88" in words
    assert {"| hope | love | 2 of 2 |", "Never found: hope (2)."} <= set(markdown.splitlines())
    errors = words.partition("Possible label errors")[2].partition("Time and money")[0]
    assert "a third" in errors and "a fourth" not in errors, "it is not sure of that one"
    assert "(lines of predictions.jsonl): 3 love (0.88)." in markdown and "a third" not in markdown


def test_the_same_run_gives_the_same_bytes(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    save(run)
    first = (run.path / "report.html").read_bytes()
    save(run)
    assert (run.path / "report.html").read_bytes() == first


def test_settings_that_differ_from_the_defaults_are_explained(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", train={"learning_rate": 0.001}, hub={"private": False})
    run.manifest["settings"]["TAGGER_OF_AN_EARLIER_VERSION"] = 1
    found = {setting["name"]: setting for setting in report.changed_settings(run.manifest["settings"])}
    assert found.keys() == {"TAGGER_TRAIN_LEARNING_RATE", "TAGGER_HUB_PRIVATE"}
    rate = found["TAGGER_TRAIN_LEARNING_RATE"]
    assert (rate["value"], rate["default"], rate["changes_result"]) == ("0.001", "0.0002", True)
    assert rate["description"] == Settings.model_fields["train"].annotation.model_fields["learning_rate"].description
    assert found["TAGGER_HUB_PRIVATE"]["changes_result"] is False
    page, markdown = save(run)
    assert "TAGGER_TRAIN_LEARNING_RATE=0.001 default: 0.0002" in " ".join(page.text.split())
    assert "TAGGER_TRAIN_LEARNING_RATE=0.001" in markdown


COMPARED = Verdict("published", "fail", "it is worse", 0.5, 0.0, 0.0, "0ld" * 13, 0.6, -0.1, [-0.2, -0.05])


@pytest.mark.parametrize(
    ("outcome", "published", "verdict", "commands"),
    [
        ("not pushed", None, None, ["TAGGER_RUN_DIR='my runs' TAGGER_RUN_ID=run tagger-job push"]),
        ("judged", None, None, ["TAGGER_RUN_DIR='my runs' TAGGER_RUN_ID=run tagger-job push"]),
        ("refused", None, None, ["TAGGER_RUN_DIR='my runs' TAGGER_RUN_ID=run tagger-job sample 'a text'"]),
        (
            "refused",
            PUBLISHED,
            COMPARED,
            [f"TAGGER_HUB_REPO=ada/tagger tagger-job promote --revision {PUBLISHED.revision}"],
        ),
        (
            "published",
            PUBLISHED,
            None,
            [
                "TAGGER_HUB_REPO=ada/tagger tagger-job sample 'a text'",
                "TAGGER_HUB_REPO=ada/tagger tagger-job promote --revision v2",
            ],
        ),
        (
            "published",
            PUBLISHED,
            COMPARED,
            [f"TAGGER_HUB_REPO=ada/tagger tagger-job promote --revision {COMPARED.parent_commit}"],
        ),
    ],
)
def test_the_report_ends_with_what_to_do(
    tmp_path: Path, outcome: str, published: Published | None, verdict: Verdict | None, commands: list[str]
) -> None:
    page, markdown = save(make_run(tmp_path / "run", verdict=verdict, run={"dir": "my runs"}), outcome, published)
    for command in commands:
        assert command in page.text and f"    {command}" in markdown.splitlines()
    assert ("push" in page.text.split("What to do with it")[1]) == (outcome in ("not pushed", "judged"))


def test_the_price_is_given_only_where_it_is_known(tmp_path: Path) -> None:
    page, markdown = save(make_run(tmp_path / "gpu", device="NVIDIA L4 in bf16"))
    assert "about $0.81 at $0.80 an hour" in page.text and "about $0.81" in markdown
    page, markdown = save(make_run(tmp_path / "cpu"))
    assert "$" not in page.text + markdown


def test_a_picture_that_cannot_be_drawn_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no ink")

    monkeypatch.setattr(plots, "curve", fail)
    run = make_run(tmp_path / "run")
    report.save_card(run.adapter, Settings(), results.scores(run), run, licence=None)
    assert (run.path / "loss.svg").read_text() == plots.NO_PICTURE
    page, _ = save(run)
    assert "the picture loss could not be drawn (RuntimeError: no ink)" in caplog.text
    assert page.text.count("This picture could not be drawn") == 2
    assert [tag for tag, _ in page.elements].count("svg") == 3


def test_a_report_that_cannot_be_made_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(report, "best_and_worst", lambda *_: 1 / 0)
    report.save_report(make_run(tmp_path / "run"), "judged")
    assert "has no complete report; this is a defect of the job" in caplog.text and "ZeroDivisionError" in caplog.text


def test_a_report_that_cannot_be_written_does_not_end_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = make_run(tmp_path / "run")
    (run.path / "report.html" / "a folder").mkdir(parents=True)
    report.save_report(run, "judged")
    assert "has no complete report (Is a directory)" in caplog.text
    assert (run.path / "report.md").is_file()


def test_runs_of_earlier_versions_have_a_report(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run.path / "thresholds.jsonl").unlink()
    del run.manifest["checksums"]["thresholds.jsonl"], run.manifest["started"], run.manifest["dataset"]["calibration"]
    old = [asdict(prediction) for prediction in results.predictions(run)]
    run.write_lines("predictions.jsonl", [{k: v for k, v in entry.items() if k != "confidences"} for entry in old])
    page, _ = save(run)
    assert "This threshold was not chosen on examples" in page.text
    assert [tag for tag, _ in page.elements].count("svg") == 4
