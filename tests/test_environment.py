"""Settings are read from environment, .env and recipe, and every problem is refused at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from job.config import environment
from job.errors import InvalidInputError
from job.settings import iter_fields

ROOT = Path(__file__).parents[1]


def test_every_problem_is_reported_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
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
    assert "TAGGER_LORA_R=0: expected a value of at least 1." in text
    assert "TAGGER_TRAIN_MAX_STEPS=many: expected a whole number." in text
    assert "TAGGER_BASE_QUANTIZE=int4: expected 'int8', 'nf4' or 'none'." in text
    assert "TAGGER_SAMPLE_PROMPTS=not a list: expected a JSON list" in text
    assert "TAGGER_LORA_RANK is not a setting; did you mean TAGGER_LORA_" in text
    assert "TAGGER_FOO is not a setting; did you mean TAGGER_" in text


def test_the_name_of_a_group_is_not_a_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAGGER_LORA", "{bad")
    with pytest.raises(InvalidInputError, match="TAGGER_LORA is not a setting"):
        environment.load()


def test_environment_overrides_dotenv_overrides_recipe(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    recipe = tmp_path / "fast.env"
    recipe.write_text("TAGGER_LORA_R=1\nTAGGER_LORA_ALPHA=1\nTAGGER_LORA_DROPOUT=0.1\nHF_HOME=/recipe\n")
    (tmp_path / ".env").write_text("TAGGER_LORA_R=2\nTAGGER_LORA_ALPHA=2\nHF_TOKEN=hf_secret\n")
    monkeypatch.setenv("TAGGER_LORA_R", "3")
    settings = environment.load(recipe)
    assert (settings.lora.r, settings.lora.alpha, settings.lora.dropout) == (3, 2, 0.1)
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
    with pytest.raises(InvalidInputError, match="nor a file; expected"):
        environment.load(tmp_path / "absent.env")


SECRET = b"hf_s3cretOfTheOwner"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"TAGGER_LORA_R 16\n", "line 1 is not NAME=value (it begins with TAGGER_LORA_R)"),
        (b"# fine\nTAGGER_LORA_R='16\n", "line 2 is not NAME=value (it begins with TAGGER_LORA_R)"),
        (b"TAGGER_LORA_R\n", "line 1 is not NAME=value; fix"),
        (b"HF_TOKEN: %b\n", "line 1 is not NAME=value (it begins with HF_TOKEN)"),
        (b"\n\nexport HF_TOKEN %b\n", "line 3 is not NAME=value (it begins with export)"),
        (b"HF_HOME=/x\r\n%b\r\n", "line 2 is not NAME=value; fix"),
        (b"%b: my token\n", "line 1 is not NAME=value; fix"),
        (b"AKIA0EXAMPLE %b\n", "line 1 is not NAME=value; fix"),
        (b"HF_TOKEN='%b\n", "line 1 is not NAME=value (it begins with HF_TOKEN)"),
        (b"TAGGER_LORA_R='16\nHF_TOKEN=%b\nTAGGER_LORA_ALPHA='\n", "line 1 (it begins with TAGGER_LORA_R): a quote"),
        (b'TAGGER_LORA_R="\n16\nHF_TOKEN: %b\n"\n', "line 1 (it begins with TAGGER_LORA_R): a quote opens here"),
        (b"HF_HOME=/x\nHF_TOKEN=\0%b\n", "line 2 has a NUL character"),
        (b"HF_HOME=/x\nHF_TOKEN=%b\xff\n", "cannot be read as lines of NAME=value: line 2 is not UTF-8"),
        (b"\xff\xfeT\x00", "cannot be read as lines of NAME=value: line 1 is not UTF-8"),
        (b"#" * 2**21, "has more than 1048576 bytes"),
    ],
)
@pytest.mark.parametrize("name", [".env", "bad.env"])
def test_a_line_that_is_not_understood_is_named_without_its_value(content: bytes, message: str, name: str) -> None:
    Path(name).write_bytes(content.replace(b"%b", SECRET))
    recipe = None if name == ".env" else name
    for read in (environment.load, environment.third_party_variables, environment.explicit_values):
        with pytest.raises(InvalidInputError) as refusal:
            read(recipe)
        assert f"{name} {message}" in str(refusal.value)
        assert SECRET.decode() not in str(refusal.value) + repr(refusal.value.__cause__)
        assert "AKIA" not in str(refusal.value)


def test_a_value_over_several_lines_is_read(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text('TAGGER_SAMPLE_PROMPTS=\'[\n "a text",\n "another: text"\n]\'\nTAGGER_LORA_R=2\n')
    settings = environment.load()
    assert (settings.sample.prompts, settings.lora.r) == (("a text", "another: text"), 2)


@pytest.mark.parametrize("value", ["${HF_TOKEN}", "for ${AWS_SECRET_ACCESS_KEY}"])
def test_a_recipe_cannot_put_a_secret_into_a_setting(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, SECRET.decode())
    Path("theirs.env").write_text(f"TAGGER_HUB_COMMIT_MESSAGE={value}\n")
    with pytest.raises(InvalidInputError, match="TAGGER_HUB_COMMIT_MESSAGE contains the value of a secret variable"):
        environment.load("theirs.env")


def test_a_secret_of_the_same_file_cannot_be_put_into_a_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "")
    Path(".env").write_text(f"HF_TOKEN={SECRET.decode()}\nTAGGER_HUB_COMMIT_MESSAGE=by ${{HF_TOKEN}}\n")
    with pytest.raises(InvalidInputError, match="TAGGER_HUB_COMMIT_MESSAGE contains the value of a secret variable"):
        environment.load()


def test_only_the_first_line_of_an_invalid_value_is_shown() -> None:
    Path(".env").write_text("TAGGER_LORA_R='16\nmy password is pear\n'\n")
    with pytest.raises(InvalidInputError) as refusal:
        environment.load()
    assert refusal.value.problems == ("TAGGER_LORA_R=16... (in .env): expected a whole number.",)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("TAGGER_LORA_R", SECRET.decode()),
        ("TAGGER_HUB_REPO", "https://me:s3cretOfTheOwner@hub.example/a/b"),
        ("TAGGER_EVAL_GATE", "s3://key:s3cretOfTheOwner@bucket/x"),
    ],
)
def test_an_invalid_value_is_shown_without_its_secrets(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(InvalidInputError, match=rf"{name}=.*\*\*\*") as refusal:
        environment.load()
    assert "s3cretOfTheOwner" not in str(refusal.value)


@pytest.mark.parametrize(("old", "new"), environment.RENAMED.items())
def test_a_former_name_is_refused_with_the_new_one(monkeypatch: pytest.MonkeyPatch, old: str, new: str) -> None:
    monkeypatch.setenv(old, "1")
    with pytest.raises(InvalidInputError) as refusal:
        environment.load()
    assert refusal.value.problems == (f"{old} is now called {new}; rename it.",)
    assert new.split()[0] in {name for name, _, _ in iter_fields()}


@pytest.mark.parametrize(("old", "new"), [("list", "greedy"), ("likely", "marginal")])
def test_a_former_value_is_refused_with_the_new_one(monkeypatch: pytest.MonkeyPatch, old: str, new: str) -> None:
    Path(".env").write_text(f"TAGGER_SAMPLE_DECODING={old}\n")
    with pytest.raises(InvalidInputError) as refusal:
        environment.load()
    [problem] = refusal.value.problems
    assert problem.startswith(f"TAGGER_SAMPLE_DECODING={old} (in .env): expected 'greedy', 'marginal', 'head', ")
    assert problem.endswith(f"{old} is now called {new}; set TAGGER_SAMPLE_DECODING={new}.")
    monkeypatch.setenv("TAGGER_SAMPLE_DECODING", new)
    assert environment.load().sample.decoding == new


def test_a_value_that_is_not_utf8_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAGGER_RUN_ID", "half a pair \udcff")
    with pytest.raises(InvalidInputError, match="TAGGER_RUN_ID: expected text in UTF-8"):
        environment.load()


def test_another_machine_gets_the_explicit_values_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    recipe = tmp_path / "some.env"
    recipe.write_text("TAGGER_LORA_R=4\nTAGGER_LORA_ALPHA=8\nHF_HOME=/elsewhere\n")
    monkeypatch.setenv("TAGGER_RECIPE", str(recipe))
    monkeypatch.setenv("TAGGER_RUN_DIR", "here")
    monkeypatch.setenv("TAGGER_LORA_R", "2")
    values = environment.explicit_values()
    assert values == {"TAGGER_LORA_R": "2", "TAGGER_LORA_ALPHA": "8"}
    monkeypatch.delenv("TAGGER_RECIPE")
    monkeypatch.setenv("TAGGER_TRAIN_SEED", "7")
    environment.replace_environment(values)
    settings = environment.load()
    assert (settings.lora.r, settings.lora.alpha, settings.train.seed) == (2, 8, 42)
    assert settings.run.dir == Path("here")
