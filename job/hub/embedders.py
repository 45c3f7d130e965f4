"""The files of the embedding model that TAGGER_EVAL_EMBEDDER names: local, or downloaded from the Hub."""

from __future__ import annotations

import json
from pathlib import Path

from huggingface_hub.errors import LocalEntryNotFoundError
from pydantic import BaseModel, TypeAdapter, ValidationError

from job.errors import InvalidInputError
from job.hub import client as hub
from job.hub.weights import DOWNLOAD_SECONDS, shorten
from job.settings import Eval
from job.system.paths import is_local, local_path

MODULES = "modules.json"
_OWN_MODULES = "sentence_transformers."
_PATTERNS = ["*.json", "*.txt", "*.model", "*.safetensors"]


class _Module(BaseModel):
    """An entry of modules.json that is used here."""

    type: str


def check_folder(name: str, folder: Path) -> Path:
    """Return the folder of an embedding model, of which no code and no pickle would be read.

    Raises InvalidInputError unless it is one of sentence-transformers with safetensors.
    """
    try:
        modules = TypeAdapter(list[_Module]).validate_python(json.loads((folder / MODULES).read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise _unsuitable(name, f"has no {MODULES}") from None
    except (OSError, ValueError) as error:
        reason = "it is not a list of modules" if isinstance(error, ValidationError) else shorten(str(error))
        raise _unsuitable(name, f"has a {MODULES} that cannot be read ({reason})") from None
    if foreign := sorted(module.type for module in modules if not module.type.startswith(_OWN_MODULES)):
        raise _unsuitable(name, f"needs code that is not part of the library ({foreign[0]}), which is not run")
    if not list(folder.glob("**/*.safetensors")):
        raise _unsuitable(name, "has no weights in safetensors, and pickles are not read because they can run code")
    return folder


def _unsuitable(name: str, why: str) -> InvalidInputError:
    return InvalidInputError(
        f"the embedding model {name} {why}; set TAGGER_EVAL_EMBEDDER to a model of sentence-transformers, such as "
        "sentence-transformers/all-MiniLM-L6-v2, or leave it empty"
    )


def resolve_embedder(settings: Eval) -> Path | None:
    """Return the folder of the embedding model, downloaded if necessary; None if there is none in the settings.

    Raises InvalidInputError when it cannot be found or read.
    """
    name = settings.embedder
    if name is None:
        return None
    if is_local(name, ()):
        return check_folder(name, local_path(name, "TAGGER_EVAL_EMBEDDER"))

    import httpx2
    from huggingface_hub import snapshot_download

    def download() -> str:
        hub.bound_requests()
        return snapshot_download(
            name,
            revision=settings.embedder_revision,
            allow_patterns=_PATTERNS,
            ignore_patterns=["onnx/*", "openvino/*"],
            token=hub.token() or False,
        )

    try:
        return check_folder(name, Path(hub.retry(download, DOWNLOAD_SECONDS, "download")))
    except LocalEntryNotFoundError:
        raise _unreadable(name, "it is not in the cache, and the Hub is not asked") from None
    except (httpx2.HTTPError, OSError, ValueError) as error:
        raise _unreadable(name, hub.error_message(error)) from error


def _unreadable(name: str, why: str) -> InvalidInputError:
    return InvalidInputError(
        f"the embedding model {name} (TAGGER_EVAL_EMBEDDER) cannot be read: {why}; check the network and HF_TOKEN, or "
        "leave the setting empty"
    )
