"""Encode prompts, answers and training examples as token ids and labels."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from job.dataset.prompts import strip_separator, target
from job.errors import InvalidInputError
from job.system.progress import Progress
from job.types import EncodedExample, Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from job.settings import Data, Settings

MIN_TEXTS_TO_CACHE = 10_000
"""The number of texts from which tokenization is cached; fewer are tokenized faster than a cache is read."""

MAX_TAG_ORDERS = 16
"""Orders of shuffled tags that are encoded; later epochs repeat them from the first."""

IGNORE_INDEX = -100
"""The label that torch's cross entropy ignores."""

ANCHOR = "x"
"""Text to put in front of another one, which then does not begin the text that is tokenized or decoded.

Many tokenizers add a space (or a mark for it) to the beginning of a text, and remove one when they decode.
"""
NEUTRAL_CONTEXTS = (ANCHOR, "]", "0", ".", "\n", "\ue000")
"""Contexts to try for a text whose first character the tokenizer merges with the character before it."""


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], settings: Data, *, reserved_tokens: int
) -> list[list[int]]:
    """Return the token ids of the prompt for each text.

    The end of a text is cut off if otherwise fewer than `reserved_tokens` of `max_length` tokens were left for
    the answer. Raises InvalidInputError when no token of a text would be left.
    """
    prefix_ids, separator_ids = special_tokens(tokenizer, settings.separator)
    ids = _tokenize(tokenizer, [strip_separator(text, settings.separator) for text in texts])
    return [
        _prompt_ids(prefix_ids + text_ids, separator_ids, text, settings, reserved_tokens)
        for text, text_ids in zip(texts, ids, strict=True)
    ]


def is_cut(tokenizer: PreTrainedTokenizerBase, text: str, settings: Data, *, reserved_tokens: int) -> bool:
    """Check whether `encode_prompts` cuts off the end of a text."""
    ids = tokenizer(strip_separator(text, settings.separator), add_special_tokens=False, verbose=False).input_ids
    prefix_ids, separator_ids = special_tokens(tokenizer, settings.separator)
    return len(prefix_ids) + len(ids) + len(separator_ids) + reserved_tokens > settings.max_length


def special_tokens(tokenizer: PreTrainedTokenizerBase, separator: str) -> tuple[list[int], list[int]]:
    """Return the token ids before a text (a beginning-of-sequence token, if the tokenizer adds one) and after it.

    The ids after a text are those of the separator. Text, separator and tags are tokenized separately, so that
    no token spans two of them and the prompt at inference is exactly the beginning of the training example.
    """
    with_special, plain = tokenizer(ANCHOR).input_ids, tokenizer(ANCHOR, add_special_tokens=False).input_ids
    starts = [n for n in range(len(with_special)) if with_special[n : n + len(plain)] == plain]
    prefix_ids = with_special[: starts[0]] if starts else []
    [separator_ids] = continuations(tokenizer, ANCHOR, [separator.rstrip()])
    return prefix_ids, separator_ids


def continuations(tokenizer: PreTrainedTokenizerBase, context: str, texts: Sequence[str]) -> list[list[int]]:
    """Return the token ids of each text as the tokenizer writes them after a context.

    Where a token would span the end of the context and the start of the text, another context is tried. A text that
    the tokenizer merges with all of them is tokenized alone.
    """
    found: dict[str, list[int]] = {}
    for before in (context, *NEUTRAL_CONTEXTS):
        missing = [text for text in dict.fromkeys(texts) if text not in found]
        if not missing:
            break
        before_ids = tokenizer(before, add_special_tokens=False).input_ids
        n = len(before_ids)
        for text, ids in zip(missing, _tokenize(tokenizer, [before + text for text in missing]), strict=True):
            if n and ids[:n] == before_ids:
                found[text] = ids[n:]
    alone = [text for text in dict.fromkeys(texts) if text not in found]
    found.update(zip(alone, _tokenize(tokenizer, alone), strict=True))
    return [found[text] for text in texts]


class AnswerTokenizer:
    """The token ids of answers, as the tokenizer writes them after the separator, and the text of such ids.

    Training and every decoder take their tokens from here, so that a model writes the tokens that it was trained on.

    An answer is cut at the space in front of each tag but the first. Each part is tokenized after what stands before
    it, because at the beginning of a text many tokenizers add a space. Tokenizers do not merge beyond the space that
    follows a comma, so the ids are those of the list as a whole. A tokenizer that does merge there is used as if it
    did not.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, separator: str) -> None:
        self.tokenizer = tokenizer
        self.end: int = tokenizer.eos_token_id
        self._white_space = target([], separator).removesuffix("[]")
        self._context = ANCHOR + separator.rstrip()
        self._anchor_ids: list[int] = tokenizer(ANCHOR, add_special_tokens=False).input_ids or [self.end]
        self._anchor = self._decode([self._anchor_ids])[0]

    def encode(self, tag_lists: Sequence[Sequence[str]]) -> list[list[int]]:
        """Return the token ids of each list of tags, without the end of sequence."""
        places = [[(n == 0, n == len(tags) - 1) for n in range(len(tags))] for tags in tag_lists]
        by_place: dict[tuple[bool, bool], dict[str, list[int]]] = {}
        for tags, places_of_tags in zip(tag_lists, places, strict=True):
            for tag, place in zip(tags, places_of_tags, strict=True):
                by_place.setdefault(place, {})[tag] = []
        for (first, last), ids in by_place.items():
            ids.update(zip(ids, self.tag_ids(list(ids), first=first, last=last), strict=True))
        return [
            [i for tag, place in zip(*answer, strict=True) for i in by_place[place][tag]]
            for answer in zip(tag_lists, places, strict=True)
        ]

    def tag_ids(self, tags: Sequence[str], *, first: bool, last: bool) -> list[list[int]]:
        """Return the token ids of each tag in its place: with the bracket or space before it, and the mark after it.

        This is the opening bracket before the first tag, the closing one after the last tag, and else space and comma.
        """
        before, after = f"{self._white_space}[" if first else " ", "]" if last else ","
        context = self._context if first else f"{self._context}{self._white_space}['x',"
        return continuations(self.tokenizer, context, [f"{before}{tag!r}{after}" for tag in tags])

    def decode(self, answers: Sequence[Sequence[int]]) -> list[str]:
        """Return the text of token ids that begin an answer."""
        texts = self._decode([[*self._anchor_ids, *answer] for answer in answers])
        return [text.removeprefix(self._anchor) for text in texts]

    def _decode(self, ids: list[list[int]]) -> list[str]:
        texts: list[str] = self.tokenizer.batch_decode(ids, clean_up_tokenization_spaces=False)
        return texts

    @cached_property
    def opening(self) -> str:
        """The text of an answer up to its bracket, as the tokenizer writes it: some write another white space."""
        [text] = self.decode(self.encode([["x"]]))
        return text.removesuffix("'x']") if text.endswith("['x']") else f"{self._white_space}["

    @cached_property
    def num_ids(self) -> int:
        """The largest token id, plus 1; there are fewer tokens if ids have gaps."""
        return 1 + max(self.tokenizer.get_vocab().values())

    @cached_property
    def byte_values(self) -> dict[int, int]:
        """The token ids that stand for single bytes of a character that has no token (byte fallback), and the bytes."""
        vocabulary = self.tokenizer.get_vocab()
        found = {vocabulary[f"<0x{value:02X}>"]: value for value in range(256) if f"<0x{value:02X}>" in vocabulary}
        upper_case_a = vocabulary.get("<0x41>")
        return found if upper_case_a is not None and self.decode([[upper_case_a]]) == ["A"] else {}


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
    answers = AnswerTokenizer(tokenizer, separator)
    texts = _cached_tokenize(tokenizer, [strip_separator(example.text, separator) for example in examples])
    permutations = []
    progress = Progress("tokenize", len(examples) * _count_orders(examples, settings), "examples")
    for tag_lists in _tag_orders(examples, settings):
        encoded = []
        for example, text_ids, target_ids in zip(examples, texts, answers.encode(tag_lists), strict=True):
            answer_ids = [*target_ids, answers.end]
            reserved = max(len(answer_ids), settings.sample.max_new_tokens)
            prompt_ids = _prompt_ids(prefix_ids + text_ids, separator_ids, example.text, settings.data, reserved)
            ids = prompt_ids + answer_ids
            labels = [IGNORE_INDEX] * len(prompt_ids) + answer_ids if settings.train.completion_only_loss else list(ids)
            encoded.append(EncodedExample(ids, labels))
            progress.add()
        permutations.append(encoded)
    progress.close()
    return [replace(first, permutations=tuple(others)) for first, *others in zip(*permutations, strict=True)]


def _tag_orders(examples: Sequence[Example], settings: Settings) -> Iterator[list[tuple[str, ...]]]:
    """Yield the tags of all examples in the configured order; shuffled tags once for each epoch."""
    if settings.data.tag_order == "given":
        yield [example.tags for example in examples]
    elif settings.data.tag_order == "frequency":
        counts = Counter(tag for example in examples for tag in example.tags)
        yield [tuple(sorted(example.tags, key=lambda tag: -counts[tag])) for example in examples]
    else:
        for order in range(_count_orders(examples, settings)):
            rng = random.Random(f"{settings.train.seed}:{order}")
            yield [tuple(rng.sample(example.tags, len(example.tags))) for example in examples]


def _count_orders(examples: Sequence[Example], settings: Settings) -> int:
    """Return how many orders of the tags are encoded: one for each epoch if they are shuffled."""
    if settings.data.tag_order != "shuffled":
        return 1
    epochs = -(-settings.train.max_steps * settings.train.examples_per_step // max(1, len(examples)))
    return min(epochs, MAX_TAG_ORDERS)


def _tokenize(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Return the token ids of each text."""
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False, verbose=False).input_ids if texts else []
    return ids


def _cached_tokenize(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Return the token ids of each text; for many texts they are cached on disk by `datasets`."""
    if len(texts) < MIN_TEXTS_TO_CACHE or not tokenizer.is_fast:
        return _tokenize(tokenizer, texts)
    import datasets

    progress = Progress("tokenize", len(texts), "texts")

    def tokenize_batch(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        progress.add(len(batch["text"]))
        return {"input_ids": _tokenize(tokenizer, batch["text"])}

    fingerprint = hashlib.sha256(repr((tokenizer.backend_tokenizer.to_str(), texts)).encode()).hexdigest()
    folder = Path(datasets.config.HF_DATASETS_CACHE, "tagger-job")
    dataset = datasets.Dataset.from_dict({"text": texts})
    options: dict[str, Any] = {"batched": True, "remove_columns": "text", "new_fingerprint": fingerprint}
    with progress, _without_bars_of_datasets():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            dataset = dataset.map(tokenize_batch, cache_file_name=str(folder / f"{fingerprint}.arrow"), **options)
        except OSError:  # the cache only saves time: without a writable one, tokenize in memory
            progress.done = 0
            dataset = dataset.map(tokenize_batch, **options)
    input_ids: list[list[int]] = dataset["input_ids"][:]
    return input_ids


@contextmanager
def _without_bars_of_datasets() -> Iterator[None]:
    import datasets

    was_disabled = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not was_disabled:
            datasets.enable_progress_bars()
