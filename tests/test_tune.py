"""Tune chooses on folds of the training data, survives a kill, and leaves the held-out examples alone."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from tiny_run import read_lines, set_tiny_environment

from job import cli, data, trial
from job.config import environment
from job.dataset import tokenization
from job.dataset.near_duplicates import near_duplicates
from job.dataset.split import cross_validation_folds
from job.errors import DivergedError
from job.sample import Tagger
from job.types import EncodedExample, Example, TaggedText

TUNE = Path("runs/tiny")


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, llama: Path) -> pytest.MonkeyPatch:
    """Set the variables of a tune that takes seconds: two ranks, two folds."""
    set_tiny_environment(monkeypatch, llama)
    variables = {
        "TAGGER_BASE_QUANTIZE": "none",
        "TAGGER_TUNE_CANDIDATES": "TAGGER_LORA_R=2,4",
        "TAGGER_TUNE_FOLDS": "2",
        "TAGGER_TRAIN_MAX_STEPS": "4",
        "TAGGER_TRAIN_SAVE_STEPS": "1",
        "TAGGER_SAMPLE_MAX_NEW_TOKENS": "4",
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


def fork_tune() -> int:
    """Start `tagger-job tune` in a process of its own; return its id."""
    pid = os.fork()
    if pid:
        return pid
    try:
        output = os.open("output", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.argv = ["tagger-job", "tune"]
        cli.command()
    except SystemExit as end:
        sys.stdout.flush()
        os._exit(int(end.code or 0))
    finally:
        os._exit(99)


def wait_until(reached: Callable[[], object], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while True:
        with suppress(FileNotFoundError):  # of a file that goes while its folder is looked through
            if reached():
                return
        assert time.monotonic() < deadline, Path("output").read_text()
        time.sleep(0.005)


def report(folder: Path = TUNE) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return found


def without_times(found: dict[str, Any]) -> list[list[dict[str, Any]]]:
    return [
        sorted(({**entry, "seconds": 0} for entry in trials), key=lambda entry: str(entry["candidate"]))
        for trials in found["rounds"]
    ]


def test_a_killed_tune_resumes_without_repeating_what_is_finished(tiny: pytest.MonkeyPatch) -> None:
    pid = fork_tune()
    wait_until(lambda: list(TUNE.glob("*/answers-*.json")) and len(list(TUNE.glob("*/checkpoints/checkpoint-*"))) >= 1)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    finished = [file.parent for file in TUNE.glob("*/answers-*.json")]
    assert 1 <= len(finished) < 4 and not (TUNE / "report.json").exists()
    kept = [file for folder in finished for file in (*folder.glob("adapter/*"), *folder.glob("*.json*"))]
    before = {file: file.stat().st_mtime_ns for file in kept if file.name != "manifest.json"}
    assert cli.main(["tune"]) == 0
    assert {file: file.stat().st_mtime_ns for file in before} == before
    trainings = list(TUNE.glob("fold-*"))
    assert len(trainings) == 4
    for folder in trainings:
        assert [entry["step"] for entry in read_lines(folder / "log.jsonl")] == [1, 2, 3, 4]
        assert not list((folder / "checkpoints").iterdir()), "checkpoints of finished trainings take space"
    attempts = json.loads((TUNE / "manifest.json").read_text())["attempts"]
    assert [attempt["status"] for attempt in attempts] == ["killed", "complete"]
    tiny.setenv("TAGGER_RUN_ID", "undisturbed")
    assert cli.main(["tune"]) == 0
    assert without_times(report()) == without_times(report(Path("runs/undisturbed")))


def test_held_out_examples_are_neither_trained_on_nor_tagged(
    tiny: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = environment.load()
    parts = data.load(settings.data)
    seen: dict[str, list[str]] = {"trained": [], "tagged": []}
    encode, tag = tokenization.encode, Tagger.tag

    def spy_encode(tokenizer: Any, examples: Sequence[Example], *rest: Any) -> list[EncodedExample]:
        seen["trained"] += [example.text for example in examples]
        return encode(tokenizer, examples, *rest)

    def spy_tag(self: Tagger, texts: Sequence[str]) -> list[TaggedText]:
        seen["tagged"] += texts
        return tag(self, texts)

    tiny.setattr(tokenization, "encode", spy_encode)
    tiny.setattr(Tagger, "tag", spy_tag)
    assert cli.main(["tune"]) == 0
    own = {example.text for example in parts.train}
    assert set(seen["tagged"]) == own and set(seen["trained"]) <= own
    assert len(seen["tagged"]) == 2 * len(own), "each text once for each candidate"
    assert not own & {example.text for example in parts.held_out}
    winner, where, command = capsys.readouterr().out.splitlines()
    assert "no difference was shown" in winner and where == "report: runs/tiny/report.md"
    assert command == "winner: tagger-job run --recipe runs/tiny/winner.env"
    for name, value, what in (("CANDIDATES", "TAGGER_LORA_R=2,8", "candidates"), ("FOLDS", "3", "folds")):
        with tiny.context() as changed:
            changed.setenv(f"TAGGER_TUNE_{name}", value)
            assert cli.main(["tune"]) == 2 and f"begun with other {what}" in capsys.readouterr().err
    tiny.delenv("TAGGER_TUNE_CANDIDATES")
    chosen = environment.load("runs/tiny/winner.env")
    assert f"TAGGER_LORA_R={chosen.lora.r}" == report()["winner"]
    assert f"Chosen because {report()['reason']}" in (TUNE / "report.md").read_text()
    assert cli.main(["run"]) == 2 and "is the folder of a tune" in capsys.readouterr().err
    assert cli.main(["runs"]) == 0 and "complete" in capsys.readouterr().out


def test_a_budget_counts_over_the_tune(tiny: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.setenv("TAGGER_TRAIN_MAX_STEPS", "400")
    tiny.setenv("TAGGER_RUN_BUDGET", "1s")
    assert cli.main(["tune"]) == 75
    assert "TAGGER_RUN_BUDGET" in capsys.readouterr().err
    assert json.loads((TUNE / "manifest.json").read_text())["status"] == "interrupted"
    before = {file: file.stat().st_mtime_ns for file in TUNE.rglob("*") if file.is_file()}
    assert cli.main(["tune"]) == 2
    assert "is used up" in capsys.readouterr().err
    assert {file: file.stat().st_mtime_ns for file in TUNE.rglob("*") if file.is_file()} == before


def test_a_candidate_that_diverges_loses_and_is_not_tried_again(tiny: pytest.MonkeyPatch) -> None:
    train, tried = trial.train, []

    def diverges(model: Any, *rest: Any, **options: Any) -> Any:
        tried.append(model.peft_config["default"].r)
        if tried[-1] == 2:
            raise DivergedError("the loss is not finite")
        return train(model, *rest, **options)

    tiny.setattr(trial, "train", diverges)
    assert cli.main(["tune"]) == 0
    assert report()["winner"] == "TAGGER_LORA_R=4" and "the loss is not finite" in report()["reason"]
    (TUNE / "report.json").unlink()
    assert cli.main(["tune"]) == 0
    assert tried == [2, 4, 4]


def test_candidates_that_differ_in_decoding_share_a_training(tiny: pytest.MonkeyPatch) -> None:
    tiny.setenv("TAGGER_TUNE_CANDIDATES", "TAGGER_SAMPLE_DECODING=greedy,head")
    assert cli.main(["tune"]) == 0
    assert len(list(TUNE.glob("fold-*"))) == 2 and len(list(TUNE.glob("fold-*/answers-*.json"))) == 4


def test_check_writes_no_run_and_says_what_a_tune_takes(
    tiny: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.setenv("TAGGER_RUN_PRICE_PER_HOUR", "36")
    assert cli.main(["tune", "--check"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "round: 2 candidates with 1 of their steps on each fold, 4 trainings" in lines
    assert lines[-1].startswith("estimate: at most ") and "$" in lines[-1] and "GiB of process memory" in lines[-1]
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("TAGGER_TUNE_CANDIDATES", "TAGGER_LORA_R=2", "only one candidate"),
        ("TAGGER_TUNE_FOLDS", "10", "for the smallest fold; expected at least 10"),
        ("TAGGER_TUNE_CANDIDATES", "TAGGER_LORA_TARGETS=nowhere,all-linear", "candidate TAGGER_LORA_TARGETS=nowhere: "),
        ("TAGGER_TUNE_CANDIDATES", "TAGGER_DATA_MIN_TAG_COUNT=1,{most}", "cannot be trained on a fold"),
        ("TAGGER_RUN_PROCESSES", "2", "leave out TAGGER_RUN_PROCESSES=2"),
        ("TAGGER_RUN_STORE", "file:///tmp/store", "remove it for this command"),
        ("TAGGER_DATA_DATASET", "nowhere.jsonl", "error: TAGGER_DATA_DATASET=nowhere.jsonl"),
    ],
)
def test_mistakes_are_refused_before_anything_is_written(
    tiny: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, value: str, expected: str
) -> None:
    if "{most}" in value:  # as many as all training examples have, so that no fold has them
        train = data.load(environment.load().data).train
        most = max(Counter(tag for example in train for tag in example.tags).values())
        value = value.format(most=most)
    tiny.setenv(name, value)
    assert cli.main(["tune"]) == 2
    error = capsys.readouterr().err
    assert expected in error and "Traceback" not in error and not Path("runs").exists()


def test_each_text_is_in_one_fold_and_has_no_near_duplicate_in_its_training() -> None:
    texts = [f"{n} birds sang on the old wall of garden {n * 7} until rain number {n**3} fell" for n in range(60)]
    examples = [Example(text, ("tag",)) for text in [*texts, *(f"{text}!!" for text in texts[:20])]]
    folds = cross_validation_folds(examples, 3, 7)
    scored = [example.text for _, own in folds for example in own]
    assert sorted(scored) == sorted(example.text for example in examples)
    for train, own in folds:
        both = [example.text for example in (*train, *own)]
        is_own = [n >= len(train) for n in range(len(both))]
        import numpy as np

        assert not near_duplicates(both, np.array(is_own)).any()
    assert cross_validation_folds(examples[::-1], 3, 7)[0][1] == folds[0][1][::-1], "a text's fold is its own"
