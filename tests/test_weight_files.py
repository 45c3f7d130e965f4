"""Damaged weight files are found by their headers alone, and named."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from job.system import weight_files
from job.system.weight_files import TensorHeader


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    tensors = {"a.weight": torch.zeros(2, 3), "b.weight": torch.zeros(4, dtype=torch.bfloat16)}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path


def test_headers_have_dtype_and_shape(weights: Path) -> None:
    expected = {"a.weight": TensorHeader("F32", (2, 3)), "b.weight": TensorHeader("BF16", (4,))}
    assert weight_files.read_headers(weights) == expected


@pytest.mark.parametrize("size", [0, 7, 8, 20, -1])
def test_a_truncated_file_is_refused(weights: Path, size: int) -> None:
    file = weights / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"^model.safetensors is damaged"):
        weight_files.read_headers(weights)


@pytest.mark.parametrize(
    "header", [b"[]", b"\xff\xff", b'{"a": 3}', b'{"a": {"dtype": "F32", "shape": 3}}', b'{"a": {"dtype": "F32"}}']
)
def test_a_header_that_is_none_is_refused(weights: Path, header: bytes) -> None:
    (weights / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(ValueError, match=r"^model.safetensors is damaged: its header is not that"):
        weight_files.read_headers(weights)


def test_files_under_other_names_are_refused(weights: Path) -> None:
    (weights / "model.safetensors").rename(weights / "consolidated.safetensors")
    with pytest.raises(ValueError, match=r"model.safetensors is missing, and there is only consolidated.safetensors"):
        weight_files.read_headers(weights)


def test_the_index_decides_which_files_are_read(weights: Path) -> None:
    (weights / "model.safetensors").rename(weights / "part.safetensors")
    (weights / "other.safetensors").write_bytes(b"not read")
    index = {"metadata": {}, "weight_map": {"a.weight": "part.safetensors", "b.weight": "part.safetensors"}}
    (weights / "model.safetensors.index.json").write_text(json.dumps(index))
    assert weight_files.read_headers(weights).keys() == {"a.weight", "b.weight"}


def test_quantized_tensors_are_found_by_dtype_and_by_name() -> None:
    headers = {
        "h.0.weight": TensorHeader("I8", (2, 2)),
        "h.1.weight": TensorHeader("F8_E4M3", (2, 2)),
        "h.2.weight": TensorHeader("BF16", (2, 2)),
        "h.2.weight_scale": TensorHeader("F32", (2,)),
        "h.3.experts.gate_up_proj": TensorHeader("U8", (2, 2)),
        "h.attn.bias": TensorHeader("U8", (2, 2)),
        "embeddings.position_ids": TensorHeader("I64", (2,)),
        "router.scales": TensorHeader("F32", (2,)),
    }
    expected = ["h.0.weight", "h.1.weight", "h.2.weight_scale", "h.3.experts.gate_up_proj"]
    assert weight_files.quantized_tensors(headers, {"h.2.weight_scale", "h.attn.bias"}) == expected
