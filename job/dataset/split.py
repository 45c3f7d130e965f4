"""Split examples into training, calibration and held-out parts."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import replace

from job.dataset.near_duplicates import near_duplicates
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
    import numpy as np

    size = settings.eval_size
    if size >= len(examples):
        raise InvalidInputError(
            f"TAGGER_DATA_EVAL_SIZE={size:g} holds out everything: the data has {len(examples)} "
            f"examples. Set it below {len(examples)}, or to a fraction such as 0.1"
        )
    hashes = np.array([hash_to_unit_interval(settings.seed, example.text) for example in examples])
    held_out = hashes < size
    if size >= 1:
        held_out = np.zeros(len(examples), bool)
        held_out[np.argsort(hashes, kind="stable")[: int(size)]] = True
    left_out = held_out | near_duplicates([example.text for example in examples], held_out)
    train = [example for example, out in zip(examples, left_out, strict=True) if not out]
    if not held_out.any() or not train:
        raise InvalidInputError(
            f"TAGGER_DATA_EVAL_SIZE={size:g} leaves {held_out.sum()} of {len(examples)} examples for "
            f"evaluation and {len(train)} for training, without near-duplicates; expected some of each. Change it, "
            "or add more data"
        )
    return train, [example for example, held in zip(examples, held_out, strict=True) if held]


def split_from(examples: Sequence[Example], held_out: Sequence[Example]) -> tuple[list[Example], list[Example]]:
    """Leave given held-out texts and their near-duplicates out of the training examples; return both parts.

    Raises InvalidInputError when no training example is left.
    """
    import numpy as np

    texts = [example.text for example in (*examples, *held_out)]
    is_held = np.arange(len(texts)) >= len(examples)
    out = near_duplicates(texts, is_held)
    known = {normalise_text(example.text) for example in held_out}
    train = [e for e, near in zip(examples, out, strict=False) if not near and normalise_text(e.text) not in known]
    if not train:
        raise InvalidInputError(
            "TAGGER_DATA_EVAL_DATASET and TAGGER_DATA_EVAL_SPLIT hold all texts of the training data, or "
            "near-duplicates of them; expected other texts"
        )
    return train, list(held_out)


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


def cross_validation_folds(
    examples: Sequence[Example], folds: int, seed: int
) -> list[tuple[list[Example], list[Example]]]:
    """Divide examples into folds; return for each fold the examples to train on and the fold's own, to score.

    Each example is in exactly one fold, by a seeded hash of its text. The examples of other folds that are
    near-duplicates of one in the fold are not trained on.
    """
    import numpy as np

    texts = [example.text for example in examples]
    fold_of = np.array([int(folds * hash_to_unit_interval(seed, text)) for text in texts])
    found = []
    for fold in range(folds):
        own = fold_of == fold
        out = own | near_duplicates(texts, own) if own.any() else own
        train = [example for example, left_out in zip(examples, out, strict=True) if not left_out]
        found.append((train, [example for example, held in zip(examples, own, strict=True) if held]))
    return found


def split_digest(held_out: Sequence[Example | Prediction]) -> str:
    """Return the SHA-256 of the texts in any order; evaluations with the same digest used the same split."""
    return hashlib.sha256(json.dumps(sorted(example.text for example in held_out)).encode()).hexdigest()


def hash_to_unit_interval(seed: int, text: str) -> float:
    """Hash a text to a number in [0, 1), regardless of case and punctuation."""
    digest = hashlib.sha256(f"{seed}:{normalise_text(text)}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def normalise_text(text: str) -> str:
    """Return the words of a text in lower case, separated by single spaces; the text itself if it has none."""
    return " ".join(re.findall(r"\w+", text.casefold())) or text.strip()
