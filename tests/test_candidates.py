"""Candidates are what a recipe would make of this machine's settings, and differ in nothing else than they may."""

from __future__ import annotations

from pathlib import Path

import pytest

from job.config import candidates, environment
from job.errors import InvalidInputError

GRID = "TAGGER_LORA_R=4,8; TAGGER_TRAIN_LEARNING_RATE=1e-4,2e-4"


def found(monkeypatch: pytest.MonkeyPatch, text: str, recipe: str | None = None) -> list[candidates.Candidate]:
    monkeypatch.setenv("TAGGER_TUNE_CANDIDATES", text)
    return candidates.find_candidates(environment.load(recipe), recipe)


def refusal(monkeypatch: pytest.MonkeyPatch, text: str) -> str:
    with pytest.raises(InvalidInputError) as refused:
        found(monkeypatch, text)
    return str(refused.value)


def test_a_grid_has_each_combination(monkeypatch: pytest.MonkeyPatch) -> None:
    made = found(monkeypatch, GRID)
    assert [(c.settings.lora.r, c.settings.train.learning_rate) for c in made] == [
        *((4, 1e-4), (4, 2e-4)),
        *((8, 1e-4), (8, 2e-4)),
    ]
    assert made[1].name == "TAGGER_LORA_R=4 TAGGER_TRAIN_LEARNING_RATE=2e-4"


def test_a_candidate_as_a_recipe_gives_the_same_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    base = ["TAGGER_LORA_R=32", "TAGGER_TUNE_FOLDS=4", r"""TAGGER_SAMPLE_PROMPTS='["it\'s # one"]'"""]
    Path("base.env").write_text("\n".join(base))
    Path("more.env").write_text("TAGGER_LORA_ALPHA=64\nTAGGER_DATA_SEPARATOR=' \\ ->: '\n")
    Path("less.env").write_text("TAGGER_LORA_R=8\n")
    monkeypatch.setenv("TAGGER_TRAIN_MAX_STEPS", "7")
    more, less = found(monkeypatch, "more.env, less.env", "base.env")
    assert (more.settings.lora.r, more.settings.lora.alpha, less.settings.lora.r) == (32, 64, 8)
    for candidate in (more, less):
        assert candidate.settings.train.max_steps == 7, "the environment overrides a candidate as it does a recipe"
        (tmp_path / "winner.env").write_text(candidates.env_text(candidate.values))
        again = environment.load("winner.env")
        assert again.result_values() == candidate.settings.result_values()
        assert again.sample.prompts == ("it's # one",)
        assert again.tune.folds == 3, "a winner is for `run`"


def test_what_the_recipe_sets_may_be_overridden_beside_a_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("base.env").write_text("TAGGER_LORA_ALPHA=64\nTAGGER_TRAIN_MAX_STEPS=9\n")
    monkeypatch.setenv("TAGGER_TRAIN_MAX_STEPS", "7")
    expected = [c.settings for c in found(monkeypatch, GRID, "base.env")]
    monkeypatch.setenv("TAGGER_RECIPE", "base.env")
    assert [c.settings for c in found(monkeypatch, GRID)] == expected
    assert {settings.train.max_steps for settings in expected} == {7}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("best", "only one candidate"),
        ("TAGGER_LORA_R=4", "only one candidate"),
        ("best,best", "names best twice"),
        ("best,beast", "beast is neither a shipped recipe"),
        ("TAGGER_LORA_RANK=4,8", "did you mean TAGGER_LORA_R?"),
        ("TAGGER_LORA_R=4,0", "candidate TAGGER_LORA_R=0: TAGGER_LORA_R=0 (in TAGGER_TUNE_CANDIDATES): expected"),
        ("TAGGER_LORA_R=4,4", "different values"),
        ("TAGGER_LORA_R=4,8; best", "'best' is not a list of values"),
        ("TAGGER_LORA_R=" + ",".join(map(str, range(1, 60))), "expected 2 to 32"),
        ("TAGGER_DATA_EVAL_SIZE=10,20", "TAGGER_DATA_EVAL_SIZE=10, which is not for a candidate to choose"),
        ("TAGGER_DATA_SEED=1,2", "all are trained and scored on the same data"),
        ("TAGGER_HUB_REPO=ada/x,ada/y", "nothing is published"),
        ("TAGGER_TUNE_FOLDS=4,5", "not for a candidate to choose"),
        ("TAGGER_TRAIN_MAX_STEPS=50,60", "environment sets it, which overrides every candidate"),
        ("TAGGER_LORA_R=16,16.0", "are the same settings here"),
        ("TAGGER_TRAIN_LOGGING_STEPS=5,6", "are the same settings here"),
    ],
)
def test_mistakes_are_named(monkeypatch: pytest.MonkeyPatch, text: str, expected: str) -> None:
    monkeypatch.setenv("TAGGER_TRAIN_MAX_STEPS", "7")
    message = refusal(monkeypatch, text)
    assert expected in message and "/tmp" not in message


def test_a_variable_of_another_program_is_refused_without_its_value(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("a.env").write_text("TAGGER_LORA_R=4\nHF_TOKEN=hf_secret\n")
    message = refusal(monkeypatch, "a.env,best-bloomz")
    assert "candidate a.env sets HF_TOKEN" in message and "hf_secret" not in message


def test_without_candidates_the_message_shows_how_to_name_them(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidInputError, match=r"is not set; expected at least two recipes.*TAGGER_LORA_R=16,64"):
        candidates.find_candidates(environment.load(), None)
