"""Settings: defaults, bounds that depend on each other, and what identifies a run."""

from __future__ import annotations

import pytest

from job.config import environment
from job.errors import InvalidInputError
from job.settings import Settings


def test_the_defaults_are_the_recipe_of_the_notebook() -> None:
    recipe = {
        "TAGGER_BASE_MODEL": "bigscience/bloomz-560m",
        "TAGGER_BASE_QUANTIZE": "int8",
        "TAGGER_DATA_DATASET": "Abirate/english_quotes",
        "TAGGER_DATA_TEXT_COLUMN": "quote",
        "TAGGER_DATA_TAGS_COLUMN": "tags",
        "TAGGER_LORA_R": 16,
        "TAGGER_LORA_ALPHA": 32,
        "TAGGER_LORA_DROPOUT": 0.05,
        "TAGGER_TRAIN_BATCH_SIZE": 4,
        "TAGGER_TRAIN_GRADIENT_ACCUMULATION_STEPS": 4,
        "TAGGER_TRAIN_WARMUP_STEPS": 100,
        "TAGGER_TRAIN_MAX_STEPS": 200,
        "TAGGER_TRAIN_LEARNING_RATE": 2e-4,
        "TAGGER_TRAIN_LOGGING_STEPS": 25,
        "TAGGER_TRAIN_COMPLETION_ONLY_LOSS": True,
        "TAGGER_HUB_PRIVATE": True,
        "TAGGER_HUB_COMMIT_MESSAGE": "basic training",
        "TAGGER_SAMPLE_MAX_NEW_TOKENS": 50,
    }
    values = environment.load().values()
    assert {name: values[name] for name in recipe} == recipe


def test_inconsistent_settings_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAGGER_RUN_DEVICE", "cpu")
    monkeypatch.setenv("TAGGER_TRAIN_PRECISION", "fp16")
    with pytest.raises(InvalidInputError, match="TAGGER_TRAIN_PRECISION=fp16 needs a GPU"):
        environment.load()
    monkeypatch.delenv("TAGGER_TRAIN_PRECISION")
    monkeypatch.setenv("TAGGER_DATA_LIMIT", "100")
    monkeypatch.setenv("TAGGER_DATA_EVAL_SIZE", "100")
    with pytest.raises(InvalidInputError, match="holds out all of TAGGER_DATA_LIMIT=100"):
        environment.load()
    monkeypatch.delenv("TAGGER_DATA_LIMIT")
    monkeypatch.setenv("TAGGER_MODAL_CACHE_VOLUME", "tagger-runs")
    with pytest.raises(InvalidInputError, match="are both tagger-runs; name two volumes"):
        environment.load()


@pytest.mark.parametrize(
    ("variables", "why"),
    [
        (
            {"INIT": "pissa_niter_4"},
            "TAGGER_LORA_INIT=pissa_niter_4: expected .*: pissa changes the weights of the base model",
        ),
        ({"INIT": "olora"}, "TAGGER_LORA_INIT=olora: expected .*: olora changes the weights of the base model"),
        ({"INIT": "eva"}, "TAGGER_LORA_INIT=eva: expected .*: eva needs a pass over the data"),
        ({"INIT": "false"}, "TAGGER_LORA_INIT.*'true', 'gaussian' or 'orthogonal'"),
        ({"INIT": "orthogonal"}, "TAGGER_LORA_INIT=orthogonal needs TAGGER_BASE_QUANTIZE=none"),
    ],
)
def test_initial_adapters_that_would_not_fit_the_base_model_are_refused(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], why: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(f"TAGGER_LORA_{name}", value)
    with pytest.raises(InvalidInputError, match=why) as refused:
        environment.load()
    assert len(str(refused.value)) <= 300


def test_only_settings_that_change_the_result_change_the_digest() -> None:
    base = Settings()
    same = Settings.model_validate(
        {
            "run": {"dir": "/elsewhere"},
            "train": {"logging_steps": 1, "save_steps": 1, "save_minutes": 1, "save_total_limit": 1},
            "hub": {"push": "never"},
        }
    )
    other = Settings.model_validate({"train": {"max_steps": 199}})
    assert base.digest() == same.digest()
    assert base.digest() != other.digest()


def test_settings_of_a_run_that_do_not_fit_are_refused() -> None:
    with pytest.raises(
        InvalidInputError, match="with the settings of the run that trained it: TAGGER_DATA_MAX_LENGTH=40 leaves"
    ):
        Settings().with_result_values({"TAGGER_DATA_MAX_LENGTH": 40})
