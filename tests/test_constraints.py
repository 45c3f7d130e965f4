"""Whatever the logits, an answer is a list of tags: none twice, none unknown, exactly as the tokenizer writes it."""

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
MOST = 4


@pytest.fixture(params=["bloom", "llama"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    found: PreTrainedTokenizerFast = request.getfixturevalue(f"{request.param}_tokenizer")
    return found


def written(walk: DecoderState, logits: Sequence[torch.Tensor]) -> list[int]:
    ids = []
    for row in logits:
        ids.append(walk.step(row, row.logsumexp(0)))
        if walk.closed:
            break
    return ids


def any_logits(tokenizer: PreTrainedTokenizerFast, seed: int, steps: int = 60) -> list[torch.Tensor]:
    """Random ones, on some seeds drawn to commas, brackets, repetition or the end of sequence."""
    draw = torch.Generator().manual_seed(seed)
    logits = [torch.randn(len(tokenizer), generator=draw) * 4 for _ in range(steps)]
    favoured = [[], tokenizer("', '").input_ids, tokenizer("love']").input_ids, [tokenizer.eos_token_id]][seed % 4]
    for row in logits:
        row[favoured] += 8
    return logits * (1 if seed % 3 else 2)


@pytest.mark.parametrize("space", [" ", ""])
def test_whatever_the_logits_only_known_tags_are_written_and_none_twice(
    tokenizer: PreTrainedTokenizerFast, space: str
) -> None:
    grammar = ClosedVocabulary(tokenizer, TAGS, space, MOST)
    for seed in range(60):
        walk = grammar.new_state()
        ids = written(walk, any_logits(tokenizer, seed, 200))
        tags = [tag for tag, _ in walk.tags]
        assert walk.closed
        assert 1 <= len(set(tags)) == len(tags) <= MOST
        assert set(tags) <= set(TAGS)
        if ids[-1] == tokenizer.eos_token_id:
            assert tokenizer.decode(ids[:-1]).startswith(f"{space}{str(tags)[:-1]},"), "ended by a tag that came again"
        elif len(tags) < MOST:
            assert ids == tokenizer(f"{space}{tags}", add_special_tokens=False).input_ids
        else:
            assert tokenizer.decode(ids)[:-1] == f"{space}{tags}"[:-1]


def test_whatever_the_logits_an_open_list_parses_and_holds_no_tag_twice(tokenizer: PreTrainedTokenizerFast) -> None:
    grammar = OpenVocabulary(tokenizer, " ", MOST)
    by_bracket = 0
    for seed in range(60):
        walk = grammar.new_state()
        ids = written(walk, any_logits(tokenizer, seed))
        tags = [tag for tag, _ in walk.tags]
        assert len(set(tags)) == len(tags) <= MOST
        assert all(tags)
        text = tokenizer.decode(ids, skip_special_tokens=True)
        assert grammar.list.fullmatch(text, partial=True)
        if grammar.list.fullmatch(text):
            by_bracket += 1
            assert [tag.strip() for tag in ast.literal_eval(text.strip())] == tags
    assert by_bracket > 5


def test_a_tag_that_would_come_again_ends_the_list(llama_tokenizer: PreTrainedTokenizerFast) -> None:
    ids = llama_tokenizer(" ['life', 'love', 'life', 'lovely']", add_special_tokens=False).input_ids
    logits = [torch.full((len(llama_tokenizer),), -3.0).index_fill_(0, torch.tensor([i]), 6.0) for i in ids]
    for grammar in (ClosedVocabulary(llama_tokenizer, TAGS, " ", MOST), OpenVocabulary(llama_tokenizer, " ", MOST)):
        walk = grammar.new_state()
        assert written(walk, logits)[-1] == llama_tokenizer.eos_token_id
        assert [tag for tag, _ in walk.tags] == ["life", "love"]
        assert walk.closed


def test_a_list_ends_with_the_most_tags_it_may_have(llama_tokenizer: PreTrainedTokenizerFast) -> None:
    ids = llama_tokenizer(" ['life', 'love', 'lovely', 'été']", add_special_tokens=False).input_ids
    logits = [torch.full((len(llama_tokenizer),), -3.0).index_fill_(0, torch.tensor([i]), 6.0) for i in ids]
    for grammar in (ClosedVocabulary(llama_tokenizer, TAGS, " ", 2), OpenVocabulary(llama_tokenizer, " ", 2)):
        walk = grammar.new_state()
        written(walk, logits)
        assert [tag for tag, _ in walk.tags] == ["life", "love"]
        assert walk.closed


@pytest.mark.parametrize(
    "tags", [["life"], ["love", "love-story"], ["don't", "a, b"], ['so "called"', "été", "日本"], ["]"]]
)
def test_each_list_can_be_written(tokenizer: PreTrainedTokenizerFast, tags: list[str]) -> None:
    ids = tokenizer(f" {tags}", add_special_tokens=False).input_ids
    logits = [torch.full((len(tokenizer),), -3.0).index_fill_(0, torch.tensor([i]), 6.0) for i in ids]
    for grammar in (ClosedVocabulary(tokenizer, TAGS, " ", MOST), OpenVocabulary(tokenizer, " ", MOST)):
        walk = grammar.new_state()
        assert written(walk, logits) == ids
        assert [tag for tag, _ in walk.tags] == tags
        assert walk.closed


def test_a_tag_is_as_confident_as_its_tokens_are_likely(llama_tokenizer: PreTrainedTokenizerFast) -> None:
    tags = ["love"]
    ids = llama_tokenizer(f" {tags}", add_special_tokens=False).input_ids
    logits = [torch.zeros(len(llama_tokenizer)).index_fill_(0, torch.tensor([i]), 5.0) for i in ids]
    one = float(logits[0].softmax(0)[ids[0]])
    closing = {
        i for text in ("']", "',") for i in llama_tokenizer(f" ['love{text}", add_special_tokens=False).input_ids
    }
    for grammar in (ClosedVocabulary(llama_tokenizer, TAGS, " ", MOST), OpenVocabulary(llama_tokenizer, " ", MOST)):
        walk = grammar.new_state()
        written(walk, logits)
        [(_, confidence)] = walk.tags
        assert one ** len(ids) <= confidence <= one ** (len(ids) - 1) * (one + len(closing) * (1 - one))


def test_of_tags_that_are_written_alike_one_is_known(llama_tokenizer: PreTrainedTokenizerFast) -> None:
    llama_tokenizer = copy.deepcopy(llama_tokenizer)
    llama_tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    grammar = ClosedVocabulary(llama_tokenizer, ["cafe\u0301", "caf\u00e9", "life"], " ", MOST)
    assert grammar.first.tags == {"cafe\u0301", "life"}
    for seed in range(8):
        walk = grammar.new_state()
        written(walk, any_logits(llama_tokenizer, seed))
        assert walk.closed


def test_each_answer_of_a_batch_goes_its_own_way(llama_tokenizer: PreTrainedTokenizerFast) -> None:
    grammar = ClosedVocabulary(llama_tokenizer, TAGS, " ", MOST)
    walks = [grammar.new_state(), grammar.new_state()]
    steps = [
        torch.stack(rows) for rows in zip(any_logits(llama_tokenizer, 1), any_logits(llama_tokenizer, 2), strict=True)
    ]
    ids: list[list[int]] = [[], []]
    for logits in steps:
        for row, i in zip(ids, constrain(walks, logits).argmax(1).tolist(), strict=True):
            row.append(i)
    for seed, row in zip((1, 2), ids, strict=True):
        alone = written(grammar.new_state(), any_logits(llama_tokenizer, seed))
        assert row[: len(alone)] == alone
        assert set(row[len(alone) :]) == {llama_tokenizer.eos_token_id}
