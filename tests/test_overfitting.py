"""A model that knows its training texts by heart answers them with their tags, whatever the tokenizer and decoding."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny_tokenizers
import torch
from conftest import CPU, make_settings
from tiny_tokenizers import HARD_EXAMPLES
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from job.dataset.tokenization import encode
from job.decoding.config import initial_config
from job.evaluate import evaluate
from job.sample import Tagger


@dataclass
class Overfitted:
    model: Any
    tokenizer: PreTrainedTokenizerFast


@pytest.fixture(scope="module", params=tiny_tokenizers.KINDS)
def overfitted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Overfitted:
    tokenizer = tiny_tokenizers.build(request.param)
    return Overfitted(overfit(tokenizer, tmp_path_factory.mktemp("overfitted")), tokenizer)


def overfit(tokenizer: PreTrainedTokenizerFast, folder: Path, separator: str = " ->: ") -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    settings = make_settings(Path("unused"), folder, data={"separator": separator})
    encoded = encode(tokenizer, HARD_EXAMPLES, settings)
    width = max(len(example.input_ids) for example in encoded)
    ids = torch.tensor([e.input_ids + [0] * (width - len(e.input_ids)) for e in encoded])
    labels = torch.tensor([e.labels + [-100] * (width - len(e.labels)) for e in encoded])
    mask = torch.tensor([[1] * len(e.input_ids) + [0] * (width - len(e.input_ids)) for e in encoded])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(80):
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.05, "the texts are not learned by heart"
    return model


@pytest.mark.parametrize(("decoding", "vocabulary"), [("greedy", "open"), ("greedy", "seen"), ("marginal", "seen")])
def test_training_texts_come_back_with_their_tags(
    overfitted: Overfitted, tmp_path: Path, decoding: str, vocabulary: str
) -> None:
    sample = {"decoding": decoding, "vocabulary": vocabulary, "max_new_tokens": 100, "threshold": 0.5}
    settings = make_settings(Path("unused"), tmp_path, sample=sample)
    tokenizer = overfitted.tokenizer
    tokenizer.pad_token = tokenizer.eos_token
    tagger = Tagger(overfitted.model, tokenizer, settings, CPU, initial_config(settings.sample, HARD_EXAMPLES))
    scores, predictions = evaluate(tagger, HARD_EXAMPLES)
    for example, prediction in zip(HARD_EXAMPLES, predictions, strict=True):
        assert set(prediction.predicted) == set(example.tags)
    assert scores.f1 == 1.0
