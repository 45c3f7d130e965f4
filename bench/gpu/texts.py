"""A small tokenizer and texts of the lengths of quotes, made from the data that ships with the project."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SAYINGS = Path(__file__).parents[2] / "job" / "dataset" / "sayings.jsonl"
SEPARATOR = " ->: "


def sayings() -> list[dict[str, Any]]:
    """Return the rows of the data set that ships with the project: `quote` and `tags`."""
    return [json.loads(line) for line in SAYINGS.read_text(encoding="utf-8").splitlines()]


def quotes(count: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """Return rows that are as long as quotes (about 45 tokens in the median): one to five sayings, with their tags."""
    rng, rows = random.Random(seed), sayings()
    found = []
    for _ in range(count):
        chosen = rng.sample(rows, min(5, max(1, round(rng.lognormvariate(0.5, 0.6)))))
        tags = dict.fromkeys(tag for row in chosen for tag in row["tags"])
        found.append({"quote": " ".join(row["quote"] for row in chosen), "tags": list(tags)[:4]})
    return found


def make_tokenizer(size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of at most `size` tokens on the sayings and their tags."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(special.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([f"{row['quote']}{SEPARATOR}{row['tags']}" for row in sayings()], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
