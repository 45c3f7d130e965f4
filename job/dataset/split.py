"""Split examples into training, calibration and held-out parts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace

from job.dataset.near_duplicates import near_duplicate_groups, normalise_text
from job.errors import InvalidInputError
from job.settings import Data
from job.types import Example, Prediction, SplitData


def split(examples: Sequence[Example], settings: Data) -> tuple[list[Example], list[Example]]:
    """Split examples into training and held-out ones, both in the order of the data set.

    An `eval_size` below 1 is a fraction: it holds out each text whose seeded hash, as a number between 0
    and 1, is below the fraction. The side of a text then depends on the text alone, so that new data never
    moves it. An `eval_size` of 1 or more is a number of examples: those with the smallest hashes are held
    out, and new data may displace them. Examples that are not held out but are near-duplicates of a
    held-out one are in neither part. Raises InvalidInputError when a part would be empty.
    """
    if settings.eval_size >= len(examples):
        raise InvalidInputError(
            f"TAGGER_DATA_EVAL_SIZE={settings.eval_size:g} holds out everything: the data has {len(examples)} "
            f"examples. Set it below {len(examples)}, or to a fraction such as 0.1"
        )
    held_out = _held_out_indices(examples, settings)
    groups = near_duplicate_groups([example.text for example in examples])
    leaking_groups = {groups[i] for i in held_out}
    train = [example for example, group in zip(examples, groups, strict=True) if group not in leaking_groups]
    if not held_out or not train:
        raise InvalidInputError(
            f"TAGGER_DATA_EVAL_SIZE={settings.eval_size:g} leaves {len(held_out)} of {len(examples)} examples for "
            f"evaluation and {len(train)} for training, without near-duplicates; expected some of each. Change it, "
            "or add more data"
        )
    return train, [example for i, example in enumerate(examples) if i in held_out]


def _held_out_indices(examples: Sequence[Example], settings: Data) -> set[int]:
    hashes = [hash_to_unit_interval(settings.seed, example.text) for example in examples]
    if settings.eval_size < 1:
        return {i for i, value in enumerate(hashes) if value < settings.eval_size}
    return set(sorted(range(len(examples)), key=lambda i: hashes[i])[: int(settings.eval_size)])


def split_calibration(examples: SplitData, settings: Data) -> SplitData:
    """Move some training examples to `calibration`, where the threshold is chosen.

    Raises InvalidInputError when `calibration_size` leaves nothing to train on.
    """
    # another seed: with the same one, a fraction would hold out texts whose hash is small, and none of those is left
    apart = settings.model_copy(update={"eval_size": settings.calibration_size, "seed": settings.seed + 1})
    try:
        train, calibration = split(examples.train, apart)
    except InvalidInputError as refusal:
        message = str(refusal).replace("TAGGER_DATA_EVAL_SIZE", "TAGGER_DATA_CALIBRATION_SIZE")
        raise InvalidInputError(message.replace("for evaluation", "for TAGGER_SAMPLE_THRESHOLD=auto")) from None
    return replace(examples, train=tuple(train), calibration=tuple(calibration))


def split_digest(held_out: Sequence[Example | Prediction]) -> str:
    """Return the SHA-256 of the texts in any order; evaluations with the same digest used the same split."""
    return hashlib.sha256(json.dumps(sorted(example.text for example in held_out)).encode()).hexdigest()


def hash_to_unit_interval(seed: int, text: str) -> float:
    """Hash a text to a number in [0, 1), regardless of case and punctuation."""
    digest = hashlib.sha256(f"{seed}:{normalise_text(text)}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
