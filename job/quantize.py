"""Load the base model and its tokenizer from safetensors or GGUF, and quantize the model."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from job.errors import InvalidInputError
from job.hub import client as hub
from job.hub.weights import LOAD_ERRORS, adapter_in_folder, check_complete, load_error, resolve_weights
from job.settings import Base
from job.system import compatibility, model_files, prequantized, weight_files
from job.system.compatibility import UnsuitableModelError
from job.system.paths import WEIGHT_SUFFIXES, hub_snapshot, is_local, local_path
from job.system.weight_files import TensorHeader

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from job.system.device import ComputeSpec
    from job.system.prequantized import Quantization

log = logging.getLogger(__name__)

UNQUANTIZED_MODULES = {
    "mamba": ["lm_head", "dt_proj"],  # it multiplies by this weight itself
    # bitsandbytes' int8 layers take no inputs of four dimensions on a CPU
    **{
        name: ["lm_head", "kv_b_proj"]
        for name in ("axk1", "deepseek_v2", "deepseek_v3", "glm4_moe_lite", "minicpm3", "youtu")
    },
}
"""For each architecture the linear layers that stay unquantized, where these are not the output head alone."""


def load_tokenizer(settings: Base) -> PreTrainedTokenizerBase:
    """Load the base model's tokenizer and make sure that it has a pad token.

    A tokenizer without a pad token pads with its end-of-sequence token. Padding is recognised by the attention mask
    and the labels, never by the token id.

    Raises InvalidInputError when the files cannot be read or there is no end-of-sequence token.
    """
    from transformers import AutoTokenizer

    folder, config = _load_config(settings, download_weights=False)
    try:
        model_files.check_tokenizer(folder)
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        if tokenizer.eos_token_id is None:
            raise UnsuitableModelError("its tokenizer has no end-of-sequence token; choose a model that has one")
        compatibility.fit_tokenizer(tokenizer, config.get_text_config().vocab_size)
    except LOAD_ERRORS as error:
        raise load_error("tokenizer", settings, error) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.is_fast and getattr(tokenizer.backend_tokenizer.model, "dropout", None):
        tokenizer.backend_tokenizer.model.dropout = None  # BPE dropout: a text would have other tokens each time
    return tokenizer


def meta_model(settings: Base) -> PreTrainedModel:
    """Build the base model on the meta device: modules and shapes, without weights or memory.

    Raises InvalidInputError when config.json cannot be read, or no model can be built from it.
    """
    import torch
    from transformers import AutoModelForCausalLM

    _, config = _load_config(settings, download_weights=False)
    try:
        with torch.device("meta"), compatibility.missing_settings_named(config):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except LOAD_ERRORS as error:
        raise load_error("config.json", settings, error) from error
    return model


def _load_config(settings: Base, *, download_weights: bool = True) -> tuple[Path, PreTrainedConfig]:
    """Return the folder of the base model and its config.

    Raises InvalidInputError when config.json cannot be read, or does not describe a model that can be trained.
    """
    folder = resolve_weights(settings, download_weights=download_weights)
    try:
        return folder, _checked_config(folder, settings)
    except LOAD_ERRORS as error:
        raise load_error("config.json", settings, error) from error


def _checked_config(folder: Path, settings: Base) -> PreTrainedConfig:
    """Load config.json, and check that it describes a causal language model that is not quantized in another way."""
    from transformers import AutoConfig

    if (folder / "adapter_config.json").is_file():
        raise adapter_in_folder(settings.model, folder)
    source = model_files.check_config(folder)
    compatibility.check_known(source)
    config: PreTrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if (found := prequantized.find_quantization(folder, source)) is not None:
        if _is_leftover(found, folder, settings):
            compatibility.warn_once("config.json: its quantization_config is not used: the weights are not quantized")
            del config.quantization_config
        else:
            _check_quantization(found, settings, folder, source)
    compatibility.check_causal_config(config, source)
    model_files.check_architecture(config)
    if (pad := compatibility.replace_pad_id(config)) is not None:
        compatibility.warn_once(f"config.json: pad_token_id is {pad} and there is no such token; it is not used")
    return config


def _is_leftover(found: Quantization, folder: Path, settings: Base) -> bool:
    """Return whether config.json describes a quantization that the weights do not have.

    Fine-tuning with bitsandbytes leaves such an entry behind when the adapter is merged into the original weights.
    """
    if not found.description.startswith("bitsandbytes"):
        return False
    headers = _headers(folder, settings)
    return headers is not None and not weight_files.quantized_tensors(headers, headers)


def _check_quantization(
    found: Quantization, settings: Base, folder: Path, source: dict[str, Any] | None = None
) -> None:
    """Raise UnsuitableModelError unless the settings quantize a checkpoint as it is quantized already."""
    if found.kind == settings.quantize:
        return
    original = prequantized.original_model(folder, source or {})
    instead = f"TAGGER_BASE_MODEL to the unquantized original{f', {original}' if original else ''}"
    if found.kind:
        instead = f"TAGGER_BASE_QUANTIZE={found.kind}, or {instead}"
    raise UnsuitableModelError(
        f"its weights are quantized already ({found.description}), which TAGGER_BASE_QUANTIZE={settings.quantize} "
        f"does not load; set {instead}"
    )


def check_weights(settings: Base) -> None:
    """Check the tensors of the base model's files against its architecture by name, shape and dtype, without data.

    Of a model on the Hub only the headers of the files are downloaded.
    Raises InvalidInputError when tensors are missing, have another shape, or are quantized in another way.
    """
    folder, config = _load_config(settings, download_weights=False)
    try:
        if (headers := _headers(folder, settings)) is not None:
            _check_headers(headers, config, folder, settings)
    except LOAD_ERRORS as error:
        raise load_error("weights", settings, error) from error


def _headers(folder: Path, settings: Base) -> dict[str, TensorHeader] | None:
    """Return the header of each tensor by name; None for a model on the Hub that is neither cached nor reachable."""
    model_files.check_weights_index(folder)
    names = weight_files.file_names(folder)
    if is_local(settings.model, WEIGHT_SUFFIXES) or all((folder / name).is_file() for name in names):
        return weight_files.read_headers(folder)
    if hub.is_offline():
        return None
    headers: dict[str, TensorHeader] = {}
    for name in names:
        tensors = hub.safetensors_header(settings.model, settings.revision, name)
        headers |= {key: TensorHeader(dtype, shape) for key, (dtype, shape) in tensors.items()}
    return headers


def _check_headers(headers: dict[str, TensorHeader], config: PreTrainedConfig, folder: Path, settings: Base) -> None:
    """Check by their headers that the tensors are those that the config describes.

    Raises ValueError when transformers would not load all of them as they are meant.
    """
    import torch
    from transformers import AutoModelForCausalLM

    if getattr(config, "quantization_config", None):
        found = prequantized.describe_tensors(weight_files.quantized_tensors(headers, headers))
        _check_quantization(found, settings, folder)
        return
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        tensors = {name: torch.empty(header.shape) for name, header in headers.items()}
    _, loading_info = type(model).from_pretrained(
        None,
        config=model.config,  # of a model with several parts, that of the text model
        state_dict=tensors,
        device_map={"": "meta"},
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    if names := weight_files.quantized_tensors(headers, loading_info["unexpected_keys"]):
        found = prequantized.describe_tensors(names)
        raise UnsuitableModelError(
            f"its weights are quantized ({found.description}), and its config.json does not say so; "
            "set TAGGER_BASE_MODEL to the unquantized original"
        )
    check_complete(loading_info)
    if unused := sorted(loading_info["unexpected_keys"]):
        log.info("quantize: %d tensors are not part of the model and not used, such as %s", len(unused), unused[0])


def load_model(settings: Base, compute: ComputeSpec) -> PreTrainedModel:
    """Load the base model onto the device of `compute`.

    Linear layers are quantized as configured; all other weights, the output head included, have the dtype of
    `compute`. Raises InvalidInputError when the files cannot be read, or the weights do not fit config.json.
    """
    from transformers import AutoModelForCausalLM, GenerationConfig

    dtype, device = compute.dtype, compute.device
    folder, config = _load_config(settings)
    try:
        model_files.check_weights_index(folder)
        headers = weight_files.read_headers(folder)
        _check_headers(headers, config, folder, settings)
        weight_files.check_finite(folder, *_number_format(settings.quantize, dtype))
        quantization_config = _quantization_config(settings.quantize, dtype, config.model_type)
        if getattr(config, "quantization_config", None):  # transformers uses it and not ours
            quantization_config = None
            config.quantization_config |= {"bnb_4bit_compute_dtype": str(dtype).removeprefix("torch.")}
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            quantization_config=quantization_config,
            device_map={"": device},
            generation_config=GenerationConfig(),  # the base model's own is not used, so it is not read
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # refused below; transformers would raise a RuntimeError
            output_loading_info=True,
        )
        model: PreTrainedModel = loaded[0]
        check_complete(loaded[1])
        _check_quantized(model)
    except LOAD_ERRORS as error:
        raise load_error("model", settings, error) from error
    # only the settings decide how tags are generated, not the base model's penalties or sampling
    model.generation_config = GenerationConfig()
    # in inference RWKV divides weights in place, which a merge would save; it only keeps fp16 from overflowing
    if hasattr(model.config, "rescale_every"):
        model.config.rescale_every = 0
    if settings.quantize != "none" and settings.quantize not in describe_weights(model)["linear_layers"]:
        log.warning(
            "quantize: no layer is in %s, because transformers does not quantize those of %s; they take the memory of "
            "TAGGER_BASE_QUANTIZE=none",
            *(settings.quantize, config.model_type),
        )
    if settings.quantize == "nf4" and device.type == "cpu":
        _keep_nf4_gradients(model)
    return model


def _number_format(quantize: str, dtype: torch.dtype) -> tuple[torch.dtype, str]:
    """Return the dtype that weights are converted to, and what to set if it cannot hold one."""
    import torch

    if quantize == "int8":
        return torch.float16, "bitsandbytes converts weights to fp16 for int8; set TAGGER_BASE_QUANTIZE=nf4"
    return dtype, "set TAGGER_TRAIN_PRECISION=bf16"


def _quantization_config(quantize: str, dtype: torch.dtype, architecture: str) -> Any:
    from transformers import BitsAndBytesConfig

    skip = UNQUANTIZED_MODULES.get(architecture)
    if quantize == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)
    if quantize == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=skip,
        )
    return None


def describe_weights(model: PreTrainedModel) -> dict[str, Any]:
    """Return how a loaded model's weights are stored, for the manifest.

    `linear_layers` counts them by kind: int8, nf4, fp4, or the dtype of those that are not quantized.
    """
    import torch
    from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt
    from transformers.pytorch_utils import Conv1D

    def kind(module: Any) -> str:
        if isinstance(module, Linear8bitLt):
            return "int8"
        is_4bit = isinstance(module, Linear4bit)
        return str(module.weight.quant_state.quant_type if is_4bit else module.weight.dtype).removeprefix("torch.")

    linear = (module for module in model.modules() if isinstance(module, (torch.nn.Linear, Conv1D)))
    quantizer = getattr(model, "hf_quantizer", None)
    return {
        "architecture": model.config.model_type,
        "linear_layers": dict(Counter(map(kind, linear))),
        "quantized_in_checkpoint": quantizer is not None and bool(quantizer.pre_quantized),
    }


def _check_quantized(model: PreTrainedModel) -> None:
    """Raise ValueError when a quantized layer does not have the shape of the layer that it replaces.

    transformers does not compare the shapes of quantized tensors with config.json.
    """
    from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt

    for name, module in model.named_modules():
        if isinstance(module, (Linear4bit, Linear8bitLt)):
            weight: Any = module.weight
            found = tuple((getattr(weight, "quant_state", None) or weight).shape)
            if found != (expected := (module.out_features, module.in_features)):
                raise ValueError(f"the weight of {name} has the shape {list(found)} instead of {list(expected)}")


def _keep_nf4_gradients(model: PreTrainedModel) -> None:
    """Stop bitsandbytes from repacking 4-bit weights at the first evaluation on a CPU with AVX512-BF16.

    The kernel for the repacked layout has no backward pass. Once an evaluation has repacked the weights,
    training uses it too, and gradients are lost with only a warning (bitsandbytes 0.50).
    """
    from bitsandbytes.nn.modules import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def check_positions(settings: Base, max_length: int) -> None:
    """Check that the base model has a position for each token of the longest example.

    Raises InvalidInputError when it does not, or when config.json cannot be read.
    """
    model = meta_model(settings)
    limit = compatibility.max_positions(model)
    if limit is not None and max_length > limit:
        raise InvalidInputError(
            f"TAGGER_DATA_MAX_LENGTH={max_length} is more than the {limit} positions of {settings.model}; set it to "
            f"{limit} or less"
        )
    trained = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(trained, int) and max_length > trained:
        compatibility.warn_once(
            f"TAGGER_DATA_MAX_LENGTH={max_length} is more than the {trained} positions that {settings.model} was "
            "trained with; its answers to longer texts may be worse"
        )


def check_causal(model: PreTrainedModel, settings: Base) -> None:
    """Check that a loaded model is causal, by a forward and a backward pass over a few tokens.

    Raises InvalidInputError when the logits at a position depend on later tokens.
    """
    try:
        compatibility.check_causal(model)
    except UnsuitableModelError as error:
        raise load_error("model", settings, error) from error


def hub_identity(settings: Base) -> tuple[str, str | None]:
    """Return the base model's name and revision on the Hub, also for a local folder of the Hub's cache.

    A model that is not from the Hub keeps the name and revision of the settings.
    """
    if settings.model.startswith((".", "/", "~")) and (
        origin := hub_snapshot(local_path(settings.model, "TAGGER_BASE_MODEL"))
    ):
        return origin
    return settings.model, settings.revision
