"""Token ids and labels of prompts and training examples."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from job.errors import InvalidInputError
from job.settings import Data, Settings
from job.types import EncodedExample, Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
from job.dataset.prompts import strip_separator, target

MIN_TEXTS_TO_CACHE = 10_000
"""Texts; fewer are tokenized in the time that the cache takes."""

MAX_TAG_ORDERS = 16
"""Of shuffled tags; further epochs begin with the first again."""

IGNORE_INDEX = -100
"""The label that torch's cross entropy leaves out."""


def encode_prompt(tokenizer: PreTrainedTokenizerBase, text: str, settings: Data, *, reserved_tokens: int) -> list[int]:
    """Token ids of the prompt, the text's end cut off where `reserved_tokens` tokens would not fit.

    Raises InvalidInputError when not one token of the text would be left.
    """
    text_ids = tokenizer(strip_separator(text, settings.separator), add_special_tokens=False, verbose=False).input_ids
    beginning, mark_ids = special_tokens(tokenizer, settings.separator)
    return _prompt_ids(beginning + text_ids, mark_ids, text, settings, reserved_tokens)


def special_tokens(tokenizer: PreTrainedTokenizerBase, separator: str) -> tuple[list[int], list[int]]:
    """Ids of what stands before a text (the tokenizer's own first token, if it has one) and after it (the mark).

    Texts are tokenized apart from them, and from the tags, so that the prompt at sampling is the
    beginning of the training example whatever the tokenizer would merge.
    """
    beginning = [i for i in tokenizer("").input_ids if i != tokenizer.eos_token_id]
    return beginning, tokenizer(separator.rstrip(), add_special_tokens=False).input_ids


def _prompt_ids(text_ids: list[int], mark_ids: list[int], text: str, settings: Data, reserved_tokens: int) -> list[int]:
    room = settings.max_length - len(mark_ids) - reserved_tokens
    if room < 1:
        raise InvalidInputError(
            f"TAGGER_DATA_MAX_LENGTH={settings.max_length} leaves no room for the text {text[:60]!r}: separator and "
            f"tags take {len(mark_ids) + reserved_tokens} tokens; raise it, or shorten the tags"
        )
    return text_ids[:room] + mark_ids


def encode(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], settings: Settings) -> list[EncodedExample]:
    """Token ids and labels of `text separator tags end-of-sequence` for each example.

    A text too long for `max_length` is cut so that its tags fit, or the longest answer sampling
    may give if that is more: sampling, which does not know the tags, cuts it at the same place.
    Raises InvalidInputError when an example's tags leave no room for its text.
    """
    separator = settings.data.separator
    beginning, mark_ids = special_tokens(tokenizer, separator)
    texts = _tokenized(tokenizer, [strip_separator(example.text, separator) for example in examples])
    orders = []
    for answers in _ordered(examples, settings):
        targets = _tokenized(tokenizer, [target(tags, separator) for tags in answers])
        encoded = []
        for example, text_ids, target_ids in zip(examples, texts, targets, strict=True):
            answer_ids = [*target_ids, tokenizer.eos_token_id]
            room = max(len(answer_ids), settings.sample.max_new_tokens)
            prompt_ids = _prompt_ids(beginning + text_ids, mark_ids, example.text, settings.data, room)
            ids = prompt_ids + answer_ids
            labels = ids if not settings.train.completion_only_loss else [IGNORE_INDEX] * len(prompt_ids) + answer_ids
            encoded.append(EncodedExample(ids, list(labels)))
        orders.append(encoded)
    return [replace(first, permutations=tuple(others)) for first, *others in zip(*orders, strict=True)]


def _ordered(examples: Sequence[Example], settings: Settings) -> Iterator[list[tuple[str, ...]]]:
    """The tags of all examples, in the order that is asked for; of shuffled ones as many orders as are needed."""
    if settings.data.tag_order == "given":
        yield [example.tags for example in examples]
    elif settings.data.tag_order == "frequency":
        counts = Counter(tag for example in examples for tag in example.tags)
        yield [tuple(sorted(example.tags, key=lambda tag: -counts[tag])) for example in examples]
    else:
        train = settings.train
        epochs = -(-train.max_steps * train.batch_size * train.gradient_accumulation_steps // max(1, len(examples)))
        for order in range(min(epochs, MAX_TAG_ORDERS)):
            draw = random.Random(f"{train.seed}:{order}")
            yield [tuple(draw.sample(example.tags, len(example.tags))) for example in examples]


def _tokenized(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Ids of each text; many texts are tokenized once, and then read from the cache of `datasets`."""

    def ids(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        return {"input_ids": tokenizer(batch["text"], add_special_tokens=False, verbose=False).input_ids}

    if len(texts) < MIN_TEXTS_TO_CACHE:
        return ids({"text": texts})["input_ids"] if texts else []
    import datasets

    identity = hashlib.sha256(repr((tokenizer.backend_tokenizer.to_str(), texts)).encode()).hexdigest()
    folder = Path(datasets.config.HF_DATASETS_CACHE, "tagger-job")
    rows = datasets.Dataset.from_dict({"text": texts})
    arguments: dict[str, Any] = {"batched": True, "remove_columns": "text", "new_fingerprint": identity}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        rows = rows.map(ids, cache_file_name=str(folder / f"{identity}.arrow"), **arguments)
    except OSError:  # a cache that cannot be written is none
        rows = rows.map(ids, **arguments)
    found: list[list[int]] = rows["input_ids"][:]
    return found
