"""Check, before training, that the tokenizer can write the answers of the training examples."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from itertools import islice
from typing import TYPE_CHECKING

import torch

from job.dataset.prompts import target
from job.dataset.tags import normalise_tag
from job.dataset.tokenization import AnswerTokenizer
from job.decoding.config import DecodingConfig, initial_config
from job.decoding.constraints import ClosedVocabulary, DecoderState, OpenVocabulary, unquote
from job.settings import Settings
from job.types import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MOST_TAGS = 10_000
"""The most frequent tags, all of which are written; of the others, only those with further characters."""
MOST_WALKS = 4
"""Answers of each kind that are decoded token by token."""
ADVICE = "set TAGGER_BASE_MODEL to another model"
SHOWN = 60
"""Characters of an answer in a message."""


def tokenizer_problems(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], settings: Settings
) -> list[str]:
    """Return why the decoder cannot give the answers of these examples; an empty list if it can.

    A tokenizer may change what it writes (lower case, spaces around punctuation, characters that it does not know).
    An open vocabulary then never answers with such a tag. A closed one does, unless two tags become the same.
    """
    answers = AnswerTokenizer(tokenizer, settings.data.separator)
    config = initial_config(settings.sample, examples)
    if config.vocabulary == "closed":
        problem = _closed_problem(answers, config, examples)
        return [] if problem is None else [f"the tokenizer of {settings.base.model} {problem}; {ADVICE}"]
    problem = _open_problem(answers, config, examples)
    if problem is None:
        return []
    closed_works = _closed_problem(answers, config, examples) is None
    hint = ", or TAGGER_SAMPLE_VOCABULARY=seen" if closed_works else ""
    return [f"the tokenizer of {settings.base.model} {problem}; {ADVICE}{hint}"]


def _open_problem(answers: AnswerTokenizer, config: DecodingConfig, examples: Sequence[Example]) -> str | None:
    vocabulary = OpenVocabulary(answers, config.max_tags)
    lists = _telling_answers([example.tags[: config.max_tags] for example in examples])
    written = [*lists, *([tag] for tag in _telling_tags(config.tags))]
    for tags, text in zip(written, answers.decode(answers.encode(written)), strict=True):
        spans = vocabulary.tag_spans(text)
        if spans is None or not _same([unquote(text[start:end]) for start, end in spans], tags):
            return _difference(tags, text)
    return _walk(vocabulary.new_state, answers, lists)


def _closed_problem(answers: AnswerTokenizer, config: DecodingConfig, examples: Sequence[Example]) -> str | None:
    vocabulary = ClosedVocabulary(answers, config.tags, config.max_tags)
    for tag, other in vocabulary.same_tokens.items():
        if normalise_tag(tag) != normalise_tag(other):
            return f"writes the tags {other[:SHOWN]!r} and {tag[:SHOWN]!r} with the same tokens"
    for tag, ids in vocabulary.separator_ids[vocabulary.root].items():
        if vocabulary.end in ids:
            return f"writes the tag {tag[:SHOWN]!r} with its end-of-sequence token"
    known = set(config.tags)
    tag_lists = [[vocabulary.same_tokens.get(tag, tag) for tag in e.tags if tag in known] for e in examples]
    distinct = [list(dict.fromkeys(tags))[: config.max_tags] for tags in tag_lists if tags]
    return _walk(vocabulary.new_state, answers, _telling_answers(distinct))


def _telling_answers(tag_lists: Sequence[Sequence[str]]) -> list[Sequence[str]]:
    """Return the longest answer, the one with the most tags, and some of each kind that a tokenizer may change."""
    kinds: tuple[Callable[[str], bool], ...] = (
        lambda answer: "'" in answer,
        lambda answer: '"' in answer,
        lambda answer: "\\" in answer,
        lambda answer: not answer.isascii(),
        lambda answer: answer != answer.lower(),
    )
    found: list[Sequence[str]] = []
    if tag_lists:
        found += [max(tag_lists, key=lambda tags: len(target(tags, ""))), max(tag_lists, key=len)]
    for kind in kinds:
        found += islice((tags for tags in tag_lists if any(map(kind, tags))), MOST_WALKS)
    return list({tuple(tags): tags for tags in found}.values())


def _telling_tags(tags: Sequence[str]) -> list[str]:
    """Return the most frequent tags, and others that have further characters."""
    found, characters = list(tags[:MOST_TAGS]), set("".join(tags[:MOST_TAGS]))
    for tag in tags[MOST_TAGS:]:
        if not characters.issuperset(tag):
            characters.update(tag)
            found.append(tag)
    return found


def _walk(new_state: Callable[[], DecoderState], answers: AnswerTokenizer, lists: list[Sequence[str]]) -> str | None:
    """Decode answers as if the model gave all probability to their tokens; return what came out differently."""
    for tags, ids in zip(lists, answers.encode(lists), strict=True):
        state = new_state()
        logits = torch.empty(answers.num_ids)
        for i in ids:
            logits.fill_(-torch.inf)[i] = 0.0
            if state.closed or state.step(logits, 0.0) != i:
                break
        if not _same([tag for tag, _ in state.tags], tags):
            return _difference(tags, str([tag for tag, _ in state.tags]))
    return None


def _same(written: Sequence[str], tags: Sequence[str]) -> bool:
    """Return whether tags are the same text, apart from its Unicode normal form and the kind of its white space."""
    return [_canonical(tag) for tag in written] == [_canonical(tag) for tag in tags]


def _canonical(tag: str) -> str:
    return " ".join(unicodedata.normalize("NFC", tag).split())


def _difference(tags: Sequence[str], text: str) -> str:
    expected, written = str(list(tags)), text.strip()
    pairs = enumerate(zip(expected, written, strict=False))
    first = next((n for n, (a, b) in pairs if a != b), min(len(expected), len(written)))
    start = max(0, first - SHOWN // 2)
    before = "..." if start else ""
    shown = [before + part[start : start + SHOWN] for part in (expected, written)]
    return f"writes the answer {shown[0]} as {shown[1]}"
