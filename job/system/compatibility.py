"""Check that a base model is a causal language model, and that it has a row for each token id and position."""

from __future__ import annotations

import functools
import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

EXPECTED = "expected a causal language model, such as Llama, Qwen or BLOOM"
NOT_CAUSAL = ("cpmant", "xlnet")
"""Architectures that transformers lists as causal language models, although they attend to later tokens."""
POSITION_SETTINGS = {"codegen": "n_positions", "ctrl": "n_positions", "gptj": "n_positions", "mpt": "max_seq_len"}
"""Architectures that compute a table of positions, with its length in config.json. Learned tables are modules."""
_NOT_TEXT = re.compile(r"vision|visual|image|audio|speech")
_POSITION_TABLE = re.compile(r"(?:^|\.)(?!\w*relative)(?:wpe|\w*position\w*|pos_emb\w*)$")
PROBE_TOKENS = 8
MAX_LEAK = 1e-4
"""Largest gradient at later tokens, relative to that at earlier ones, of a causal model.

Causal attention gives exactly 0 in every precision, and attention in both directions at least 1e-3 on tiny random
models. The rest is room for recurrent architectures that compute in chunks.
"""


class UnsuitableModelError(ValueError):
    """The files of a base model are intact, but it cannot be fine-tuned here. The message says why."""


def check_known(source: dict[str, Any]) -> None:
    """Check that transformers has the architecture of a config.json; raises UnsuitableModelError if it does not."""
    from transformers import CONFIG_MAPPING, __version__

    name = source.get("model_type")
    if isinstance(name, str) and name not in CONFIG_MAPPING:
        code = ", and code from a model's repository is never run" if source.get("auto_map") else ""
        raise UnsuitableModelError(f"transformers {__version__} does not have the architecture {name[:60]!r}{code}")


def check_causal_config(config: PreTrainedConfig, source: dict[str, Any]) -> None:
    """Check that transformers has a causal language model for a config; `source` is the content of config.json.

    Raises UnsuitableModelError that says what the model is.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

    classes = source.get("architectures")
    name = f" ({str(classes[0])[:60]})" if isinstance(classes, list) and classes else ""
    what = f"its architecture is {config.model_type}{name}"
    if config.is_encoder_decoder:
        raise UnsuitableModelError(f"{what}, an encoder-decoder; {EXPECTED}")
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UnsuitableModelError(f"{what}, {_kind(config)}; {EXPECTED}")
    # like those of BERT, their classes are causal if the config says so
    masked = type(config) in MODEL_FOR_MASKED_LM_MAPPING or config.model_type == "bert-generation"
    causal = getattr(config, "is_decoder", False) or getattr(config, "causal", False)
    if (masked and not causal) or config.model_type in NOT_CAUSAL:
        raise UnsuitableModelError(f"{what}, which attends to later tokens too; {EXPECTED}")


def _kind(config: PreTrainedConfig) -> str:
    """Return what a model is that transformers does not list as a causal language model."""
    from transformers import MODEL_FOR_MASKED_LM_MAPPING

    if hasattr(config, "text_config") or hasattr(config, "vision_config") or hasattr(config, "audio_config"):
        return "which reads more than text"
    if type(config) in MODEL_FOR_MASKED_LM_MAPPING:
        return "an encoder that attends to later tokens too"
    return "not a causal language model"


@contextmanager
def missing_settings_named(config: PreTrainedConfig) -> Iterator[None]:
    """Raise UnsuitableModelError if transformers reads a setting that a config does not have, as for its own DBRX."""
    from transformers import PreTrainedConfig, __version__

    try:
        yield
    except AttributeError as error:
        if not isinstance(error.obj, PreTrainedConfig):
            raise
        raise UnsuitableModelError(
            f"transformers {__version__} cannot build its architecture, {config.model_type}: it needs {error.name}, "
            f"which its configuration does not have; {EXPECTED}"
        ) from error


def check_causal(model: PreTrainedModel) -> None:
    """Check that the logits at a position do not depend on later tokens; raises UnsuitableModelError if they do.

    The gradient shows it in every precision, where logits would differ a little for other reasons: quantized layers
    and mixtures of experts round differently when later tokens change. The model must be in evaluation mode.
    """
    leak = later_gradient(model)
    if leak > MAX_LEAK:
        raise UnsuitableModelError(
            f"its logits at a position depend on later tokens (architecture {model.config.model_type}); {EXPECTED}"
        )


def later_gradient(model: PreTrainedModel) -> float:
    """Return the largest gradient of one position's logits at later tokens, relative to that at other tokens."""
    import torch

    embedded: list[torch.Tensor] = []

    def keep(module: torch.nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[0].clone()  # some architectures change it in place

    embedding: Any = model.get_input_embeddings()
    rows = embedding.num_embeddings
    device = next(model.parameters()).device
    ids = torch.arange(rows - 1, rows - 1 - PROBE_TOKENS, -1, device=device).clamp(min=0)[None]
    position = PROBE_TOKENS // 2
    handle = embedding.register_forward_hook(keep)
    try:
        with torch.enable_grad():
            logits = model(input_ids=ids, use_cache=False).logits[0, position].float()
            [gradient] = torch.autograd.grad(logits.square().mean(), embedded[:1])
    finally:
        handle.remove()
    size = gradient.float().reshape(-1, PROBE_TOKENS, gradient.shape[-1]).abs().amax(dim=(0, 2))
    return float(size[position + 1 :].max() / size[: position + 1].max().clamp(min=1e-30))


def replace_pad_id(config: PreTrainedConfig) -> int | None:
    """Remove a pad token id that has no row in the embedding, which torch refuses; return it, or None.

    The pad token of the tokenizer is used instead; padding is recognised by the attention mask.
    """
    removed = None
    for part in {id(part): part for part in (config, config.get_text_config())}.values():
        pad, rows = getattr(part, "pad_token_id", None), getattr(part, "vocab_size", None)
        if isinstance(pad, int) and isinstance(rows, int) and not 0 <= pad < rows:
            part.pad_token_id = None
            removed = pad if pad >= 0 else removed
    return removed


def fit_tokenizer(tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    """Replace a pad token without a row in the embedding, and drop other special tokens without one.

    Raises UnsuitableModelError when the tokenizer can write a token id that the embedding has no row for.
    """
    end = tokenizer.eos_token_id
    if end is not None and end >= rows:
        raise UnsuitableModelError(f"its end-of-sequence token has the id {end}, and {_no_row(rows)}")
    pad = tokenizer.pad_token
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id >= rows:
        warn_once(
            f"tokenizer: the pad token {pad!r} has the id {tokenizer.pad_token_id} and the embedding has {rows} rows; "
            f"{tokenizer.eos_token!r} is used instead"
        )
        tokenizer.pad_token = tokenizer.eos_token
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    dropped = sorted(special & _outside(tokenizer, rows).keys()) if tokenizer.is_fast else []
    if dropped:
        _drop_added_tokens(tokenizer, set(dropped))
    if outside := _outside(tokenizer, rows):
        word = min(outside, key=outside.__getitem__)
        raise UnsuitableModelError(
            f"its tokenizer writes ids up to {max(outside.values())}, such as {outside[word]} for {word[:40]!r}, and "
            f"{_no_row(rows)}"
        )
    if (last := max(tokenizer("a").input_ids, default=0)) >= rows:
        raise UnsuitableModelError(f"its tokenizer adds the token id {last} to each text, and {_no_row(rows)}")
    if unused := [token for token in dropped if token != pad]:
        warn_once(
            f"tokenizer: {len(unused)} special tokens are not used, because the embedding has {rows} rows and none "
            f"for them, such as {unused[0][:40]!r}"
        )


def _no_row(rows: int) -> str:
    return (
        f"the embedding has {rows} rows; use the tokenizer that belongs to the model, or resize the model with "
        "resize_token_embeddings"
    )


def _outside(tokenizer: PreTrainedTokenizerBase, rows: int) -> dict[str, int]:
    return {token: number for token, number in tokenizer.get_vocab().items() if number >= rows}


def _drop_added_tokens(tokenizer: Any, tokens: set[str]) -> None:
    """Remove special tokens from a tokenizer, which then splits their text as any other."""
    from tokenizers import Tokenizer

    serialized = json.loads(tokenizer.backend_tokenizer.to_str())
    serialized["added_tokens"] = [token for token in serialized["added_tokens"] if token["content"] not in tokens]
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(serialized))
    for name in tokenizer.SPECIAL_TOKENS_ATTRIBUTES:
        if str(getattr(tokenizer, name, None)) in tokens:
            setattr(tokenizer, name, None)
    tokenizer.extra_special_tokens = [
        str(token) for token in tokenizer.extra_special_tokens if str(token) not in tokens
    ]


def max_positions(model: PreTrainedModel) -> int | None:
    """Return for how many positions a model has learned or computed a table; None if any number of them works."""
    import torch

    config = model.config.get_text_config()
    if config.model_type in POSITION_SETTINGS:
        return int(getattr(config, POSITION_SETTINGS[config.model_type]))
    tables = [
        # the first rows are not positions: OPT skips `offset` rows, RoBERTa those up to that of padding
        module.num_embeddings - getattr(module, "offset", 0 if module.padding_idx is None else module.padding_idx + 1)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Embedding) and _POSITION_TABLE.search(name) and not _NOT_TEXT.search(name)
    ]
    return min(tables, default=None)


@functools.cache
def warn_once(message: str) -> None:
    """Log a warning that later loads of the same model do not repeat."""
    log.warning(message)
