"""Read the weights' headers in safetensors files, and find tensors that are damaged, quantized or not finite.

Nothing here imports torch before tensors themselves are read.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from job.system.compatibility import UnsuitableModelError

if TYPE_CHECKING:
    import torch

SINGLE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_HEADER = 100_000_000
"""Most bytes of a header that the safetensors library reads."""
FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")
_QUANTIZATION_NAME = re.compile(
    r"(?:^|[._:])(?:"
    r"q(?:uant_)?weight|dqweight|qdata|W_q|weight_packed|\w+_proj_blocks|codes|codebooks|indices|centroids"
    r"|SCB|absmax|nested_absmax|quant_map|nested_quant_map|quant_state\.bitsandbytes__\w+|weight_format"
    r"|qzeros|zeros|qscales?|scales|qbiases|g_idx|\w+_proj_scales|weight\._(?:data|scale|shift)|qscale_\w+"
    r"|weight_(?:scales?|scale_inv|scale_2|scale_and_zero|global_scale|per_tensor_scale|zero_point|shape|g_idx)"
    r"|(?:input|activation|output|act_pre|pre_quant|k|v)_scale|(?:input|output)_zero_point|scale_inv|scale_weight"
    r")$"
)
"""Names of the tensors in which formats of quantized weights store codes, scales and zero points."""


@dataclass(frozen=True)
class TensorHeader:
    """What a safetensors file says of a tensor."""

    dtype: str
    """The file format's name, such as BF16 or F8_E4M3."""
    shape: tuple[int, ...]


def file_names(folder: Path) -> list[str]:
    """Return the names of the files with the model's weights, as transformers chooses them.

    Raises ValueError when neither model.safetensors nor an index says which files they are, or OSError.
    """
    if (folder / SINGLE_FILE).is_file() or not (folder / INDEX).is_file():
        return [SINGLE_FILE]
    weight_map = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
    return sorted(set(weight_map.values()))


def read_headers(folder: Path) -> dict[str, TensorHeader]:
    """Return the header of each tensor, by name.

    Raises ValueError, with the name of the file, when a file is missing or damaged.
    """
    headers: dict[str, TensorHeader] = {}
    for name in file_names(folder):
        if not (folder / name).is_file():
            if name != SINGLE_FILE:
                raise ValueError(f"{name}, which {INDEX} lists, is missing")
            others = ", ".join(sorted(path.name for path in folder.glob("*.safetensors"))[:2])
            raise ValueError(f"{name} is missing{f', and there is only {others}' if others else ''}")
        headers |= read_header(folder / name)
    return headers


def read_header(path: Path) -> dict[str, TensorHeader]:
    """Return the header of each tensor in a file; raises ValueError when the file is damaged or incomplete."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(size - 8, MAX_HEADER):
            raise ValueError(f"{path.name} is damaged or incomplete: it has {size} bytes and no complete header")
        try:
            entries = json.loads(file.read(length))
            entries.pop("__metadata__", None)
            headers = {
                name: TensorHeader(str(entry["dtype"]), tuple(map(int, entry["shape"])))
                for name, entry in entries.items()
            }
            end = max((int(entry["data_offsets"][1]) for entry in entries.values()), default=0)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(f"{path.name} is damaged: its header is not that of a safetensors file") from error
    if size != 8 + length + end:
        raise ValueError(f"{path.name} is damaged or incomplete: it has {size} bytes instead of {8 + length + end}")
    return headers


def quantized_tensors(headers: Mapping[str, TensorHeader], unexpected: Iterable[str] = ()) -> list[str]:
    """Return the names of the tensors that hold the codes, scales or zero points of quantized weights.

    All are judged by their dtype. Only those that the model does not have, `unexpected`, are judged by their name.
    """
    codes = {name for name, header in headers.items() if _holds_codes(name, header.dtype)}
    return sorted(codes | {name for name in unexpected if _QUANTIZATION_NAME.search(name)})


def _holds_codes(name: str, dtype: str) -> bool:
    """Return whether a tensor of this dtype is not what it should be: numbers that the model computes with.

    Integers are also the dtype of positions (I64) and of the causal masks that GPT-2 calls bias.
    """
    if dtype in FLOAT_DTYPES:
        return False
    leaf = name.rpartition(".")[2]
    return leaf == "weight" or dtype.startswith(("F8", "F6", "F4")) or (dtype not in ("BOOL", "I64") and leaf != "bias")


def check_finite(folder: Path, dtype: torch.dtype, remedy: str) -> None:
    """Check that every weight is finite, and stays so in `dtype`; if not, `remedy` says what to do.

    Reads the files tensor by tensor, so that loading them afterwards finds them in the page cache.
    Raises UnsuitableModelError with the name of the first tensor that is not finite.
    """
    import torch
    from safetensors import safe_open

    largest = torch.finfo(dtype).max
    for name in file_names(folder):
        try:
            with safe_open(folder / name, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 - the file is not a mapping
                    _check_tensor(name, key, file.get_tensor(key), largest, remedy)
        except SafetensorError as error:
            raise ValueError(f"{name} is damaged: {error}") from error


def _check_tensor(file: str, name: str, tensor: torch.Tensor, largest: float, remedy: str) -> None:
    import torch

    if not tensor.is_floating_point() or tensor.numel() == 0 or tensor.dtype.itemsize < 2:
        return
    low, high = (float(value) for value in torch.aminmax(tensor))
    if -largest <= low and high <= largest:  # False for NaN, which aminmax returns if there is one
        return
    finite = torch.isfinite(tensor)
    if bad := int((~finite).sum()):
        raise UnsuitableModelError(
            f"{bad} of {tensor.numel()} values of the tensor {name} in {file} are NaN or infinite; "
            "choose another model or revision"
        )
    raise UnsuitableModelError(
        f"the tensor {name} in {file} has values up to {max(-low, high):.3g}, more than {largest:.3g}: {remedy}"
    )
