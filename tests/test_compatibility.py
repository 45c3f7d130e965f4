"""Base models that are not causal, or have no row for a token or position, are refused in one sentence."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_llama_tokenizer
from tokenizers import AddedToken
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM as AutoModel
from transformers import (
    BartConfig,
    BertConfig,
    BertGenerationConfig,
    BertLMHeadModel,
    BloomConfig,
    CTRLConfig,
    DistilBertConfig,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPTJConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    MambaConfig,
    MptConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RwkvConfig,
    T5Config,
    XLNetConfig,
)

from job.system import compatibility
from job.system.compatibility import UnsuitableModelError

SMALL: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (BertConfig(), "is bert .*, which attends to later tokens too"),
        (RobertaConfig(), "is roberta .*, which attends to later tokens too"),
        (DistilBertConfig(), "is distilbert .*, an encoder that attends to later tokens too"),
        (XLNetConfig(), "is xlnet .*, which attends to later tokens too"),
        (BertGenerationConfig(), "is bert-generation .*, which attends to later tokens too"),
        (T5Config(), "is t5 .*, an encoder-decoder"),
        (BartConfig(), "is bart .*, an encoder-decoder"),
        (LlavaConfig(), "is llava .*, which reads more than text"),
    ],
    ids=lambda value: value.model_type if isinstance(value, PreTrainedConfig) else "",
)
def test_what_is_not_causal_is_refused_by_its_config(config: PreTrainedConfig, message: str) -> None:
    with pytest.raises(UnsuitableModelError, match=f"{message}; expected a causal language model") as error:
        compatibility.check_causal_config(config, {"architectures": ["Own"]})
    assert "(Own)" in str(error.value)
    assert len(str(error.value)) < 200


@pytest.mark.parametrize(
    "config",
    [
        BertConfig(**SMALL, is_decoder=True),
        BertGenerationConfig(**SMALL, is_decoder=True),
        BartConfig(is_encoder_decoder=False, is_decoder=True, vocab_size=60, d_model=32, decoder_layers=1),
        BloomConfig(vocab_size=60, hidden_size=32, n_layer=2, n_head=2),
        CTRLConfig(vocab_size=60, n_embd=32, dff=64, n_layer=1, n_head=2),
        MambaConfig(vocab_size=60, hidden_size=32, num_hidden_layers=2, state_size=4),
        RwkvConfig(vocab_size=60, hidden_size=32, num_hidden_layers=2, attention_hidden_size=32),
        LlamaConfig(**SMALL),
    ],
    ids=lambda config: config.model_type,
)
def test_what_is_causal_passes_the_config_check_and_the_probe(config: PreTrainedConfig) -> None:
    torch.manual_seed(0)
    compatibility.check_causal_config(config, {})
    model = AutoModel.from_config(config).eval()
    assert compatibility.later_gradient(model) == 0
    compatibility.check_causal(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_to_later_tokens_is_found_by_the_probe(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    models: list[PreTrainedModel] = [
        BertLMHeadModel(BertConfig(**SMALL)),
        Gemma3ForCausalLM(
            Gemma3TextConfig(**SMALL, num_key_value_heads=2, head_dim=16, use_bidirectional_attention=True)
        ),
    ]
    for model in models:
        with pytest.raises(UnsuitableModelError, match="logits at a position depend on later tokens"):
            compatibility.check_causal(model.to(dtype).eval())


def test_the_probe_leaves_the_model_unchanged() -> None:
    model = LlamaForCausalLM(LlamaConfig(**SMALL)).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    compatibility.check_causal(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not model.get_input_embeddings()._forward_hooks
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(("pad", "removed", "kept"), [(60, 60, None), (99, 99, None), (-1, None, None), (3, None, 3)])
def test_a_pad_id_without_a_row_is_removed(pad: int, removed: int | None, kept: int | None) -> None:
    config = LlamaConfig(**SMALL, pad_token_id=pad)
    assert compatibility.replace_pad_id(config) == removed
    assert config.pad_token_id == kept


@pytest.fixture
def tokenizer(rows: list[dict[str, object]]) -> PreTrainedTokenizerFast:
    return make_llama_tokenizer(rows)


def test_a_pad_token_without_a_row_is_replaced(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    compatibility.fit_tokenizer(tokenizer, rows)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    assert max(tokenizer("[PAD] text").input_ids) < rows


def test_special_tokens_without_a_row_are_dropped(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    rows, text = len(tokenizer), "a song <image> about rain"
    before = tokenizer(text).input_ids
    tokenizer.add_special_tokens({"extra_special_tokens": ["<image>"]})
    assert max(tokenizer(text).input_ids) == rows
    compatibility.fit_tokenizer(tokenizer, rows)
    assert tokenizer(text).input_ids == before
    tokenizer.save_pretrained(tmp_path)
    assert PreTrainedTokenizerFast.from_pretrained(tmp_path)(text).input_ids == before


def test_an_end_of_sequence_token_without_a_row_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = len(tokenizer)
    tokenizer.add_special_tokens({"eos_token": "[NEW]"})
    with pytest.raises(UnsuitableModelError, match=f"has the id {rows}, and the embedding has {rows} rows"):
        compatibility.fit_tokenizer(tokenizer, rows)


def test_a_token_that_is_added_to_each_text_and_has_no_row_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = len(tokenizer)
    tokenizer.add_special_tokens({"bos_token": "[NEW]", "unk_token": "[UNKNOWN]"})
    unused = copy.deepcopy(tokenizer)
    compatibility.fit_tokenizer(unused, rows)
    assert (unused.bos_token, unused.unk_token) == (None, None)
    assert max(unused("a [NEW] [UNKNOWN] song").input_ids) < rows
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="[NEW] $A", special_tokens=[("[NEW]", rows)])
    with pytest.raises(UnsuitableModelError, match=f"adds the token id {rows} .* the embedding has {rows} rows"):
        compatibility.fit_tokenizer(tokenizer, rows)


def test_words_without_a_row_are_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = len(tokenizer)
    with pytest.raises(UnsuitableModelError, match=f"ids up to {rows - 1}, such as {rows - 5} .* has {rows - 5} rows"):
        compatibility.fit_tokenizer(tokenizer, rows - 5)
    tokenizer.add_tokens([AddedToken("<tag>", special=False)])
    with pytest.raises(UnsuitableModelError, match=f"such as {rows} for '<tag>', and the embedding has {rows} rows"):
        compatibility.fit_tokenizer(tokenizer, rows)


@pytest.mark.parametrize(
    ("config", "limit"),
    [
        (GPT2Config(vocab_size=60, n_embd=32, n_layer=1, n_head=2, n_positions=24), 24),
        (
            OPTConfig(
                **{**SMALL, "num_hidden_layers": 1}, ffn_dim=32, word_embed_proj_dim=32, max_position_embeddings=24
            ),
            24,
        ),
        (GPTJConfig(vocab_size=60, n_embd=32, n_layer=1, n_head=2, n_positions=24, rotary_dim=8), 24),
        (MptConfig(vocab_size=60, d_model=32, n_layers=1, n_heads=2, max_seq_len=24), 24),
        (RobertaConfig(**SMALL, is_decoder=True, max_position_embeddings=26, pad_token_id=1), 24),
        (LlamaConfig(**SMALL, max_position_embeddings=24), None),
        (BloomConfig(vocab_size=60, hidden_size=32, n_layer=1, n_head=2), None),
        (
            Gemma3Config(
                text_config={**SMALL, "head_dim": 16, "num_key_value_heads": 2},
                vision_config={**SMALL, "image_size": 32, "patch_size": 16},
            ),
            None,
        ),
    ],
    ids=lambda value: value.model_type if isinstance(value, PreTrainedConfig) else "",
)
def test_the_number_of_positions_is_that_of_the_longest_text(config: PreTrainedConfig, limit: int | None) -> None:
    model = AutoModel.from_config(config).eval()
    assert compatibility.max_positions(model) == limit
    longest = torch.full((1, limit or 30), 5)
    model(input_ids=longest)
    if limit is not None:
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.full((1, limit + 1), 5))
