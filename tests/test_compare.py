"""Earlier runs can be listed and compared, also incomplete and damaged ones."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_report import make_run

from job import compare, results
from job.cli import main
from job.errors import InvalidInputError
from job.metrics.bootstrap import f1_difference
from job.runs.run_folder import RunFolder
from job.settings import Run, Settings
from job.types import Published

RUNS = Run(dir=Path("runs"))


def add_run(name: str, started: str = "2026-11-26T01:15:37Z", **groups: Any) -> RunFolder:
    run = make_run(RUNS.dir / name, **groups)
    run.update(started=started, status="passed")
    return run


def change_answers(run: RunFolder, **answers: tuple[str, ...]) -> None:
    changed = [
        replace(entry, predicted=answers.get(entry.text.split()[-1], entry.predicted), confidences=())
        for entry in results.predictions(run)
    ]
    run.write_lines("predictions.jsonl", [entry.__dict__ for entry in changed])


def test_runs_are_listed_with_their_scores_the_newest_first(capsys: pytest.CaptureFixture[str]) -> None:
    run = add_run("new", "2026-11-27T00:00:00Z")
    run.finish(Published("ada/tagger", "c0ffee", "https://huggingface.co/ada/tagger/commit/c0ffee", "v2"))
    add_run("old", "2026-11-25T00:00:00Z")
    (add_run("started", "2026-11-26T00:00:00Z").path / "metrics.json").unlink()
    Path("runs", "damaged").mkdir()
    Path("runs", "damaged", "manifest.json").write_text("{")
    Path("runs", "no-run").mkdir()
    assert main(["runs"]) == 0
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split() == ["run", "status", "started", "micro-F1", "95%", "TF-IDF", "verdict", "adapter"]
    assert [row.split()[:2] for row in rows] == [
        ["new", "complete"],
        ["started", "passed"],
        ["old", "passed"],
        ["damaged", "unreadable"],
    ]
    f1 = results.scores(run)["adapter"].f1
    assert f" {f1:.3f} " in rows[0] and rows[0].endswith("  pass     https://huggingface.co/ada/tagger/commit/c0ffee")
    assert rows[2].endswith("runs/old/adapter")
    assert main(["runs", "--json"]) == 0
    assert [entry["f1"] for entry in json.loads(capsys.readouterr().out)] == [f1, None, f1, None]


def test_a_folder_without_runs_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="there is no run in runs; set TAGGER_RUN_DIR"):
        compare.list_runs(RUNS)


def test_a_comparison_has_settings_scores_and_answers(capsys: pytest.CaptureFixture[str]) -> None:
    first, second = add_run("a"), add_run("b", train={"learning_rate": 0.001}, lora={"targets": ["q_proj"]})
    second.update(versions=second.manifest["versions"] | {"torch": "2.14.0"}, device="NVIDIA L4 in bf16")
    change_answers(second, sea=("sea", "rain"), third=("hope",), another=("sun",))
    found = compare.compare(RUNS, "a", "b")
    assert found.settings == {
        "TAGGER_LORA_TARGETS": ("", "q_proj"),
        "TAGGER_TRAIN_LEARNING_RATE": ("0.0002", "0.001"),
        "torch": ("2.13.0", "2.14.0"),
        "device": ("cpu", "NVIDIA L4 in bf16"),
    }
    before, after = (results.predictions(run) for run in (first, second))
    gold = [entry.gold for entry in before]
    difference, interval = f1_difference(gold, [e.predicted for e in after], [e.predicted for e in before])
    assert found.scores["f1"][1] - found.scores["f1"][0] == pytest.approx(difference)
    assert (found.interval, found.examples, found.other_examples) == (interval, 4, (0, 0))
    assert [answer.text for answer in found.changed] == ["a third", "a text about sea", "another"]
    assert [answer.f1_difference for answer in found.changed] == [1.0, 0.3333, -0.3333]
    assert main(["compare", "a", "runs/b", "--examples", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "a -> b"
    assert "  TAGGER_LORA_TARGETS: (empty) -> q_proj" in lines
    assert f"({interval[0]:+.3f}".replace("(", "(95% interval ") in next(line for line in lines if "micro-F1" in line)
    assert "answers: 3 of 4 differ, 2 are better and 1 worse" in lines
    assert '  better by 1.00: "a third"' in lines and "  1 more are better" in lines
    assert "    in the data ['hope'], ['love'] -> ['hope']" in lines
    assert main(["compare", "a", "b", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["runs"] == ["a", "b"]


def test_a_number_of_examples_below_zero_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["compare", "a", "b", "--examples", "-1"])
    assert stop.value.code == 2 and "--examples: -1 is not a number from 0 on" in capsys.readouterr().err


def test_equal_runs_have_no_differences() -> None:
    add_run("a"), add_run("b")
    lines = list(compare.describe(compare.compare(RUNS, "a", "b"), 5))
    assert "settings: the same" in lines and "answers: 0 of 4 differ, 0 are better and 0 worse" in lines


def test_only_examples_of_both_runs_are_scored() -> None:
    add_run("a", word="sea"), add_run("b", word="wind")
    found = compare.compare(RUNS, "a", "b")
    assert (found.examples, found.other_examples) == (3, (1, 1))
    assert "1 only in a and 1 only in b are left out" in "\n".join(compare.describe(found, 5))
    lines = (RUNS.dir / "b" / "predictions.jsonl").read_text().splitlines()
    (RUNS.dir / "b" / "predictions.jsonl").write_text(lines[0] + "\n")
    lines = list(compare.describe(compare.compare(RUNS, "a", "b"), 5))
    nothing = "scores: nothing to compare, they share no held-out example"
    assert f"{nothing}; 4 only in a and 1 only in b are left out" in lines


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: (run.path / "predictions.jsonl").unlink(), "the run b has no predictions yet .*passed"),
        (lambda run: (run.path / "predictions.jsonl").write_text("{"), "predictions.jsonl cannot be read"),
        (lambda run: (run.path / "manifest.json").write_text("{"), "is not a manifest of this version"),
        (lambda run: (run.path / "manifest.json").unlink(), "there is no run b in runs; `tagger-job runs` lists them"),
    ],
)
def test_runs_that_cannot_be_compared_are_refused(damage: Any, message: str) -> None:
    add_run("a")
    damage(add_run("b"))
    with pytest.raises(InvalidInputError, match=message) as refused:
        compare.compare(Settings().run, "a", "b")
    assert len(str(refused.value)) <= 300
