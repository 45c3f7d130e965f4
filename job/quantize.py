"""The base model and its tokenizer: found, read from safetensors or GGUF, quantized."""

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
from job.system.paths import WEIGHT_SUFFIXES, hub_snapshot, is_local, local_path

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from job.system.device import ComputeSpec

log = logging.getLogger(__name__)

LOAD_ERRORS = (
    *(OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError),
    *(SafetensorError, StrictDataclassError),
)
"""What transformers raises for files that are damaged, or that are no model."""
DOWNLOAD_SECONDS = 600.0
"""How long a download keeps trying; what has arrived is kept between tries."""


def check_local(model: str) -> Path:
    """The folder or file of a local model; raises InvalidInputError unless it holds weights this job reads."""
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
    """The base model's tokenizer, with a pad token.

    A tokenizer without one pads with its end-of-sequence token; the attention mask and the labels,
    not the token, say what is padding.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            resolve_weights(settings, weights=False), trust_remote_code=False
        )
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
    """The base model's shape: its modules on the meta device, without weights or memory."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(resolve_weights(settings, weights=False), trust_remote_code=False)
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except LOAD_ERRORS as error:
        raise _load_error("config.json", settings, error) from error
    return model


def load_model(settings: Base, machine: ComputeSpec) -> PreTrainedModel:
    """The base model on the machine's device: linear layers quantized as set; the rest, the head too, in its dtype."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            resolve_weights(settings),
            dtype=machine.dtype,
            quantization_config=_quantization_config(settings.quantize, machine.dtype),
            device_map={"": machine.device},
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except torch.OutOfMemoryError:
        raise
    except LOAD_ERRORS as error:
        raise _load_error("model", settings, error) from error
    model: PreTrainedModel = loaded[0]
    if missing := sorted(loaded[1]["missing_keys"]):
        raise InvalidInputError(
            f"the weights of {settings.model} lack {len(missing)} tensors that its config.json asks for, such as "
            f"{missing[0]}; expected all of them. Name a model whose files belong together"
        )
    # generation is as the settings say, whatever penalties or sampling the base model ships with
    model.generation_config = GenerationConfig()
    if settings.quantize == "nf4" and machine.device.type == "cpu":
        _keep_gradients_of_nf4(model)
    return model


def _quantization_config(quantize: str, dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    if quantize == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    if quantize == "nf4":
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    return None


def _keep_gradients_of_nf4(model: PreTrainedModel) -> None:
    """Stop bitsandbytes from repacking 4-bit weights at the first evaluation on a CPU with AVX512-BF16.

    The kernel for the repacked layout has no backward pass, and is used in training too once it was
    used in evaluation: gradients would be lost with no more than a warning (bitsandbytes 0.50).
    """
    from bitsandbytes.nn.modules import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def hub_identity(settings: Base) -> tuple[str, str | None]:
    """The name and revision by which others find the base model: those on the Hub, wherever it was read from."""
    if settings.model.startswith((".", "/", "~")) and (
        origin := hub_snapshot(local_path(settings.model, "TAGGER_BASE_MODEL"))
    ):
        return origin
    return settings.model, settings.revision


def resolve_weights(settings: Base, *, weights: bool = True) -> Path:
    """The folder that the base model is loaded from, downloaded or converted if it must be.

    Without `weights` config and tokenizer are enough: a check downloads no gigabytes. Only safetensors
    are downloaded, never pickles or code. Loading from a folder also keeps every later step from
    asking the Hub for what is here already.
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
        patterns = ["*.json", "*.model", "*.txt", "*.jinja", *(["*.safetensors"] if weights else [])]
        return snapshot_download(
            settings.model,
            revision=settings.revision,
            allow_patterns=patterns,
            ignore_patterns=["*/*"],
            token=hub.token() or False,
        )

    try:
        folder = hub.retry(download, DOWNLOAD_SECONDS, "download")
        return check_local(folder) if weights else Path(folder)
    except (httpx2.HTTPError, OSError, ValueError) as error:
        raise _load_error("files", settings, error) from error


def cached_gguf_conversion(gguf: Path) -> Path:
    """The folder with a GGUF file's model in half precision, made at the first call and then reused."""
    from huggingface_hub.constants import HF_HOME

    with gguf.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    folder = Path(HF_HOME, "tagger-job", f"{gguf.stem}-{digest}")
    if not folder.is_dir():
        log.info("converting %s, once, to %s", gguf.name, folder)
        with atomic_directory(folder, keep_existing=True) as converted:
            _convert(gguf, converted)
    return folder


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
    read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # a model read from GGUF refuses to be saved: its config still says how it was quantized
    config = read.config.to_dict()
    config.pop("quantization_config", None)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(type(read.config).from_dict(config))
    model.load_state_dict(read.state_dict(), assign=True)
    model.tie_weights()
    model.to(torch.float16).save_pretrained(folder)


def _load_error(what: str, settings: Base, error: Exception) -> InvalidInputError:
    at = f" at revision {settings.revision}" if settings.revision else ""
    reason = " ".join(str(error).split())
    return InvalidInputError(
        f"the {what} of {settings.model}{at} cannot be read: {reason} "
        "Check TAGGER_BASE_MODEL and TAGGER_BASE_REVISION, the network, and that HF_TOKEN may read it"
    )
