"""The files of the base model: local, downloaded or converted from GGUF, and the errors about them."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import struct
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from job.errors import InvalidInputError
from job.hub import client as hub
from job.runs.atomic import atomic_directory
from job.settings import Base
from job.system import model_files
from job.system.compatibility import UnsuitableModelError
from job.system.paths import WEIGHT_SUFFIXES, hub_snapshot, is_local, local_path
from job.system.progress import Progress

log = logging.getLogger(__name__)

LOAD_ERRORS = (OSError, ValueError, SafetensorError, StrictDataclassError)
"""Errors that damaged, foreign or missing files raise once `model_files` has checked them.

TypeError, KeyError and the like are not among them: those are defects, and end the job with a traceback.
"""
MAX_REASON = 140
"""Most characters of a library's message within an error of ours."""
_ABOUT_CODE = re.compile(r"remote_code|custom code|inspect the repository|pip install")
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
    if (path / "adapter_config.json").is_file():
        raise adapter_in_folder(model, path)
    if not (path / "config.json").is_file():
        raise InvalidInputError(
            f"{model} has no config.json (TAGGER_BASE_MODEL); expected a folder written by save_pretrained"
        )
    if not list(path.glob("*.safetensors")):
        pickles = ", ".join(sorted(file.name for file in [*path.glob("*.bin"), *path.glob("*.pt")])[:2])
        why = f"only {pickles}, and pickles are not read because they can run code" if pickles else "none"
        raise InvalidInputError(
            f"{model} has no weights in safetensors ({why}); convert it with save_pretrained, or name another model"
        )
    return path


def adapter_in_folder(model: str, folder: Path) -> InvalidInputError:
    """Return the error for a folder with an adapter, of which transformers would load base model and adapter."""
    try:
        base = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, LookupError, TypeError):
        base = None
    instead = f"its base model, {base[:100]}" if isinstance(base, str) and base else "its base model"
    return InvalidInputError(
        f"{model} has an adapter in it (adapter_config.json), and adapters are trained on a base model without one; "
        f"set TAGGER_BASE_MODEL to {instead}, or merge the adapter and save the model to another folder"
    )


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
            raise load_error("file", settings, error) from error

    import httpx2
    from huggingface_hub import snapshot_download

    hub.bound_requests()

    def download() -> str:
        hub.bound_requests()
        patterns = [
            "*.json",
            "*.model",
            "*.txt",
            "*.jinja",
            "README.md",
            *(["*.safetensors"] if download_weights else []),
        ]
        with Progress("download", 0, "B") as progress:
            return snapshot_download(
                settings.model,
                revision=settings.revision,
                allow_patterns=patterns,
                ignore_patterns=["*/*"],
                token=hub.token() or False,
                tqdm_class=hub.bytes_reported_to(progress),
            )

    try:
        folder = hub.retry(download, DOWNLOAD_SECONDS, "download")
        return check_local(folder) if download_weights else Path(folder)
    except (httpx2.HTTPError, OSError, ValueError) as error:
        raise load_error("files", settings, error) from error


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
    check_complete(loading_info)
    # transformers refuses to save a model whose config still describes the quantization of the GGUF file
    config = dequantized.config.to_dict()
    config.pop("quantization_config", None)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(type(dequantized.config).from_dict(config))
    model.load_state_dict(dequantized.state_dict(), assign=True)
    model.tie_weights()
    model.to(torch.float16).save_pretrained(folder)


def check_complete(loading_info: dict[str, Any]) -> None:
    """Raise ValueError when transformers filled in random values for weights that are missing or do not fit."""
    if missing := sorted(loading_info["missing_keys"]):
        raise ValueError(f"the weights lack {len(missing)} tensors that config.json requires, such as {missing[0]}")
    if mismatched := sorted(loading_info["mismatched_keys"]):
        name, found, expected = mismatched[0]
        raise ValueError(
            f"{len(mismatched)} tensors do not have the shape that config.json requires, such as {name} with "
            f"{list(found)} instead of {list(expected)}"
        )


def _cache_of(model: str) -> Path | None:
    """Return the folder of a Hub id, or of a snapshot folder, in the Hugging Face cache; None if there is none."""
    from huggingface_hub.constants import HF_HUB_CACHE

    if is_local(model, WEIGHT_SUFFIXES):
        return Path(model).absolute().parents[1] if hub_snapshot(Path(model)) else None
    folder = Path(HF_HUB_CACHE, f"models--{model.replace('/', '--')}")
    return folder if folder.is_dir() else None


def load_error(what: str, settings: Base, error: Exception) -> InvalidInputError:
    at = f" at revision {settings.revision[:12]}" if settings.revision else ""
    if isinstance(error, UnsuitableModelError):
        return InvalidInputError(f"{settings.model}{at} cannot be trained: {str(error).removesuffix('.')}")
    if is_network_error(error):
        advice = "check the network, HF_ENDPOINT, and that HF_TOKEN may read it"
    elif isinstance(error, OSError) and error.errno is not None:
        advice = "check the disk, and the permissions of its files"
    elif is_local(settings.model, WEIGHT_SUFFIXES):
        advice = "set TAGGER_BASE_MODEL to a model whose files are complete and belong together"
    else:
        advice = "set TAGGER_BASE_MODEL or TAGGER_BASE_REVISION to a model whose files are complete"
    if isinstance(error, (ValueError, SafetensorError)) and (cached := _cache_of(settings.model)):
        advice = f"if a download was cut off, remove {cached}: it is downloaded again. Or {advice}"
    return InvalidInputError(f"the {what} of {settings.model}{at} cannot be read: {shorten(str(error))}; {advice}")


def is_network_error(error: BaseException) -> bool:
    """Return whether the Hub did not serve a file: the network, the token or the service failed."""
    import httpx2
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    from job.hub.answers import HubAnswerError

    return isinstance(error, (httpx2.HTTPError, HubAnswerError, LocalEntryNotFoundError, OfflineModeIsEnabled))


def shorten(message: str) -> str:
    """Return the first sentences of a library's message, on one line of at most MAX_REASON characters.

    Advice to run code from the model's repository is left out, because this job never does that.
    """
    text = " ".join(message.split())
    sentences = [part for part in re.split(r"(?<=[.!?]) (?=[A-Z`'])", text) if not _ABOUT_CODE.search(part)]
    kept = ""
    for sentence in sentences:
        if kept and len(kept) + len(sentence) >= MAX_REASON:
            break
        kept = f"{kept} {sentence}".lstrip()
    kept = kept or "it needs code from its repository, which is not run"
    return kept.rstrip(" .") if len(kept) <= MAX_REASON else f"{kept[: MAX_REASON - 1].rstrip(' .,;:')}…"
