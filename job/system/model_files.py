"""Check the files of a base model before transformers reads them.

For a file that is valid JSON or GGUF but not what it expects, transformers 5.23 raises KeyError, TypeError,
AttributeError or a bare Exception. To catch those would blame the user's files for defects of this job, so the
checks here raise ValueError first. They cover the values that made transformers fail in that way, and no others.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def _at_least(minimum: int) -> AfterValidator:
    """Return a validator of integers; transformers itself checks other types, which some architectures have."""

    def validate(value: Any) -> Any:
        if isinstance(value, int) and value < minimum:
            raise ValueError(f"{value} is less than {minimum}")
        return value

    return AfterValidator(validate)


_Size = Annotated[Any, _at_least(0)]
_Heads = Annotated[Any, _at_least(1)]
_AutoMap = dict[str, str | list[str | None]]


def _torch_dtype(name: str | None) -> str | None:
    import torch

    dtype = None if name is None else getattr(torch, name, None)
    if name is not None and not isinstance(dtype, torch.dtype):
        raise ValueError(f"torch has no dtype {name!r}")
    if dtype is not None and (not dtype.is_floating_point or dtype.itemsize < 2):
        raise ValueError(f"{name} is no dtype to compute in; expected bfloat16, float16 or float32")
    return name


_ROPE_KEYS = {
    **dict.fromkeys(("linear", "dynamic", "yarn"), ("factor",)),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "longrope": ("short_factor", "long_factor"),
}
"""What transformers requires for a rotary embedding, by its type."""


def _rope(parameters: Any) -> Any:
    if isinstance(parameters, dict):
        kind = parameters.get("rope_type", parameters.get("type"))
        missing = [key for key in _ROPE_KEYS.get(str(kind), ()) if key not in parameters]
        if missing:
            raise ValueError(f"the type {kind!r} requires {missing[0]}")
    return parameters


_Dtype = Annotated[str | None, AfterValidator(_torch_dtype)]
_Rope = Annotated[Any, AfterValidator(_rope)]


class _Fields(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", protected_namespaces=())


_Model = TypeVar("_Model", bound=_Fields)


class _ModelConfig(_Fields):
    """The entries of config.json that transformers uses unchecked."""

    model_type: str | None = None
    auto_map: _AutoMap = {}
    dtype: _Dtype = None
    torch_dtype: _Dtype = None
    rope_scaling: _Rope = None
    rope_parameters: _Rope = None
    quantization_config: dict[str, Any] | None = None
    hidden_size: _Size = None
    intermediate_size: _Size = None
    vocab_size: _Size = None
    num_attention_heads: _Heads = None
    num_key_value_heads: _Heads = None
    head_dim: _Heads = None


class _WeightsIndex(_Fields):
    """The entries of model.safetensors.index.json."""

    metadata: dict[str, Any]
    weight_map: dict[str, str]


class _AddedToken(_Fields):
    content: str


_Token = str | _AddedToken | None


class _ChatTemplate(_Fields):
    name: str
    template: str


class _TokenizerConfig(_Fields):
    """The entries of tokenizer_config.json that transformers uses unchecked."""

    tokenizer_class: str | None = None
    auto_map: _AutoMap | list[str | None] = {}
    bos_token: _Token = None
    eos_token: _Token = None
    unk_token: _Token = None
    pad_token: _Token = None
    added_tokens_decoder: dict[str, _AddedToken] = {}
    extra_special_tokens: list[_Token] | dict[str, _Token] | None = None
    additional_special_tokens: list[_Token] | dict[str, _Token] | None = None
    chat_template: str | dict[str, str] | list[_ChatTemplate] | None = None


class _SpecialTokens(_Fields):
    """The entries of special_tokens_map.json."""

    bos_token: _Token = None
    eos_token: _Token = None
    unk_token: _Token = None
    pad_token: _Token = None


class _SerializedToken(_AddedToken):
    id: int


class _TokenizerFile(_Fields):
    """The entries of tokenizer.json that transformers reads itself; the tokenizers library reads the others."""

    added_tokens: list[_SerializedToken]


class _GGUFTokenizer(_Fields):
    """The tokenizer's metadata in a GGUF file."""

    model: str
    tokens: list[str]
    merges: list[str] | None = None
    scores: list[float] | None = None
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    unknown_token_id: int | None = None


_VOCABULARIES = ("tokenizer.json", "*.model", "*vocab*", "*.tiktoken", "tekken.json", "*.bpe", "*.txt")
NO_ATTENTION = ("mamba", "rwkv")
"""Beginnings of the architectures whose GGUF files rightly have 0 attention heads."""


def check_config(folder: Path) -> dict[str, Any]:
    """Check config.json and return its content; raises ValueError or OSError."""
    if not (folder / "config.json").is_file():
        raise ValueError("config.json is missing")
    content = _read_object(folder / "config.json")
    _validate("config.json", _ModelConfig, content)
    return content


def check_architecture(config: PreTrainedConfig) -> None:
    """Check that transformers has the activation and the rotary embedding that a model's config names.

    Raises ValueError.
    """
    from transformers import __version__
    from transformers.activations import ACT2FN
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    activation = getattr(config, "hidden_act", None)
    if isinstance(activation, str) and activation not in ACT2FN:
        raise ValueError(f"config.json: hidden_act is {activation!r}, which transformers {__version__} does not have")
    parameters = getattr(config, "rope_parameters", None) or {}
    # some architectures have one entry for each type of attention layer
    for entry in [parameters, *(value for value in parameters.values() if isinstance(value, dict))]:
        kind = entry.get("rope_type", "default")
        if kind != "default" and kind not in ROPE_INIT_FUNCTIONS:
            raise ValueError(f"config.json: rope_type is {kind!r}, which transformers {__version__} does not have")


def check_weights_index(folder: Path) -> None:
    """Check the index of weights in several files, if there is one; raises ValueError or OSError."""
    if (index := folder / "model.safetensors.index.json").is_file():
        _check_object(index, _WeightsIndex)


def check_tokenizer(folder: Path) -> None:
    """Check the tokenizer's files, as far as they are there; raises ValueError or OSError."""
    from tokenizers import Tokenizer

    if not any(file for pattern in _VOCABULARIES for file in folder.glob(pattern)):
        raise ValueError("there is no vocabulary of a tokenizer, such as tokenizer.json")
    for name, fields in (
        ("tokenizer_config.json", _TokenizerConfig),
        ("special_tokens_map.json", _SpecialTokens),
        ("tokenizer.json", _TokenizerFile),
    ):
        if (folder / name).is_file():
            _check_object(folder / name, fields)
    if (file := folder / "tokenizer.json").is_file():
        try:
            Tokenizer.from_file(str(file))
        except Exception as error:  # the library has no narrower one for a file that it cannot parse
            raise ValueError(f"tokenizer.json: {error}") from error
    if (file := folder / "added_tokens.json").is_file() and not all(
        isinstance(number, int) for number in _read_object(file).values()
    ):
        raise ValueError("added_tokens.json: expected a token id for each token")


def check_gguf(path: Path) -> None:
    """Check that a GGUF file is complete and that its tokenizer is consistent; raises ValueError or OSError."""
    from gguf import GGUFReader

    try:
        fields = GGUFReader(path).fields
        names = {name: f"tokenizer.ggml.{name}" for name in _GGUFTokenizer.model_fields}
        metadata = {name: fields[key].contents() for name, key in names.items() if key in fields}
        architecture = str(fields["general.architecture"].contents())
        sizes = {
            name: fields[f"{architecture}.{name}"].contents()
            for name in ("attention.head_count", "attention.head_count_kv", "embedding_length")
            if f"{architecture}.{name}" in fields
        }
    except (LookupError, OverflowError) as error:  # the reader does not check that the file is long enough
        raise ValueError(f"the file is damaged or incomplete ({error})") from error
    for name, size in sizes.items():  # some architectures have a list with one entry for each layer
        if isinstance(size, int) and size < 1 and not architecture.startswith(NO_ATTENTION):
            raise ValueError(f"{architecture}.{name} is {size}; expected at least 1")
    tokenizer = _validate(path.name, _GGUFTokenizer, metadata)
    for name in ("bos_token_id", "eos_token_id", "unknown_token_id"):
        number = getattr(tokenizer, name)
        if number is not None and not 0 <= number < len(tokenizer.tokens):
            raise ValueError(f"{name} is {number}, but the file has {len(tokenizer.tokens)} tokens")
    if tokenizer.merges is None and tokenizer.scores is None:
        raise ValueError("the tokenizer has neither merges nor scores")
    vocabulary = set(tokenizer.tokens)
    for merge in tokenizer.merges or () if tokenizer.model == "gpt2" else ():
        pair = merge.split(" ")
        if len(pair) != 2 or not vocabulary.issuperset([*pair, "".join(pair)]):
            raise ValueError(f"the tokenizer's merge {merge!r} is not a pair of its tokens")


def _check_object(path: Path, fields: type[_Fields]) -> None:
    _validate(path.name, fields, _read_object(path))


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} is a JSON {type(content).__name__}, not an object")
    return content


def _validate(name: str, fields: type[_Model], content: dict[str, Any]) -> _Model:
    try:
        return fields.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(
            f"{name}: {'.'.join(map(str, first['loc']))}: {first['msg'].removeprefix('Value error, ')}"
        ) from error
