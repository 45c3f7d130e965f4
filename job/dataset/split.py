"""Split examples into training, calibration and held-out parts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from job.errors import InvalidInputError
from job.settings import Data
from job.types import Example, Prediction, SplitData

if TYPE_CHECKING:
    pass
from job.dataset.near_duplicates import _normalise, near_duplicate_groups


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


def split_digest(held_out: Sequence[Example | Prediction]) -> str:
    """SHA-256 over the texts, in any order: two evaluations with the same one were on the same split."""
    return hashlib.sha256(json.dumps(sorted(example.text for example in held_out)).encode()).hexdigest()


def hash_to_unit_interval(seed: int, text: str) -> float:
    digest = hashlib.sha256(f"{seed}:{_normalise(text)}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
