"""Types of settings accept and refuse values with a message that says what is allowed."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from job.config import environment
from job.errors import InvalidInputError

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("TAGGER_DATA_SEPARATOR", "   ", "only white space"),
        ("TAGGER_DATA_EVAL_SIZE", "1.5", "a fraction below 1, or a whole number"),
        ("TAGGER_DATA_EVAL_SIZE", "0", "expected a value above 0."),
        ("TAGGER_DATA_EVAL_SIZE", "nan", "finite"),
        ("TAGGER_TRAIN_LEARNING_RATE", "inf", "finite"),
        ("TAGGER_HUB_REPO", "no-owner", "TAGGER_HUB_REPO=no-owner: expected owner/name."),
        ("TAGGER_HUB_REPO", "a/b/c", "TAGGER_HUB_REPO=a/b/c: expected owner/name."),
        ("TAGGER_HUB_REPO", "/b", "expected owner/name."),
        ("TAGGER_HUB_REVISION", "a branch", "as git allows them"),
        ("TAGGER_HUB_REVISION", "a..b", "as git allows them"),
        ("TAGGER_BASE_REVISION", "-x", "as git allows them"),
        ("TAGGER_DATA_REVISION", "x.lock", "as git allows them"),
        ("TAGGER_MODAL_SECRET", "geheimnisträger", "expected letters, digits"),
        ("TAGGER_RUN_ID", "../elsewhere", "expected letters, digits"),
        ("TAGGER_SAMPLE_PROMPTS", '["", "x"]', "empty"),
        ("TAGGER_EVAL_GATE", "better", "'off', 'floor' or 'published'"),
        ("TAGGER_MODAL_TIMEOUT_HOURS", "24.5", "expected a value of at most 24."),
        ("TAGGER_MODAL_SECRET", "my secret", "expected letters, digits"),
        ("TAGGER_RUN_PROCESSES", "0", "TAGGER_RUN_PROCESSES=0: expected a value of at least 1."),
        ("TAGGER_MODAL_CRON", "weekly", "expected minute, hour, day of the month, month, day of the week"),
        ("TAGGER_MODAL_CRON", "0 24 * * *", "expected minute, hour"),
        ("TAGGER_MODAL_CRON", "*/0 4 * * 1", "expected minute, hour"),
        ("tagger_lora_r", "8", "did you mean TAGGER_LORA_R?"),
    ],
)
def test_an_invalid_value_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(InvalidInputError) as refusal:
        environment.load()
    assert name in str(refusal.value)
    assert message in str(refusal.value)


@pytest.mark.parametrize(
    "repo",
    [
        *("ada/a--b", "a..b/c", "ada/x.git", "ada/-x", "ada/x-", "ada/.x", "ada/x.", "-ada/x", "ada/été", "ada/模型"),
        *("ada/" + "x" * 97, "x" * 97 + "/x", "ada/a b", "ada/a:b", "ada/x\n"),
    ],
)
def test_a_name_that_the_hub_s_client_refuses_is_refused(monkeypatch: pytest.MonkeyPatch, repo: str) -> None:
    with pytest.raises(HFValidationError):
        validate_repo_id(repo)
    monkeypatch.setenv("TAGGER_HUB_REPO", repo)
    with pytest.raises(InvalidInputError, match=r"TAGGER_HUB_REPO=.*: expected owner/name, each of at most 96 ASCII"):
        environment.load()


@pytest.mark.parametrize("repo", ["ada/x", "A1/b_-.c", "_a/_b_", "ada/" + "x" * 96, "ada/x.y-z_1"])
def test_a_name_that_the_hub_s_client_takes_is_taken(monkeypatch: pytest.MonkeyPatch, repo: str) -> None:
    validate_repo_id(repo)
    monkeypatch.setenv("TAGGER_HUB_REPO", repo)
    assert environment.load().hub.repo == repo


@pytest.mark.parametrize("revision", ["main", "refs/convert/parquet", "refs/pr/1", "v1.0", "a-b_c", "c0ffee" * 7])
def test_a_revision_that_git_takes_is_taken(monkeypatch: pytest.MonkeyPatch, revision: str) -> None:
    monkeypatch.setenv("TAGGER_DATA_REVISION", revision)
    assert environment.load().data.revision == revision


@pytest.mark.parametrize("cron", ["never", "*/5 0-6,18-23 1,15 * 1-5/2"])
def test_a_schedule_is_five_cron_fields_or_never(monkeypatch: pytest.MonkeyPatch, cron: str) -> None:
    monkeypatch.setenv("TAGGER_MODAL_CRON", cron)
    assert environment.load().modal.cron == cron


def test_a_separator_gets_the_spaces_that_env_files_strip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAGGER_DATA_SEPARATOR", "=>")
    assert environment.load().data.separator == " => "
    monkeypatch.setenv("TAGGER_DATA_SEPARATOR", "\nTags: ")
    assert environment.load().data.separator == "\nTags: "


@pytest.mark.parametrize("value", ["2", "-0.1", "high", "1", "nan"])
def test_a_threshold_is_auto_or_a_number(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("TAGGER_SAMPLE_THRESHOLD", value)
    with pytest.raises(InvalidInputError) as refused:
        environment.load()
    assert refused.value.problems == (
        f"TAGGER_SAMPLE_THRESHOLD={value}: expected auto, or a number from 0 to below 1.",
    )
