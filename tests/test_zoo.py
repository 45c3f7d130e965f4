"""Architectures of several kinds train, save and merge, and the page about models lists those of the zoo."""

from __future__ import annotations

from pathlib import Path

import pytest
import zoo

# packed; padded and a mixture of experts; without attention; a decoder whose own loss ignores the labels that are given
KINDS = [("llama", "int8"), ("qwen3_moe", "nf4"), ("mamba", "int8"), ("bart", "none")]


@pytest.mark.parametrize(("name", "quantize"), KINDS)
def test_a_model_of_each_kind_is_checked_trained_saved_and_merged(name: str, quantize: str, tmp_path: Path) -> None:
    result = zoo.try_architecture(name, tmp_path, (quantize,))
    assert result.problems == {}
    assert result.adapters


@pytest.mark.parametrize(
    ("name", "lora"),
    [
        ("mixtral", {"targets": ("all-linear",), "dropout": 0}),  # adapters on the experts
        ("gpt2", {"use_dora": True, "init": "orthogonal"}),
    ],
)
def test_every_kind_of_adapter_is_trained_saved_and_merged(name: str, lora: dict[str, object], tmp_path: Path) -> None:
    assert zoo.try_architecture(name, tmp_path, ("none",), lora).problems == {}


def test_a_difference_of_the_gradients_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zoo, "TOLERANCE", 0.0)
    problems = zoo.try_architecture("llama", tmp_path, ("none",)).problems
    assert "instead of" in problems["none"] or "gradients differ" in problems["none"]


def test_the_table_of_the_page_about_models_is_that_of_the_zoo() -> None:
    page = zoo.PAGE.read_text(encoding="utf-8")
    lines = page.partition(zoo.BEGIN)[2].partition(zoo.END)[0].splitlines()
    rows = {line.split("`")[1]: line for line in lines if line.startswith("| `") and "`model_type`" not in line}
    assert list(rows) == list(zoo.ARCHITECTURES), "run `make zoo`"
    assert zoo.refused_line() in lines, "run `make zoo`"
    for name in ("bloom", "ctrl", "mamba", "qwen3_moe", "rwkv"):
        assert rows[name] == zoo.row(zoo.describe(name)), "run `make zoo`"
