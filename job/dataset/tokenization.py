"""Encode prompts and training examples as token ids and labels."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from job.dataset.prompts import strip_separator, target
from job.errors import InvalidInputError
from job.settings import Data, Settings
from job.types import EncodedExample, Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MIN_TEXTS_TO_CACHE = 10_000
"""The number of texts from which tokenization is cached; fewer are tokenized faster than a cache is read."""

MAX_TAG_ORDERS = 16
"""Orders of shuffled tags that are encoded; later epochs repeat them from the first."""

IGNORE_INDEX = -100
"""The label that torch's cross entropy ignores."""


def encode_prompt(tokenizer: PreTrainedTokenizerBase, text: str, settings: Data, *, reserved_tokens: int) -> list[int]:
    """Return the token ids of the prompt for a text.

    The end of the text is cut off if otherwise fewer than `reserved_tokens` of `max_length` tokens were left for
    the answer. Raises InvalidInputError when no token of the text would be left.
    """
    text_ids = tokenizer(strip_separator(text, settings.separator), add_special_tokens=False, verbose=False).input_ids
    prefix_ids, separator_ids = special_tokens(tokenizer, settings.separator)
    return _prompt_ids(prefix_ids + text_ids, separator_ids, text, settings, reserved_tokens)


def special_tokens(tokenizer: PreTrainedTokenizerBase, separator: str) -> tuple[list[int], list[int]]:
    """Return the token ids before a text (a beginning-of-sequence token, if the tokenizer adds one) and after it.

    The ids after a text are those of the separator. Text, separator and tags are tokenized separately, so that
    no token spans two of them and the prompt at inference is exactly the beginning of the training example.
    """
    prefix_ids = [i for i in tokenizer("").input_ids if i != tokenizer.eos_token_id]
    return prefix_ids, tokenizer(separator.rstrip(), add_special_tokens=False).input_ids


def _prompt_ids(
    text_ids: list[int], separator_ids: list[int], text: str, settings: Data, reserved_tokens: int
) -> list[int]:
    token_budget = settings.max_length - len(separator_ids) - reserved_tokens
    if token_budget < 1:
        raise InvalidInputError(
            f"TAGGER_DATA_MAX_LENGTH={settings.max_length} leaves no room for the text {text[:60]!r}: separator and "
            f"tags take {len(separator_ids) + reserved_tokens} tokens; raise it, or shorten the tags"
        )
    return text_ids[:token_budget] + separator_ids


def encode(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], settings: Settings) -> list[EncodedExample]:
    """Encode each example as the token ids and labels of `text separator tags end-of-sequence`.

    A text that is too long for `max_length` is cut, so that its tags fit, or the longest answer at inference if
    that is longer: inference does not know the tags, and has to cut the text at the same place.
    Raises InvalidInputError when the tags of an example leave no room for its text.
    """
    separator = settings.data.separator
    prefix_ids, separator_ids = special_tokens(tokenizer, separator)
    texts = _tokenize(tokenizer, [strip_separator(example.text, separator) for example in examples])
    permutations = []
    for tag_lists in _tag_orders(examples, settings):
        targets = _tokenize(tokenizer, [target(tags, separator) for tags in tag_lists])
        encoded = []
        for example, text_ids, target_ids in zip(examples, texts, targets, strict=True):
            answer_ids = [*target_ids, tokenizer.eos_token_id]
            reserved = max(len(answer_ids), settings.sample.max_new_tokens)
            prompt_ids = _prompt_ids(prefix_ids + text_ids, separator_ids, example.text, settings.data, reserved)
            ids = prompt_ids + answer_ids
            labels = [IGNORE_INDEX] * len(prompt_ids) + answer_ids if settings.train.completion_only_loss else list(ids)
            encoded.append(EncodedExample(ids, labels))
        permutations.append(encoded)
    return [replace(first, permutations=tuple(others)) for first, *others in zip(*permutations, strict=True)]


def _tag_orders(examples: Sequence[Example], settings: Settings) -> Iterator[list[tuple[str, ...]]]:
    """Yield the tags of all examples in the configured order; shuffled tags once for each epoch."""
    if settings.data.tag_order == "given":
        yield [example.tags for example in examples]
    elif settings.data.tag_order == "frequency":
        counts = Counter(tag for example in examples for tag in example.tags)
        yield [tuple(sorted(example.tags, key=lambda tag: -counts[tag])) for example in examples]
    else:
        train = settings.train
        epochs = -(-train.max_steps * train.batch_size * train.gradient_accumulation_steps // max(1, len(examples)))
        for order in range(min(epochs, MAX_TAG_ORDERS)):
            rng = random.Random(f"{train.seed}:{order}")
            yield [tuple(rng.sample(example.tags, len(example.tags))) for example in examples]


def _tokenize(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Return the token ids of each text; for many texts they are cached on disk by `datasets`."""

    def tokenize_batch(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        return {"input_ids": tokenizer(batch["text"], add_special_tokens=False, verbose=False).input_ids}

    if len(texts) < MIN_TEXTS_TO_CACHE:
        return tokenize_batch({"text": texts})["input_ids"] if texts else []
    import datasets

    fingerprint = hashlib.sha256(repr((tokenizer.backend_tokenizer.to_str(), texts)).encode()).hexdigest()
    folder = Path(datasets.config.HF_DATASETS_CACHE, "tagger-job")
    dataset = datasets.Dataset.from_dict({"text": texts})
    options: dict[str, Any] = {"batched": True, "remove_columns": "text", "new_fingerprint": fingerprint}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        dataset = dataset.map(tokenize_batch, cache_file_name=str(folder / f"{fingerprint}.arrow"), **options)
    except OSError:  # the cache only saves time: without a writable one, tokenize in memory
        dataset = dataset.map(tokenize_batch, **options)
    input_ids: list[list[int]] = dataset["input_ids"][:]
    return input_ids
