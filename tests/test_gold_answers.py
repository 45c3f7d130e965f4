"""Before training, a tokenizer that cannot write the answers of the training examples is refused in one sentence."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import tiny_tokenizers
from conftest import make_llama, make_settings
from tiny_tokenizers import HARD_EXAMPLES

from job import preflight
from job.decoding.gold_answers import tokenizer_problems
from job.errors import InvalidInputError
from job.settings import Settings
from job.types import Example

ACCENTS = [Example("cased", ("Life", "life is")), Example("accented", ("naïve", "x"))]


def vocabulary(kind: str | None, tmp_path: Path, separator: str = " ->: ") -> Settings:
    return make_settings(
        Path("tiny"), tmp_path, sample={"vocabulary": kind, "max_tags": 3}, data={"separator": separator}
    )


@pytest.mark.parametrize("kind", tiny_tokenizers.KINDS)
@pytest.mark.parametrize("separator", [" ->: ", "\n### Tags:\n", " 🏷:\u3000"])
def test_a_tokenizer_that_writes_all_answers_is_accepted(kind: str, separator: str, tmp_path: Path) -> None:
    for choice in (None, "seen"):
        settings = vocabulary(choice, tmp_path, separator)
        assert tokenizer_problems(tiny_tokenizers.build(kind), HARD_EXAMPLES, settings) == []


@pytest.mark.parametrize(
    ("kind", "written"),
    [
        ("lower_case", "the answer ['Life', 'life is'] as ['life', 'life is']"),
        ("nfkc", "the answer ['ﬁnite'] as ['finite']"),
        ("word_piece", "the answer ['Life', 'life is'] as [ ' life ', ' life is ' ]"),
        ("gpt1", "the answer ['Life', 'life is'] as [ ' life ' , ' life is ' ]"),
        ("no_bytes", "the answer ['naïve', 'x'] as ['na<unk>ve', 'x']"),
    ],
)
def test_a_tokenizer_that_changes_answers_needs_a_closed_vocabulary(kind: str, written: str, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizers.build(kind)
    examples = [*ACCENTS, Example("ligature", ("ﬁnite",))] if kind == "nfkc" else ACCENTS
    [problem] = tokenizer_problems(tokenizer, examples, vocabulary(None, tmp_path))
    assert f"the tokenizer of tiny writes {written}" in problem
    assert len(problem) <= 300
    assert re.search(r"set TAGGER_BASE_MODEL to another model, or TAGGER_SAMPLE_VOCABULARY=seen$", problem)
    assert tokenizer_problems(tokenizer, examples, vocabulary("seen", tmp_path)) == []


def test_unicode_normal_forms_of_a_tag_are_the_same_answer(tmp_path: Path) -> None:
    examples = [Example("decomposed", ("cafe\u0301",)), Example("composed", ("été",)), Example("space", ("a\u00a0b",))]
    assert tokenizer_problems(tiny_tokenizers.build("nfkc"), examples, vocabulary(None, tmp_path)) == []


def test_tags_with_the_same_tokens_are_refused(tmp_path: Path) -> None:
    examples = [Example("Rome", ("日本", "life")), Example("Tokyo", ("東京",))]
    for choice in (None, "seen"):
        [problem] = tokenizer_problems(tiny_tokenizers.build("no_bytes"), examples, vocabulary(choice, tmp_path))
        assert "TAGGER_SAMPLE_VOCABULARY" not in problem, "the hint would lead to the next refusal"
    written = "the tags '日本' and '東京' with the same tokens"
    assert problem == f"the tokenizer of tiny writes {written}; set TAGGER_BASE_MODEL to another model"


def test_a_tag_that_is_the_end_of_sequence_is_refused(tmp_path: Path) -> None:
    examples = [Example("one", ("life", "</s>")), Example("two", ("end </s>",))]
    for choice in (None, "seen"):
        [problem] = tokenizer_problems(tiny_tokenizers.build("byte_level"), examples, vocabulary(choice, tmp_path))
        assert "TAGGER_SAMPLE_VOCABULARY" not in problem, "the hint would lead to the next refusal"
    assert "writes the tag '</s>' with its end-of-sequence token" in problem


def test_a_long_answer_is_shown_where_it_changes(tmp_path: Path) -> None:
    examples = [Example("long", (*(f"tag number {n}" for n in range(30)), "Upper " * 40))]
    settings = make_settings(Path("tiny"), tmp_path, sample={"max_tags": 40})
    [problem] = tokenizer_problems(tiny_tokenizers.build("lower_case"), examples, settings)
    assert "'Upper Upper" in problem
    assert "'upper upper" in problem
    assert len(problem) <= 300


def test_rare_characters_are_found_among_many_tags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("job.decoding.gold_answers.MOST_TAGS", 10)
    monkeypatch.setattr("job.decoding.gold_answers.MOST_WALKS", 1)
    examples = [Example(f"text {n}", (f"tag {n}",)) for n in range(100)] + [
        Example("e", ("café",)),
        Example("2", ("x²",)),
    ]
    [problem] = tokenizer_problems(tiny_tokenizers.build("nfkc"), examples, vocabulary(None, tmp_path))
    assert "['x²'] as ['x2']" in problem


def test_check_refuses_the_tokenizer_with_the_other_problems(tmp_path: Path) -> None:
    make_llama(tiny_tokenizers.build("word_piece"), tmp_path / "llama")
    checked = preflight.check(make_settings(tmp_path / "llama", tmp_path))
    with pytest.raises(InvalidInputError, match="the tokenizer of .* writes the answer"):
        preflight.check_machine(checked)
