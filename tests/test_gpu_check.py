"""The checks of `make gpu-check`: what they report, and that they run where there is no GPU."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest
import torch

from bench.gpu import __main__ as gpu_check
from bench.gpu.gradients import difference, own, plain
from bench.gpu.harness import Check, Row, Rows, run_checks
from bench.gpu.models import SHAPES, Work, dequantize, examples


@pytest.fixture
def work(tmp_path: Path) -> Work:
    return Work(torch.device("cpu"), tmp_path, toy=True)


def statuses(work: Work, *checks: Check, seconds: float = 600) -> list[tuple[str, str]]:
    records = run_checks(checks, work, seconds=seconds, report=lambda record: None)
    return [(record["status"], record["figure"]) for record in records]


def test_an_error_fails_its_check_and_no_other(work: Work) -> None:
    def broken(work: Work) -> Rows:
        yield Row("first", True, "right")
        raise ValueError("no such kernel")

    found = statuses(work, Check("broken", broken), Check("next", lambda work: iter([Row("", None, "7")])))
    assert found == [("pass", "right"), ("FAIL", "ValueError: no such kernel"), ("figure", "7")]


def test_a_check_that_takes_too_long_fails_and_keeps_its_rows(work: Work) -> None:
    def slow(work: Work) -> Rows:
        yield Row("first", True, "right")
        time.sleep(5)

    found = statuses(work, Check("slow", slow, seconds=1))
    assert found == [("pass", "right"), ("FAIL", "OutOfTimeError: took longer than 1 s")]


def test_a_missing_package_is_named_and_skips_its_check(work: Work) -> None:
    check = Check("check", lambda work: iter([Row("", True, "")]), ("torch", "no_such_package"))
    assert statuses(work, check) == [("skipped", "no_such_package not installed")]
    late = statuses(work, Check("late", lambda work: iter(()), seconds=20), seconds=9)
    assert late == [("skipped", "9 s left, and it may take 20 s")]


def test_a_dry_run_prints_a_table_and_keeps_a_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        sys,
        "argv",
        ["gpu", "--device", "cpu", "--minutes", "600", "--only", "machine", "overflow", "--json", "found.json"],
    )
    assert gpu_check.main() == 0
    record = json.loads(Path("found.json").read_text())
    assert [(row["check"], row["status"]) for row in record["checks"]] == [
        ("machine", "figure"),
        ("machine", "figure"),
        ("overflow", "pass"),
        ("overflow", "pass"),
    ]
    assert "steps skipped from a scale of" in capsys.readouterr().out


@pytest.mark.parametrize("shape", SHAPES)
def test_int8_gradients_equal_those_of_the_dequantized_weights(work: Work, shape: str) -> None:
    compute, rows = work.compute("fp32"), examples(4)
    reference = work.model(shape, "int8", compute)
    dequantize(reference)
    _, expected = plain(reference, rows, compute)
    _, found = own(work.model(shape, "int8", compute), rows, compute)
    assert difference(found, expected) < 1e-5
