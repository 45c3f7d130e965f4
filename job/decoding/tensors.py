"""Files of fitted tensors next to an adapter: the same bytes for the same values, checked when they are read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import torch
from pydantic import BaseModel

MAX_BYTES = 8 * 2**30

About = TypeVar("About", bound=BaseModel)


def to_bytes(tensors: Mapping[str, torch.Tensor], about: BaseModel) -> bytes:
    """Return the content of a safetensors file with `about` in its metadata."""
    from safetensors.torch import save

    # one entry only: safetensors writes several in a random order
    content = {name: tensor.contiguous() for name, tensor in tensors.items()}
    return save(content, {"head": about.model_dump_json()})


def read(file: Path, model: type[About], names: tuple[str, ...]) -> tuple[About, dict[str, torch.Tensor]]:
    """Return the metadata and the tensors of a file, which anybody may have written.

    Raises OSError, SafetensorError, or ValueError for other tensors, or tensors that are not finite float32.
    """
    from safetensors import safe_open

    if (size := file.stat().st_size) > MAX_BYTES:
        raise ValueError(f"it has {size} bytes, more than {MAX_BYTES}")
    with safe_open(file, framework="pt") as found:
        about = model.model_validate_json((found.metadata() or {}).get("head", "{}"))
        if (present := set(found.keys())) != set(names):
            raise ValueError(f"its tensors are {sorted(present)[:9]}, not {sorted(names)}")
        # copies, which are aligned as fitted tensors are: a matrix product may round in another way otherwise
        tensors = {name: found.get_tensor(name).clone() for name in names}
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32:
            raise ValueError(f"{name} is {tensor.dtype} instead of float32")
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name} has values that are not finite numbers")
    return about, tensors


def check_shapes(tensors: Mapping[str, torch.Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ValueError for the first tensor of another shape."""
    for name, shape in shapes.items():
        if tuple(tensors[name].shape) != shape:
            raise ValueError(f"{name} has the shape {list(tensors[name].shape)} instead of {list(shape)}")
