"""Settings are validated whole, before anything heavy is imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from job.config import environment, reference
from job.errors import InvalidInputError
from job.settings import Settings

ROOT = Path(__file__).parents[1]


def test_the_defaults_are_the_recipe() -> None:
    s = environment.load()
    assert (s.base.model, s.base.quantize) == ("bigscience/bloomz-560m", "int8")
    assert (s.lora.r, s.lora.alpha, s.lora.dropout) == (16, 32, 0.05)
    assert (s.train.batch_size, s.train.gradient_accumulation_steps, s.train.warmup_steps, s.train.max_steps) == (
        4,
        4,
        100,
        200,
    )
    assert (s.train.learning_rate, s.train.logging_steps, s.train.completion_only_loss) == (2e-4, 25, True)
    assert (s.data.dataset, s.data.text_column, s.data.tags_column) == ("Abirate/english_quotes", "quote", "tags")
    assert (s.hub.private, s.hub.commit_message, s.sample.max_new_tokens) == (True, "basic training", 50)


def test_every_problem_is_reported_at_once_with_name_value_and_what_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAGGER_LORA_R", "0")
    monkeypatch.setenv("TAGGER_TRAIN_MAX_STEPS", "many")
    monkeypatch.setenv("TAGGER_BASE_QUANTIZE", "int4")
    monkeypatch.setenv("TAGGER_SAMPLE_PROMPTS", "not a list")
    monkeypatch.setenv("TAGGER_LORA_RANK", "8")
    monkeypatch.setenv("TAGGER_FOO", "1")
    with pytest.raises(InvalidInputError) as refusal:
        environment.load()
    text = "\n".join(sorted(refusal.value.problems))
    assert len(refusal.value.problems) == 6, text
    assert "TAGGER_LORA_R=0: expected greater than or equal to 1." in text
    assert "TAGGER_TRAIN_MAX_STEPS=many: expected a valid integer" in text
    assert "TAGGER_BASE_QUANTIZE=int4: expected 'int8', 'nf4' or 'none'." in text
    assert "TAGGER_SAMPLE_PROMPTS=not a list: expected a JSON list" in text
    assert "TAGGER_LORA_RANK is not a setting; did you mean TAGGER_LORA_" in text
    assert "TAGGER_FOO is not a setting; did you mean TAGGER_" in text


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("TAGGER_DATA_SEPARATOR", "   ", "only white space"),
        ("TAGGER_DATA_EVAL_SIZE", "1.5", "a share below 1, or a whole number"),
        ("TAGGER_DATA_EVAL_SIZE", "0", "greater than 0"),
        ("TAGGER_DATA_EVAL_SIZE", "nan", "finite"),
        ("TAGGER_TRAIN_LEARNING_RATE", "inf", "finite"),
        ("TAGGER_HUB_REPO", "no-owner", "match"),
        ("TAGGER_RUN_ID", "../elsewhere", "match"),
        ("TAGGER_SAMPLE_PROMPTS", '["", "x"]', "empty"),
        ("TAGGER_EVAL_GATE", "better", "'off', 'floor' or 'published'"),
        ("TAGGER_MODAL_GPU", "L4,V100", "expected T4, L4, "),
        ("TAGGER_MODAL_GPU", "A10:5", "such as L4:2 (up to 8; A10 up to 4)"),
        ("TAGGER_MODAL_GPU", "L4:", "such as L4:2"),
        ("TAGGER_MODAL_GPU", ",", "expected the name of a GPU"),
        ("TAGGER_MODAL_TIMEOUT_HOURS", "24.5", "less than or equal to 24"),
        ("TAGGER_MODAL_SECRET", "my secret", "match"),
        ("TAGGER_MODAL_CRON", "weekly", "expected minute, hour, day of the month, month, day of the week"),
        ("TAGGER_MODAL_CRON", "0 24 * * *", "expected minute, hour"),
        ("TAGGER_MODAL_CRON", "*/0 4 * * 1", "expected minute, hour"),
        ("tagger_lora_r", "8", "did you mean TAGGER_LORA_R?"),
    ],
)
def test_a_bad_value_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, name: str, value: str, said: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(InvalidInputError) as refusal:
        environment.load()
    assert name in str(refusal.value)
    assert said in str(refusal.value)


def test_what_modal_knows_is_let_through_as_it_writes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAGGER_MODAL_GPU", "h100!:8, a10g,B200+,RTX-PRO-6000")
    for cron in ("never", "*/5 0-6,18-23 1,15 * 1-5/2"):
        monkeypatch.setenv("TAGGER_MODAL_CRON", cron)
        assert environment.load().modal.cron == cron
    assert environment.load().modal.gpu == "H100!:8,A10G,B200+,RTX-PRO-6000"


def test_a_group_without_a_knob_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAGGER_LORA", "{bad")
    with pytest.raises(InvalidInputError, match="TAGGER_LORA is not a setting"):
        environment.load()


def test_settings_that_do_not_fit_together_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_the_environment_wins_over_dotenv_and_dotenv_over_the_recipe(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    recipe = tmp_path / "fast.env"
    recipe.write_text("TAGGER_LORA_R=1\nTAGGER_LORA_ALPHA=1\nTAGGER_LORA_DROPOUT=0.1\nHF_HOME=/recipe\n")
    (tmp_path / ".env").write_text("TAGGER_LORA_R=2\nTAGGER_LORA_ALPHA=2\nHF_TOKEN=hf_secret\n")
    monkeypatch.setenv("TAGGER_LORA_R", "3")
    s = environment.load(recipe)
    assert (s.lora.r, s.lora.alpha, s.lora.dropout) == (3, 2, 0.1)
    assert environment.sources(recipe) == {
        "TAGGER_LORA_R": "environment",
        "TAGGER_LORA_ALPHA": ".env",
        "TAGGER_LORA_DROPOUT": str(recipe),
    }
    assert environment.third_party_variables(recipe) == {"HF_HOME": "/recipe", "HF_TOKEN": "hf_secret"}


def test_an_unknown_name_in_a_file_is_refused_with_the_file(tmp_path: Path) -> None:
    recipe = tmp_path / "typo.env"
    recipe.write_text("TAGGER_LORA_RR=1\n")
    with pytest.raises(
        InvalidInputError, match=r"TAGGER_LORA_RR \(in .*typo.env\) is not a setting; did you mean TAGGER_LORA_R\?"
    ):
        environment.load(recipe)
    with pytest.raises(InvalidInputError, match="nor a file with lines"):
        environment.load(tmp_path / "absent.env")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"TAGGER_LORA_R 16\n", "line 1: 'TAGGER_LORA_R 16' is not NAME=value"),
        (b"# fine\nTAGGER_LORA_R='16\n", "line 2"),
        (b"TAGGER_LORA_R\n", "line 1"),
        (b"\xff\xfeT\x00", "cannot be read as lines of NAME=value"),
    ],
)
def test_a_file_that_is_not_lines_of_settings_is_refused(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "bad.env").write_bytes(content)
    for read in (environment.load, environment.third_party_variables):
        with pytest.raises(InvalidInputError) as refusal:
            read(tmp_path / "bad.env")
        assert said in str(refusal.value)


def test_env_example_is_in_step_with_the_settings() -> None:
    assert (ROOT / ".env.example").read_text(encoding="utf-8") == reference.env_example(), "run `make .env.example`"


def test_env_example_as_it_stands_means_the_defaults() -> None:
    assert environment.load(ROOT / ".env.example") == Settings()
    for line in reference.env_example().splitlines():
        assert line.partition("=")[2][:1] not in ("'", '"'), f"docker run --env-file would keep the quote: {line}"


def test_a_separator_gets_back_the_spaces_that_env_files_strip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAGGER_DATA_SEPARATOR", "=>")
    assert environment.load().data.separator == " => "
    monkeypatch.setenv("TAGGER_DATA_SEPARATOR", "\nTags: ")
    assert environment.load().data.separator == "\nTags: "


def test_what_does_not_change_the_result_does_not_change_the_digest() -> None:
    base = Settings()
    same = Settings.model_validate(
        {"run": {"dir": "/elsewhere"}, "train": {"logging_steps": 1}, "hub": {"push": "never"}}
    )
    other = Settings.model_validate({"train": {"max_steps": 199}})
    assert base.digest() == same.digest()
    assert base.digest() != other.digest()


def test_the_shipped_recipes_are_valid() -> None:
    recipes = sorted((ROOT / "job" / "config" / "recipes").glob("*.env"))
    assert recipes
    for recipe in recipes:
        environment.load(recipe)


def test_the_settings_command_imports_nothing_heavy_and_masks_the_token() -> None:
    code = (
        "import sys; from job.cli import main; assert main(['settings']) == 0;"
        "heavy = {'torch', 'transformers', 'datasets', 'sklearn', 'numpy', 'huggingface_hub'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    environ = {"PATH": "/usr/bin", "HF_TOKEN": "hf_do_not_show", "TAGGER_LORA_R": "8", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "TAGGER_LORA_R=8   # environment" in done.stdout
    assert "TAGGER_LORA_ALPHA=32   # default" in done.stdout
    assert "HF_TOKEN=***" in done.stdout
    assert "hf_do_not_show" not in done.stdout + done.stderr


def test_settings_of_a_run_that_do_not_fit_these_are_refused_in_a_sentence() -> None:
    with pytest.raises(
        InvalidInputError, match="with the settings of the run that trained it: TAGGER_DATA_MAX_LENGTH=40 leaves"
    ):
        Settings().with_result_values({"TAGGER_DATA_MAX_LENGTH": 40})


@pytest.mark.parametrize("value", ["2", "-0.1", "high", "1", "nan"])
def test_a_threshold_is_auto_or_a_number_in_one_sentence(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("TAGGER_SAMPLE_THRESHOLD", value)
    with pytest.raises(InvalidInputError) as refused:
        environment.load()
    assert refused.value.problems == (
        f"TAGGER_SAMPLE_THRESHOLD={value}: expected auto, or a number from 0 to below 1.",
    )
