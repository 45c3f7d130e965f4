"""Examples: read, clean, split, and render them as token ids."""

from __future__ import annotations

import ast
import csv
import hashlib
import json
import random
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from job.evaluate import normalise_tag
from job.hub import client as hub
from job.settings import Data, Sample, Settings, is_unicode
from job.system.paths import DATA_SUFFIXES, is_local, local_path
from job.types import EncodedExample, Example, InvalidInputError, Prediction, SplitData

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NEAR_DUPLICATE_OVERLAP = 0.6
"""Two texts are near-duplicates when they share this part of the shorter one's 5-grams."""
MIN_TEXTS_TO_CACHE = 10_000
"""Texts; fewer are tokenized in the time that the cache takes."""
MAX_TAG_ORDERS = 16
"""Of shuffled tags; further epochs begin with the first again."""
IGNORE_INDEX = -100
"""The label that torch's cross entropy leaves out."""


def load(settings: Data) -> SplitData:
    """Read the data set, leave out rows without text or tags, hold examples out.

    Raises InvalidInputError when it cannot be read, lacks a column, or has too few usable rows.
    """
    rows = _rows(settings)
    examples: list[Example] = []
    skipped = 0
    for row in rows:
        example = _example(row, settings)
        if example is None:
            skipped += 1
        else:
            examples.append(example)
        if len(examples) == settings.limit:
            break
    if not examples and not skipped:
        raise InvalidInputError(f"{settings.dataset} has no rows; expected at least two examples")
    if skipped > len(examples):
        raise InvalidInputError(
            f"{settings.dataset}: {skipped} of {skipped + len(examples)} rows have no usable text in "
            f"{settings.text_column!r} or no tags in {settings.tags_column!r}; expected most rows to have both. "
            "Set TAGGER_DATA_TEXT_COLUMN and TAGGER_DATA_TAGS_COLUMN, or repair the data"
        )
    train, held_out = split(examples, settings)
    digest = hashlib.sha256(json.dumps([[(e.text, e.tags) for e in part] for part in (train, held_out)]).encode())
    near_duplicates = len(examples) - len(train) - len(held_out)
    return SplitData(tuple(train), tuple(held_out), skipped, digest.hexdigest(), near_duplicates=near_duplicates)


def _rows(settings: Data) -> Iterator[dict[str, Any]]:
    """The data set's rows. Columns are checked before the first one is handed out."""
    if not is_local(settings.dataset, DATA_SUFFIXES):
        rows = _hub_rows(settings)
    else:
        path = local_path(settings.dataset, "TAGGER_DATA_DATASET")
        readers = {".jsonl": _jsonl_rows, ".csv": _csv_rows, ".parquet": _parquet_rows}
        if path.suffix.lower() not in readers or not path.is_file():
            raise InvalidInputError(f"{path} is not a data file; expected one that ends in {', '.join(DATA_SUFFIXES)}")
        try:
            rows = readers[path.suffix.lower()](path)
        except UnicodeDecodeError as error:
            raise InvalidInputError(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
        except OSError as error:
            raise InvalidInputError(
                f"{path} cannot be read: {error.strerror or error}; expected a readable file"
            ) from error
    columns = list(dict.fromkeys(column for row in rows for column in row))
    for variable, column in (("TEXT", settings.text_column), ("TAGS", settings.tags_column)):
        if rows and column not in columns:
            raise InvalidInputError(
                f"{settings.dataset} has no column {column!r}; it has {', '.join(map(str, columns))}. "
                f"Set TAGGER_DATA_{variable}_COLUMN"
            )
    return iter(rows)


def _jsonl_rows(path: Path) -> list[dict[str, Any]]:
    rows = []
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise InvalidInputError(
                    f"{path} line {number} is not JSON ({error}); expected one object a line. Repair or remove the line"
                ) from error
            if not isinstance(row, dict):
                raise InvalidInputError(
                    f"{path} line {number} is a JSON {type(row).__name__}; expected an object such as "
                    '{"quote": "...", "tags": ["..."]}'
                )
            rows.append(row)
    return rows


def _csv_rows(path: Path) -> list[dict[str, Any]]:
    csv.field_size_limit(2**31 - 1)  # a long text is no mistake
    with path.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.reader(lines, strict=True)
        try:
            columns = next(reader, [])
            if len(set(columns)) < len(columns):
                raise InvalidInputError(f"{path} names a column twice: {', '.join(columns)}; give each its own name")
            rows = []
            for row in reader:
                if row and len(row) != len(columns):
                    raise InvalidInputError(
                        f"{path} line {reader.line_num} has {len(row)} fields and the first line {len(columns)}; "
                        "put quotes around a field that holds a comma"
                    )
                rows += [dict(zip(columns, row, strict=True))] if row else []
        except csv.Error as error:
            raise InvalidInputError(f"{path} line {reader.line_num} is not CSV ({error}); repair the line") from error
    return rows


def _parquet_rows(path: Path) -> list[dict[str, Any]]:
    import pyarrow
    from pyarrow import parquet

    try:
        rows: list[dict[str, Any]] = parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, ValueError) as error:
        raise InvalidInputError(f"{path} is not Parquet ({error}); write it again") from error
    return rows


def _hub_rows(settings: Data) -> list[dict[str, Any]]:
    import datasets
    from huggingface_hub.errors import HfHubHTTPError

    try:
        loaded = datasets.load_dataset(
            settings.dataset, split=settings.split, revision=settings.revision, token=hub.token() or False
        )
    except (OSError, ValueError, HfHubHTTPError, datasets.exceptions.DatasetsError) as error:
        at = f" at revision {settings.revision}" if settings.revision else ""
        raise InvalidInputError(
            f"data set {settings.dataset}{at}, split {settings.split}, cannot be read from the Hub: {error} "
            "Check TAGGER_DATA_DATASET, _REVISION and _SPLIT, the network, and that HF_TOKEN may read it"
        ) from error
    rows: list[dict[str, Any]] = loaded.to_list()
    return rows


def _example(row: dict[str, Any], settings: Data) -> Example | None:
    text = row.get(settings.text_column)
    tags = parse_tags_value(row.get(settings.tags_column))
    if not isinstance(text, str) or not text.strip() or not tags or not all(map(is_unicode, (text, *tags))):
        return None
    return Example(text.strip(), tags)


def parse_tags_value(value: object) -> tuple[str, ...]:
    """The tags in a column's value, in order, each once.

    Takes a list, a Python or JSON list in a string, or comma-separated words; anything else has no tags.
    """
    if isinstance(value, str):
        value = parse_list(value) or value.strip().removeprefix("[").removesuffix("]").split(",")
    if not isinstance(value, (list, tuple)):
        return ()
    texts = (str(tag).strip() for tag in value if isinstance(tag, (str, int, float)))
    return tuple(dict.fromkeys(tag for tag in texts if tag))


def parse_list(text: str) -> list[Any] | None:
    """The list that a text is, in Python's or JSON's notation; None when it is none."""
    for parse in (json.loads, ast.literal_eval):
        try:
            with warnings.catch_warnings(action="ignore"):  # a stray backslash
                value = parse(text.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if isinstance(value, (list, tuple)):
            return list(value)
    return None


def split(examples: Sequence[Example], settings: Data) -> tuple[list[Example], list[Example]]:
    """Training and held-out examples, both in the data's order.

    Each text has a seeded hash. A share holds out the texts whose hash, read as a number between 0
    and 1, falls below it: which side a text is on depends on nothing but the text, so that new data
    never moves it. A number takes that many texts by their hash: new data may displace one. Neither
    side gets what is near-duplicate to a held-out text and is not held out itself.
    """
    size = settings.eval_size
    if size >= len(examples):
        raise InvalidInputError(
            f"TAGGER_DATA_EVAL_SIZE={size:g} holds out everything: the data has {len(examples)} examples. "
            f"Set it below {len(examples)}, or to a share such as 0.1"
        )
    positions = [hash_to_unit_interval(settings.seed, example.text) for example in examples]
    by_position = sorted(range(len(examples)), key=lambda i: positions[i])
    held_out = set(by_position[: int(size)]) if size >= 1 else {i for i in by_position if positions[i] < size}
    groups = near_duplicate_groups([example.text for example in examples])
    beside = {groups[i] for i in held_out}
    train = [example for example, group in zip(examples, groups, strict=True) if group not in beside]
    if not held_out or not train:
        raise InvalidInputError(
            f"TAGGER_DATA_EVAL_SIZE={size:g} leaves {len(held_out)} of {len(examples)} examples for evaluation and "
            f"{len(train)} for training, near-duplicates left out; expected some of each. Change it, or bring more data"
        )
    return train, [example for i, example in enumerate(examples) if i in held_out]


def split_calibration(examples: SplitData, settings: Data) -> SplitData:
    """The same, with some of the training examples set aside to choose the threshold with."""
    apart = settings.model_copy(update={"eval_size": settings.calibration_size, "seed": settings.seed + 1})
    try:
        train, calibration = split(examples.train, apart)
    except InvalidInputError as refusal:
        text = str(refusal).replace("TAGGER_DATA_EVAL_SIZE", "TAGGER_DATA_CALIBRATION_SIZE")
        raise InvalidInputError(text.replace("for evaluation", "for TAGGER_SAMPLE_THRESHOLD=auto")) from None
    return replace(examples, train=tuple(train), calibration=tuple(calibration))


def drop_rare_tags(examples: Sequence[Example], least: int) -> list[Example]:
    """The examples without the tags that fewer than `least` of them have, where that leaves a tag.

    Spellings that are compared as one tag count as one. Raises InvalidInputError when all tags are rare.
    """
    counts = Counter(tag for example in examples for tag in set(map(normalise_tag, example.tags)))
    most = max(counts.values(), default=0)
    if most < least:
        raise InvalidInputError(
            f"TAGGER_DATA_MIN_TAG_COUNT={least} makes every tag rare: the most frequent one is on {most} of "
            f"{len(examples)} training examples; lower it"
        )
    return drop_tags(examples, lambda tag: counts[normalise_tag(tag)] < least)


def drop_tags(examples: Sequence[Example], unwanted: Callable[[str], bool]) -> list[Example]:
    """The examples without such tags; one that has no others keeps them."""
    left = [tuple(tag for tag in example.tags if not unwanted(tag)) for example in examples]
    return [replace(example, tags=tags or example.tags) for example, tags in zip(examples, left, strict=True)]


def split_digest(held_out: Sequence[Example | Prediction]) -> str:
    """SHA-256 over the texts, in any order: two evaluations with the same one were on the same split."""
    return hashlib.sha256(json.dumps(sorted(example.text for example in held_out)).encode()).hexdigest()


def _normalise(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.casefold()))


def hash_to_unit_interval(seed: int, text: str) -> float:
    digest = hashlib.sha256(f"{seed}:{_normalise(text)}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def near_duplicate_groups(texts: Sequence[str]) -> list[int]:
    """A group number for each text: equal for near-duplicates, and for near-duplicates of those.

    Two texts are near-duplicates when, without case and punctuation, they are equal or share
    SHARED_GRAMS of the shorter one's character 5-grams; 5-grams that are all over the data do
    not count.
    """
    import numpy as np
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components
    from sklearn.feature_extraction.text import CountVectorizer

    normalised = [_normalise(text) for text in texts]
    first: dict[str, int] = {}
    pairs = [(first.setdefault(text, i), i) for i, text in enumerate(normalised)]
    if any(len(text) >= 5 for text in normalised):
        # of small data a quarter, so that a template which all texts are made from does not make them alike
        common = max(3, min(len(texts) // 4, max(50, len(texts) // 20)))
        grams = CountVectorizer(analyzer="char", ngram_range=(5, 5), lowercase=False, binary=True, dtype=np.float32)
        everything = grams.fit_transform(normalised).tocsr()
        present = everything[:, np.asarray(everything.sum(axis=0)).ravel() <= common]
        sizes = np.asarray(present.sum(axis=1)).ravel()
        pairs += _long_duplicates(everything, sizes)
        for start in range(0, len(texts), 500):  # a block at a time: all pairs at once need too much memory
            shared = (present[start : start + 500] @ present.T).tocoo()
            rows, columns = shared.row + start, shared.col
            smaller = np.minimum(sizes[rows], sizes[columns])
            near = (rows < columns) & (smaller >= 8) & (shared.data >= NEAR_DUPLICATE_OVERLAP * smaller)
            pairs += zip(rows[near].tolist(), columns[near].tolist(), strict=True)
    left, right = zip(*pairs, strict=True)
    graph = coo_array((np.ones(len(pairs)), (left, right)), shape=(len(texts), len(texts)))
    groups: list[int] = connected_components(graph, directed=False)[1].tolist()
    return groups


def _long_duplicates(everything: Any, kept: Any) -> list[tuple[int, int]]:
    """Pairs of long texts that are alike to 9 parts in 10, made mostly of 5-grams that are all over the data.

    Those are the many copies of one text; the first of them stands for all in the pairs.
    """
    import numpy as np

    sizes = np.asarray(everything.sum(axis=1)).ravel()
    common = np.flatnonzero((sizes >= 60) & (kept < 0.5 * sizes))
    pairs = []
    left = common
    while left.size:
        shared = np.asarray((everything[left] @ everything[left[:1]].T).todense()).ravel()
        near = shared >= 0.9 * np.minimum(sizes[left], sizes[left[0]])
        pairs += [(int(left[0]), int(other)) for other in left[near]]
        left = left[~near]
    return pairs


def prompt(text: str, separator: str) -> str:
    """What the model is asked: the text and the separator's mark, for example `a text ->:`.

    The white space after the mark belongs to the answer, because byte-level tokenizers put a
    space into the same token as the bracket that follows it.
    """
    return strip_separator(text, separator) + separator.rstrip()


def strip_separator(text: str, separator: str) -> str:
    """The text without white space around it, and without the mark, should it be there already."""
    return text.strip().removesuffix(separator.strip()).rstrip()


def target(tags: Iterable[str], separator: str) -> str:
    """What the model is to answer after `prompt`, for example ` ['life', 'love']`."""
    return separator[len(separator.rstrip()) :] + str(list(tags))


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


def inference_texts(settings: Sample) -> list[str]:
    """The prompts and the lines of the input file; raises InvalidInputError when that cannot be read."""
    texts = list(settings.prompts)
    if settings.input is not None:
        try:
            lines = settings.input.read_text(encoding="utf-8-sig").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidInputError(
                f"TAGGER_SAMPLE_INPUT={settings.input} cannot be read ({error}); "
                "expected a UTF-8 file with one text a line"
            ) from error
        texts += [line.strip() for line in lines if line.strip()]
    return texts
