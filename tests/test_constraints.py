"""Whatever the logits, an answer is a list of distinct, known tags, tokenized as the tokenizer does."""

from __future__ import annotations

import ast
import copy
from collections.abc import Sequence

import pytest
import tiny_tokenizers
import torch
from tokenizers import AddedToken, normalizers
from transformers import PreTrainedTokenizerFast

from job.dataset.tokenization import AnswerTokenizer
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
SEPARATOR = " ->: "


@pytest.fixture(params=["bloom", "llama", *tiny_tokenizers.KINDS])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    if request.param in tiny_tokenizers.KINDS:
        return tiny_tokenizers.build(request.param)
    found: PreTrainedTokenizerFast = request.getfixturevalue(f"{request.param}_tokenizer")
    return found


def closed(tokenizer: PreTrainedTokenizerFast, tags: Sequence[str], max_tags: int = MAX_TAGS) -> ClosedVocabulary:
    return ClosedVocabulary(AnswerTokenizer(tokenizer, SEPARATOR), tags, max_tags)


def opened(tokenizer: PreTrainedTokenizerFast, max_tags: int = MAX_TAGS) -> OpenVocabulary:
    return OpenVocabulary(AnswerTokenizer(tokenizer, SEPARATOR), max_tags)


def generate(state: DecoderState, logits: Sequence[torch.Tensor]) -> list[int]:
    ids = []
    for row in logits:
        ids.append(state.step(row, float(row.logsumexp(0))))
        if state.closed:
            break
    return ids


def random_logits(tokenizer: PreTrainedTokenizerFast, seed: int, steps: int = 60) -> list[torch.Tensor]:
    """Random logits, which on some seeds favour commas, brackets, repetition or the end of sequence."""
    draw = torch.Generator().manual_seed(seed)
    logits = [torch.randn(len(tokenizer), generator=draw) * 4 for _ in range(steps)]
    texts = [tokenizer(text, add_special_tokens=False).input_ids for text in ("', '", "love']")]
    favoured = [[], *texts, [tokenizer.eos_token_id]][seed % 4]
    for row in logits:
        row[favoured] += 8
    return logits * (1 if seed % 3 else 2)


@pytest.mark.parametrize("separator", [" ->: ", "\n### Tags:\n"])
def test_a_closed_vocabulary_allows_distinct_known_tags_only(
    tokenizer: PreTrainedTokenizerFast, separator: str
) -> None:
    answers = AnswerTokenizer(tokenizer, separator)
    vocabulary = ClosedVocabulary(answers, TAGS, MAX_TAGS)
    for seed in range(16):
        state = vocabulary.new_state()
        ids = generate(state, random_logits(tokenizer, seed, 200))
        tags = [tag for tag, _ in state.tags]
        assert state.closed
        assert 1 <= len(set(tags)) == len(tags) <= MAX_TAGS
        assert set(tags) <= set(TAGS)
        [text], [expected] = answers.decode([ids]), answers.encode([tags])
        if ids[-1] == tokenizer.eos_token_id:
            assert answers.decode([ids[:-1]])[0].strip().startswith(f"{str(tags)[:-1]},"), "ended by a repeated tag"
        elif len(tags) < MAX_TAGS:
            assert ids == expected
        else:
            assert text.strip()[:-1] == str(tags)[:-1]


def test_an_open_vocabulary_allows_parsable_distinct_tags_only(tokenizer: PreTrainedTokenizerFast) -> None:
    vocabulary = opened(tokenizer)
    by_bracket = 0
    for seed in range(32):
        state = vocabulary.new_state()
        ids = generate(state, random_logits(tokenizer, seed))
        tags = [tag for tag, _ in state.tags]
        assert len(set(tags)) == len(tags) <= MAX_TAGS
        assert all(tags)
        [text] = vocabulary.decode([[i for i in ids if i != tokenizer.eos_token_id]])
        assert vocabulary.pattern.fullmatch(text, partial=True)
        if vocabulary.pattern.fullmatch(text):
            by_bracket += 1
            assert [tag.strip() for tag in ast.literal_eval(text.strip())] == tags
    assert by_bracket > 2


def test_a_repeated_tag_ends_the_list(llama_tokenizer: PreTrainedTokenizerFast) -> None:
    ids = llama_tokenizer(" ['life', 'love', 'life', 'lovely']", add_special_tokens=False).input_ids
    logits = [torch.full((len(llama_tokenizer),), -3.0).index_fill_(0, torch.tensor([i]), 6.0) for i in ids]
    for vocabulary in (
        closed(llama_tokenizer, TAGS),
        opened(llama_tokenizer),
    ):
        state = vocabulary.new_state()
        assert generate(state, logits)[-1] == llama_tokenizer.eos_token_id
        assert [tag for tag, _ in state.tags] == ["life", "love"]
        assert state.closed


def test_max_tags_ends_the_list(llama_tokenizer: PreTrainedTokenizerFast) -> None:
    ids = llama_tokenizer(" ['life', 'love', 'lovely', 'été']", add_special_tokens=False).input_ids
    logits = [torch.full((len(llama_tokenizer),), -3.0).index_fill_(0, torch.tensor([i]), 6.0) for i in ids]
    for vocabulary in (closed(llama_tokenizer, TAGS, 2), opened(llama_tokenizer, 2)):
        state = vocabulary.new_state()
        generate(state, logits)
        assert [tag for tag, _ in state.tags] == ["life", "love"]
        assert state.closed


@pytest.mark.parametrize(
    "tags",
    [
        ["life"],
        ["love", "love-story"],
        ["don't", "a, b"],
        ['so "called"', "été", "日本"],
        ["]", "x\\y"],
        ["both ' and \""],
    ],
)
def test_the_tokens_of_any_list_are_allowed(tokenizer: PreTrainedTokenizerFast, tags: list[str]) -> None:
    [ids] = AnswerTokenizer(tokenizer, SEPARATOR).encode([tags])
    logits = [torch.full((len(tokenizer),), -3.0).index_fill_(0, torch.tensor([i]), 6.0) for i in ids]
    for vocabulary in (closed(tokenizer, TAGS), opened(tokenizer)):
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
        closed(llama_tokenizer, TAGS),
        opened(llama_tokenizer),
    ):
        state = vocabulary.new_state()
        generate(state, logits)
        [(_, confidence)] = state.tags
        assert one ** len(ids) <= confidence <= one ** (len(ids) - 1) * (one + len(closing) * (1 - one))


def test_tags_with_the_same_tokens_count_as_the_first(llama_tokenizer: PreTrainedTokenizerFast) -> None:
    llama_tokenizer = copy.deepcopy(llama_tokenizer)
    llama_tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    vocabulary = closed(llama_tokenizer, ["cafe\u0301", "caf\u00e9", "life"])
    assert vocabulary.root.tags == {"cafe\u0301", "life"}
    for seed in range(8):
        state = vocabulary.new_state()
        generate(state, random_logits(llama_tokenizer, seed))
        assert state.closed


@pytest.mark.parametrize("kind", ["closed", "open"])
def test_each_answer_of_a_batch_has_its_own_state(llama_tokenizer: PreTrainedTokenizerFast, kind: str) -> None:
    vocabulary = closed(llama_tokenizer, TAGS) if kind == "closed" else opened(llama_tokenizer)
    states = [vocabulary.new_state(), vocabulary.new_state()]
    steps = [
        torch.stack(rows)
        for rows in zip(random_logits(llama_tokenizer, 1), random_logits(llama_tokenizer, 2), strict=True)
    ]
    ids: list[list[int]] = [[], []]
    for logits in steps:
        for row, i in zip(ids, constrain(states, logits).argmax(1).tolist(), strict=True):
            row.append(i)
    for seed, row, state in zip((1, 2), ids, states, strict=True):
        single = vocabulary.new_state()
        alone = generate(single, random_logits(llama_tokenizer, seed))
        assert state.tags == single.tags, "tags and confidences"
        assert row[: len(alone)] == alone
        assert set(row[len(alone) :]) == {llama_tokenizer.eos_token_id}


def logits_for(tokenizer: PreTrainedTokenizerFast, *tokens: Sequence[str]) -> list[torch.Tensor]:
    """Return logits of steps that prefer these tokens, the first one most."""
    rows = []
    for preferred in tokens:
        row = torch.full((len(tokenizer),), -3.0)
        for n, i in enumerate(tokenizer.convert_tokens_to_ids(list(preferred))):
            row[i] = 9.0 - n
        rows.append(row)
    return rows


def test_a_byte_that_would_change_what_was_written_is_not_allowed() -> None:
    tokenizer = tiny_tokenizers.build("byte_fallback")
    byte = "<0x{:02X}>".format
    e_acute, nihon = [[byte(value)] for value in "é".encode()], [[byte(value)] for value in "日本".encode()]
    opening, closing = [["▁['"]], [["'"], ["]"]]
    for bad in ("<0xFF>", "<0xA9>", "<0xC0>"):  # bytes that start no character
        steps = logits_for(tokenizer, *opening, *e_acute, [bad, "t"], *closing)
        state = opened(tokenizer).new_state()
        generate(state, steps)
        assert [tag for tag, _ in state.tags] == ["ét"], bad
    for bad in ("'", "t", "<0x41>", "<0xE2>"):  # an incomplete character is completed first
        steps = logits_for(tokenizer, *opening, *e_acute, *nihon[:2], [bad, *nihon[2]], *nihon[3:], *closing)
        state = opened(tokenizer).new_state()
        generate(state, steps)
        assert [tag for tag, _ in state.tags] == ["é日本"], bad


def test_a_tag_does_not_start_with_white_space_written_in_bytes() -> None:
    tokenizer = tiny_tokenizers.build("byte_fallback")
    first, second, third = (f"<0x{value:02X}>" for value in "\u3000".encode())
    state = opened(tokenizer).new_state()
    steps = logits_for(tokenizer, ["▁['"], [first], [second], [third, "<0x81>"], ["'"], ["]"])
    generate(state, steps)
    assert [tag for tag, _ in state.tags] == ["\u3001"]


def test_an_escape_sequence_is_completed_and_decoded(llama_tokenizer: PreTrainedTokenizerFast) -> None:
    vocabulary = opened(llama_tokenizer)
    allowed = {
        text: {
            token
            for token in ("'", "\\", "x", "u", "n", "q", "2", "a", "d", "l")
            if vocabulary.allowed(f" ['life{text}")[llama_tokenizer.convert_tokens_to_ids(token)]
        }
        for text in ("\\", "\\x2", "\\u", "\\ud", "\\\\", "\\'")
    }
    assert allowed == {
        "\\": {"'", "\\", "x", "u", "n"},
        "\\x2": {"2", "a", "d"},
        "\\u": {"2", "a", "d"},
        "\\ud": {"2"},  # no surrogates
        "\\\\": {"'", "\\", "x", "u", "n", "q", "2", "a", "d", "l"},
        "\\'": {"'", "\\", "x", "u", "n", "q", "2", "a", "d", "l"},
    }
    for tag in ("soft\u00adhyphen", "👨\u200d👩\u200d👧", "a\\'\"b", "می\u200cخواهم"):
        [ids] = AnswerTokenizer(llama_tokenizer, SEPARATOR).encode([[tag]])
        state = vocabulary.new_state()
        rows = [torch.full((len(llama_tokenizer),), -3.0).index_fill_(0, torch.tensor([i]), 6.0) for i in ids]
        assert generate(state, rows) == ids
        assert [written for written, _ in state.tags] == [tag]


def test_special_tokens_are_never_part_of_a_tag() -> None:
    tokenizer = copy.deepcopy(tiny_tokenizers.build("byte_level"))
    tokenizer.add_tokens(AddedToken("<|reserved|>", special=True), special_tokens=True)
    assert tokenizer.convert_tokens_to_ids("<|reserved|>") not in tokenizer.all_special_ids
    state = opened(tokenizer).new_state()
    generate(state, logits_for(tokenizer, ["Ġ['"], ["<|reserved|>", "a"], ["'"], ["]"]))
    assert [tag for tag, _ in state.tags] == ["a"]
