"""Whatever the logits, an answer is a list of distinct, known tags, tokenized as the tokenizer does."""

from __future__ import annotations

import ast
import copy
from collections.abc import Sequence

import pytest
import torch
from tokenizers import normalizers
from transformers import PreTrainedTokenizerFast

from job.decoding.constraints import ClosedVocabulary, DecoderState, OpenVocabulary, constrain

TAGS = (
    "life",
    "love",
    "love-story",
    "lovely",
    "don't",
    'so "called"',
    "both ' and \"",
    "a, b",
    "été",
    "日本",
    "7",
    "]",
    "x\\y",
)
MAX_TAGS = 4


@pytest.fixture(params=["bloom", "llama"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    found: PreTrainedTokenizerFast = request.getfixturevalue(f"{request.param}_tokenizer")
    return found


def generate(state: DecoderState, logits: Sequence[torch.Tensor]) -> list[int]:
    ids = []
    for row in logits:
        ids.append(state.step(row, row.logsumexp(0)))
        if state.closed:
            break
    return ids


def random_logits(tokenizer: PreTrainedTokenizerFast, seed: int, steps: int = 60) -> list[torch.Tensor]:
    """Random logits, which on some seeds favour commas, brackets, repetition or the end of sequence."""
    draw = torch.Generator().manual_seed(seed)
    logits = [torch.randn(len(tokenizer), generator=draw) * 4 for _ in range(steps)]
    favoured = [[], tokenizer("', '").input_ids, tokenizer("love']").input_ids, [tokenizer.eos_token_id]][seed % 4]
    for row in logits:
        row[favoured] += 8
    return logits * (1 if seed % 3 else 2)


@pytest.mark.parametrize("prefix", [" ", ""])
def test_a_closed_vocabulary_allows_distinct_known_tags_only(tokenizer: PreTrainedTokenizerFast, prefix: str) -> None:
    vocabulary = ClosedVocabulary(tokenizer, TAGS, prefix, MAX_TAGS)
    for seed in range(60):
        state = vocabulary.new_state()
        ids = generate(state, random_logits(tokenizer, seed, 200))
        tags = [tag for tag, _ in state.tags]
        assert state.closed
        assert 1 <= len(set(tags)) == len(tags) <= MAX_TAGS
        assert set(tags) <= set(TAGS)
        if ids[-1] == tokenizer.eos_token_id:
            assert tokenizer.decode(ids[:-1]).startswith(f"{prefix}{str(tags)[:-1]},"), "ended by a repeated tag"
        elif len(tags) < MAX_TAGS:
            assert ids == tokenizer(f"{prefix}{tags}", add_special_tokens=False).input_ids
        else:
            assert tokenizer.decode(ids)[:-1] == f"{prefix}{tags}"[:-1]


def test_an_open_vocabulary_allows_parsable_distinct_tags_only(tokenizer: PreTrainedTokenizerFast) -> None:
    vocabulary = OpenVocabulary(tokenizer, " ", MAX_TAGS)
    by_bracket = 0
    for seed in range(60):
        state = vocabulary.new_state()
        ids = generate(state, random_logits(tokenizer, seed))
        tags = [tag for tag, _ in state.tags]
        assert len(set(tags)) == len(tags) <= MAX_TAGS
        assert all(tags)
        text = tokenizer.decode(ids, skip_special_tokens=True)
        assert vocabulary.pattern.fullmatch(text, partial=True)
        if vocabulary.pattern.fullmatch(text):
            by_bracket += 1
            assert [tag.strip() for tag in ast.literal_eval(text.strip())] == tags
    assert by_bracket > 5


def test_a_repeated_tag_ends_the_list(llama_tokenizer: PreTrainedTokenizerFast) -> None:
    ids = llama_tokenizer(" ['life', 'love', 'life', 'lovely']", add_special_tokens=False).input_ids
    logits = [torch.full((len(llama_tokenizer),), -3.0).index_fill_(0, torch.tensor([i]), 6.0) for i in ids]
    for vocabulary in (
        ClosedVocabulary(llama_tokenizer, TAGS, " ", MAX_TAGS),
        OpenVocabulary(llama_tokenizer, " ", MAX_TAGS),
    ):
        state = vocabulary.new_state()
        assert generate(state, logits)[-1] == llama_tokenizer.eos_token_id
        assert [tag for tag, _ in state.tags] == ["life", "love"]
        assert state.closed


def test_max_tags_ends_the_list(llama_tokenizer: PreTrainedTokenizerFast) -> None:
    ids = llama_tokenizer(" ['life', 'love', 'lovely', 'été']", add_special_tokens=False).input_ids
    logits = [torch.full((len(llama_tokenizer),), -3.0).index_fill_(0, torch.tensor([i]), 6.0) for i in ids]
    for vocabulary in (ClosedVocabulary(llama_tokenizer, TAGS, " ", 2), OpenVocabulary(llama_tokenizer, " ", 2)):
        state = vocabulary.new_state()
        generate(state, logits)
        assert [tag for tag, _ in state.tags] == ["life", "love"]
        assert state.closed


@pytest.mark.parametrize(
    "tags", [["life"], ["love", "love-story"], ["don't", "a, b"], ['so "called"', "été", "日本"], ["]"]]
)
def test_the_tokens_of_any_list_are_allowed(tokenizer: PreTrainedTokenizerFast, tags: list[str]) -> None:
    ids = tokenizer(f" {tags}", add_special_tokens=False).input_ids
    logits = [torch.full((len(tokenizer),), -3.0).index_fill_(0, torch.tensor([i]), 6.0) for i in ids]
    for vocabulary in (ClosedVocabulary(tokenizer, TAGS, " ", MAX_TAGS), OpenVocabulary(tokenizer, " ", MAX_TAGS)):
        state = vocabulary.new_state()
        assert generate(state, logits) == ids
        assert [tag for tag, _ in state.tags] == tags
        assert state.closed


def test_confidence_is_the_probability_of_the_tag_s_tokens(llama_tokenizer: PreTrainedTokenizerFast) -> None:
    tags = ["love"]
    ids = llama_tokenizer(f" {tags}", add_special_tokens=False).input_ids
    logits = [torch.zeros(len(llama_tokenizer)).index_fill_(0, torch.tensor([i]), 5.0) for i in ids]
    one = float(logits[0].softmax(0)[ids[0]])
    closing = {
        i for text in ("']", "',") for i in llama_tokenizer(f" ['love{text}", add_special_tokens=False).input_ids
    }
    for vocabulary in (
        ClosedVocabulary(llama_tokenizer, TAGS, " ", MAX_TAGS),
        OpenVocabulary(llama_tokenizer, " ", MAX_TAGS),
    ):
        state = vocabulary.new_state()
        generate(state, logits)
        [(_, confidence)] = state.tags
        assert one ** len(ids) <= confidence <= one ** (len(ids) - 1) * (one + len(closing) * (1 - one))


def test_tags_with_the_same_tokens_count_as_the_first(llama_tokenizer: PreTrainedTokenizerFast) -> None:
    llama_tokenizer = copy.deepcopy(llama_tokenizer)
    llama_tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    vocabulary = ClosedVocabulary(llama_tokenizer, ["cafe\u0301", "caf\u00e9", "life"], " ", MAX_TAGS)
    assert vocabulary.root.tags == {"cafe\u0301", "life"}
    for seed in range(8):
        state = vocabulary.new_state()
        generate(state, random_logits(llama_tokenizer, seed))
        assert state.closed


def test_each_answer_of_a_batch_has_its_own_state(llama_tokenizer: PreTrainedTokenizerFast) -> None:
    vocabulary = ClosedVocabulary(llama_tokenizer, TAGS, " ", MAX_TAGS)
    states = [vocabulary.new_state(), vocabulary.new_state()]
    steps = [
        torch.stack(rows)
        for rows in zip(random_logits(llama_tokenizer, 1), random_logits(llama_tokenizer, 2), strict=True)
    ]
    ids: list[list[int]] = [[], []]
    for logits in steps:
        for row, i in zip(ids, constrain(states, logits).argmax(1).tolist(), strict=True):
            row.append(i)
    for seed, row in zip((1, 2), ids, strict=True):
        alone = generate(vocabulary.new_state(), random_logits(llama_tokenizer, seed))
        assert row[: len(alone)] == alone
        assert set(row[len(alone) :]) == {llama_tokenizer.eos_token_id}
