"""Architectures that read padding or have no cache are tagged like all others, or refused before training."""

from __future__ import annotations

from pathlib import Path

import pytest
import zoo
from conftest import CPU, make_settings

from job import preflight
from job.decoding.config import initial_config
from job.errors import InvalidInputError
from job.quantize import load_model, load_tokenizer
from job.sample import Tagger
from job.types import Example

TEXTS = ["a song about rain", "x", "the long road to the sea is made of many small stones", "a coin"]
KNOWN = [Example(text, ("life", "sea", "sea road", "love")) for text in TEXTS]


@pytest.mark.parametrize("name", ["bart", "rwkv", "xlstm", "mamba"])
def test_a_text_has_the_same_answer_alone_and_in_a_batch(name: str, tmp_path: Path) -> None:
    zoo.save_model(name, tmp_path / "model")
    settings = make_settings(tmp_path / "model", tmp_path, sample={"vocabulary": "seen", "max_new_tokens": 16})
    model, tokenizer = load_model(settings.base, CPU).eval(), load_tokenizer(settings.base)
    tagger = Tagger(model, tokenizer, settings, CPU, initial_config(settings.sample, KNOWN))
    assert [answer.raw for answer in tagger.tag(TEXTS)] == [tagger.tag([text])[0].raw for text in TEXTS]


@pytest.mark.parametrize("name", ["mamba", "rwkv"])
def test_marginal_decoding_without_a_cache_is_refused_before_training(name: str, tmp_path: Path) -> None:
    zoo.save_model(name, tmp_path / "model")
    sample = {"vocabulary": "seen", "decoding": "marginal"}
    settings = make_settings(tmp_path / "model", tmp_path, sample=sample)
    with pytest.raises(InvalidInputError, match=f"the architecture {name} has no cache that a search can use; set it"):
        preflight.check_machine(preflight.check(settings))
