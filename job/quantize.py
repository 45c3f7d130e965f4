"""Load the base model and its tokenizer from safetensors or GGUF, and quantize the model."""

from __future__ import annotations

import hashlib
import logging
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from job.errors import InvalidInputError
from job.hub import client as hub
from job.runs.atomic import atomic_directory
from job.settings import Base
from job.system import model_files
from job.system.paths import WEIGHT_SUFFIXES, hub_snapshot, is_local, local_path

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from job.system.device import ComputeSpec

log = logging.getLogger(__name__)

LOAD_ERRORS = (OSError, ValueError, SafetensorError, StrictDataclassError)
"""Errors that damaged, foreign or missing files raise once `model_files` has checked them.

TypeError, KeyError and the like are not among them: those are defects, and end the job with a traceback.
"""
DOWNLOAD_SECONDS = 600.0
"""Seconds during which a failed download is retried; each retry keeps what has been downloaded."""


def check_local(model: str) -> Path:
    """Return the folder or file of a local model.

    Raises InvalidInputError unless it is a GGUF file, or a folder with config.json and safetensors.
    """
    path = local_path(model, "TAGGER_BASE_MODEL")
    if path.is_file():
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise InvalidInputError(
                    f"{model} is not a GGUF file (TAGGER_BASE_MODEL); expected one, or a model folder"
                )
        return path
    if not (path / "config.json").is_file():
        raise InvalidInputError(
            f"{model} has no config.json (TAGGER_BASE_MODEL); expected a folder written by save_pretrained"
        )
    if not list(path.glob("*.safetensors")):
        pickles = ", ".join(sorted(file.name for file in [*path.glob("*.bin"), *path.glob("*.pt")]))
        why = f"only {pickles}, and pickles are not read because they can run code" if pickles else "none"
        raise InvalidInputError(
            f"{model} has no weights in safetensors ({why}); convert it with save_pretrained, or name another model"
        )
    return path


def load_tokenizer(settings: Base) -> PreTrainedTokenizerBase:
    """Load the base model's tokenizer and make sure that it has a pad token.

    A tokenizer without a pad token pads with its end-of-sequence token. Padding is recognised by the attention mask
    and the labels, never by the token id.

    Raises InvalidInputError when the files cannot be read or there is no end-of-sequence token.
    """
    from transformers import AutoTokenizer

    try:
        folder = resolve_weights(settings, download_weights=False)
        model_files.check_config(folder)
        model_files.check_tokenizer(folder)
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except LOAD_ERRORS as error:
        raise _load_error("tokenizer", settings, error) from error
    if tokenizer.eos_token_id is None:
        raise InvalidInputError(
            f"the tokenizer of {settings.model} has no end-of-sequence token; choose a model that has one"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def meta_model(settings: Base) -> PreTrainedModel:
    """Build the base model on the meta device: modules and shapes, without weights or memory.

    Raises InvalidInputError when config.json cannot be read.
    """
    import torch
    from transformers import AutoModelForCausalLM

    try:
        config = _load_config(resolve_weights(settings, download_weights=False))
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except LOAD_ERRORS as error:
        raise _load_error("config.json", settings, error) from error
    return model


def _load_config(folder: Path) -> PreTrainedConfig:
    from transformers import AutoConfig

    model_files.check_config(folder)
    config: PreTrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    model_files.check_architecture(config)
    return config


def load_model(settings: Base, compute: ComputeSpec) -> PreTrainedModel:
    """Load the base model onto the device of `compute`.

    Linear layers are quantized as configured; all other weights, the output head included, have the dtype of
    `compute`. Raises InvalidInputError when the files cannot be read, or the weights do not fit config.json.
    """
    from transformers import AutoModelForCausalLM, GenerationConfig

    try:
        folder = resolve_weights(settings)
        _load_config(folder)
        model_files.check_weights_index(folder)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=compute.dtype,
            quantization_config=_quantization_config(settings.quantize, compute.dtype),
            device_map={"": compute.device},
            generation_config=GenerationConfig(),  # the base model's own is not used, so it is not read
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # refused below; transformers would raise a RuntimeError
            output_loading_info=True,
        )
        model: PreTrainedModel = loaded[0]
        _check_complete(loaded[1])
    except LOAD_ERRORS as error:
        raise _load_error("model", settings, error) from error
    # only the settings decide how tags are generated, not the base model's penalties or sampling
    model.generation_config = GenerationConfig()
    if settings.quantize == "nf4" and compute.device.type == "cpu":
        _keep_nf4_gradients(model)
    return model


def _check_complete(loading_info: dict[str, Any]) -> None:
    """Raise ValueError when transformers filled in random values for weights that are missing or do not fit."""
    if missing := sorted(loading_info["missing_keys"]):
        raise ValueError(f"the weights lack {len(missing)} tensors that config.json requires, such as {missing[0]}")
    if mismatched := sorted(loading_info["mismatched_keys"]):
        name, found, expected = mismatched[0]
        raise ValueError(
            f"{len(mismatched)} tensors do not have the shape that config.json requires, such as {name} with "
            f"{list(found)} instead of {list(expected)}"
        )


def _quantization_config(quantize: str, dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    if quantize == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    if quantize == "nf4":
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    return None


def _keep_nf4_gradients(model: PreTrainedModel) -> None:
    """Stop bitsandbytes from repacking 4-bit weights at the first evaluation on a CPU with AVX512-BF16.

    The kernel for the repacked layout has no backward pass. Once an evaluation has repacked the weights,
    training uses it too, and gradients are lost with only a warning (bitsandbytes 0.50).
    """
    from bitsandbytes.nn.modules import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def hub_identity(settings: Base) -> tuple[str, str | None]:
    """Return the base model's name and revision on the Hub, also for a local folder of the Hub's cache.

    A model that is not from the Hub keeps the name and revision of the settings.
    """
    if settings.model.startswith((".", "/", "~")) and (
        origin := hub_snapshot(local_path(settings.model, "TAGGER_BASE_MODEL"))
    ):
        return origin
    return settings.model, settings.revision


def resolve_weights(settings: Base, *, download_weights: bool = True) -> Path:
    """Return the folder of the base model; download it, or convert a GGUF file, if necessary.

    Without `download_weights`, only config and tokenizer are downloaded, so that a check takes seconds. Weights are
    downloaded as safetensors only, never as pickles, and code is not downloaded. Later steps load from this folder
    and send no further requests to the Hub.

    Raises InvalidInputError when the model cannot be found or read.
    """
    if is_local(settings.model, WEIGHT_SUFFIXES):
        path = check_local(settings.model)
        if path.is_dir():
            return path
        try:
            return cached_gguf_conversion(path)
        except (*LOAD_ERRORS, struct.error) as error:
            raise _load_error("file", settings, error) from error

    import httpx2
    from huggingface_hub import snapshot_download

    def download() -> str:
        patterns = ["*.json", "*.model", "*.txt", "*.jinja", *(["*.safetensors"] if download_weights else [])]
        return snapshot_download(
            settings.model,
            revision=settings.revision,
            allow_patterns=patterns,
            ignore_patterns=["*/*"],
            token=hub.token() or False,
        )

    try:
        folder = hub.retry(download, DOWNLOAD_SECONDS, "download")
        return check_local(folder) if download_weights else Path(folder)
    except (httpx2.HTTPError, OSError, ValueError) as error:
        raise _load_error("files", settings, error) from error


def cached_gguf_conversion(gguf: Path) -> Path:
    """Return a folder with the model of a GGUF file in fp16; convert it at the first call.

    Raises ValueError, OSError or struct.error when the file is damaged.
    """
    from huggingface_hub.constants import HF_HOME

    with gguf.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    folder = Path(HF_HOME, "tagger-job", f"{gguf.stem}-{digest}")
    if not folder.is_dir():
        log.info("converting %s to %s; later runs reuse the folder", gguf.name, folder)
        with atomic_directory(folder, keep_existing=True) as converted:
            _convert_gguf(gguf, converted)
    return folder


def _convert_gguf(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model_files.check_gguf(gguf)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.float32,
        ignore_mismatched_sizes=True,  # refused below; transformers would raise a RuntimeError
        output_loading_info=True,
    )
    dequantized, loading_info = loaded
    _check_complete(loading_info)
    # transformers refuses to save a model whose config still describes the quantization of the GGUF file
    config = dequantized.config.to_dict()
    config.pop("quantization_config", None)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(type(dequantized.config).from_dict(config))
    model.load_state_dict(dequantized.state_dict(), assign=True)
    model.tie_weights()
    model.to(torch.float16).save_pretrained(folder)


def _load_error(what: str, settings: Base, error: Exception) -> InvalidInputError:
    at = f" at revision {settings.revision}" if settings.revision else ""
    reason = " ".join(str(error).split()).removesuffix(".")
    if is_local(settings.model, WEIGHT_SUFFIXES):
        advice = "Set TAGGER_BASE_MODEL to a model whose files are complete and belong together"
    else:
        advice = "Check TAGGER_BASE_MODEL and TAGGER_BASE_REVISION, the network, and that HF_TOKEN may read it"
    return InvalidInputError(f"the {what} of {settings.model}{at} cannot be read: {reason}. {advice}")
