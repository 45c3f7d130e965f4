"""Find out from a checkpoint's files whether its weights are quantized already, and how."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from job.system.paths import hub_snapshot

_KEYS = ("quantization_config", "compression_config", "quantization")
"""Entries of config.json: that of transformers, of compressed-tensors' older versions, and of MLX."""
_DETAILS = ("format", "quant_algo", "fmt", "quant_type", "packing_format")
_SIDE_FILES = {"hf_quant_config.json": "modelopt", "quantize_config.json": "gptq", "quant_config.json": "awq"}
"""Files in which other libraries describe the quantization, with the method that they use."""


@dataclass(frozen=True)
class Quantization:
    """How the weights of a checkpoint are quantized."""

    kind: str
    """The value of TAGGER_BASE_QUANTIZE that loads the checkpoint as it is; empty if none does."""
    description: str


def find_quantization(folder: Path, config: dict[str, Any]) -> Quantization | None:
    """Return what config.json, whose content is `config`, or a file next to it says; None if neither says anything.

    Raises ValueError or OSError when a file is not JSON.
    """
    if (described := next(_entries(config), None)) is not None:
        return _bitsandbytes(described) or Quantization("", _describe(described, "mlx"))
    for name, method in _SIDE_FILES.items():
        if not (folder / name).is_file():
            continue
        content = json.loads((folder / name).read_text(encoding="utf-8"))
        entry = content.get("quantization", content) if isinstance(content, dict) else None
        # ModelOpt also writes the file when only the attention's cache is to be quantized
        if isinstance(entry, dict) and entry.get("quant_algo", method) is not None:
            return Quantization("", _describe(entry, method))
    return None


def _entries(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the descriptions of a quantization in config.json and in the configs of its parts, such as text_config."""
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key in _KEYS:
            if isinstance(entry := part.get(key), dict) and entry:
                yield entry


def _bitsandbytes(entry: dict[str, Any]) -> Quantization | None:
    if entry.get("load_in_8bit") or entry.get("_load_in_8bit"):
        return Quantization("int8", "bitsandbytes, int8")
    if entry.get("load_in_4bit") or entry.get("_load_in_4bit"):
        quant_type = str(entry.get("bnb_4bit_quant_type") or "fp4")  # the default of transformers
        return Quantization("nf4" if quant_type == "nf4" else "", f"bitsandbytes, {quant_type[:20]}")
    return None


def _describe(entry: dict[str, Any], default: str) -> str:
    method = entry.get("quant_method") or default
    details = [entry[key] for key in _DETAILS if isinstance(entry.get(key), str) and entry[key] != method]
    bits = entry.get("bits") or entry.get("w_bit") or entry.get("nbits")
    return ", ".join(str(part)[:40] for part in (method, *details[:1], *([f"{bits} bits"] if bits else [])))


def describe_tensors(names: Iterable[str]) -> Quantization:
    """Return what the names of tensors that hold quantized weights say."""
    names = list(names)
    for suffix, quantization in (
        (".SCB", Quantization("int8", "bitsandbytes, int8")),
        ("bitsandbytes__nf4", Quantization("nf4", "bitsandbytes, nf4")),
        ("bitsandbytes__fp4", Quantization("", "bitsandbytes, fp4")),
    ):
        if any(name.endswith(suffix) for name in names):
            return quantization
    return Quantization("", f"tensors such as {names[0][-80:]}")


def original_model(folder: Path, config: dict[str, Any]) -> str | None:
    """Return the Hub id of the model that was quantized, from the model card or config.json; None if neither tells."""
    names = [*_base_models(folder / "README.md"), config.get("_name_or_path")]
    ids = [name for name in names if isinstance(name, str) and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name)]
    return next((name for name in ids if not _same_repo(name, folder)), None)


def _base_models(card: Path) -> list[Any]:
    """Return the entries of `base_model` in the YAML header of a model card, if there is one."""
    if not card.is_file():
        return []
    parts = card.read_text(encoding="utf-8", errors="replace").split("---\n", 2)
    try:
        header = yaml.safe_load(parts[1]) if len(parts) == 3 and not parts[0] else None
    except yaml.YAMLError:
        return []
    names = header.get("base_model") if isinstance(header, dict) else None
    return names if isinstance(names, list) else [names]


def _same_repo(name: str, folder: Path) -> bool:
    """Return whether a Hub id is that of the folder itself, which some quantizers write into config.json."""
    snapshot = hub_snapshot(folder)
    return name == snapshot[0] if snapshot else Path(name).name == folder.name
