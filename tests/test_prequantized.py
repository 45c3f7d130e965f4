"""The quantization of a checkpoint is found in the files that describe it, and so is the original model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from job.system import prequantized


@pytest.mark.parametrize(
    ("config", "kind", "description"),
    [
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}, "int8", "bitsandbytes, int8"),
        ({"quantization_config": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}}, "nf4", "bitsandbytes, nf4"),
        ({"quantization_config": {"load_in_4bit": True}}, "", "bitsandbytes, fp4"),
        ({"quantization_config": {"quant_method": "fp8", "fmt": "e4m3"}}, "", "fp8, e4m3"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "", "gptq, 4 bits"),
        ({"quantization_config": {"quant_method": "a method of tomorrow"}}, "", "a method of tomorrow"),
        (
            {"quantization_config": {"quant_method": "compressed-tensors", "format": "int-quantized"}},
            "",
            "compressed-tensors, int-quantized",
        ),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, "", "compressed-tensors"),
        ({"text_config": {"quantization_config": {"quant_method": "awq"}}}, "", "awq"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "", "mlx, 4 bits"),
    ],
)
def test_config_json_tells_the_quantization(
    tmp_path: Path, config: dict[str, Any], kind: str, description: str
) -> None:
    assert prequantized.find_quantization(tmp_path, config) == prequantized.Quantization(kind, description)


@pytest.mark.parametrize(
    ("name", "content", "description"),
    [
        ("hf_quant_config.json", {"quantization": {"quant_algo": "FP8"}}, "modelopt, FP8"),
        ("quantize_config.json", {"bits": 4, "group_size": 128}, "gptq, 4 bits"),
        ("quant_config.json", {"w_bit": 4, "q_group_size": 128}, "awq, 4 bits"),
    ],
)
def test_files_of_other_libraries_tell_the_quantization(
    tmp_path: Path, name: str, content: dict[str, Any], description: str
) -> None:
    (tmp_path / name).write_text(json.dumps(content))
    assert prequantized.find_quantization(tmp_path, {}) == prequantized.Quantization("", description)


@pytest.mark.parametrize("config", [{}, {"quantization_config": None}, {"text_config": {"hidden_size": 8}}])
def test_plain_weights_have_no_quantization(tmp_path: Path, config: dict[str, Any]) -> None:
    only_the_cache = {"quantization": {"quant_algo": None, "kv_cache_quant_algo": "FP8"}}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(only_the_cache))
    assert prequantized.find_quantization(tmp_path, config) is None


@pytest.mark.parametrize(
    ("card", "config", "original"),
    [
        ("---\nbase_model: tiny/llama\n---\ntext", {}, "tiny/llama"),
        ("---\nlicense: mit\nbase_model:\n- tiny/llama\n- tiny/other\n---\n", {}, "tiny/llama"),
        (None, {"_name_or_path": "tiny/llama"}, "tiny/llama"),
        (None, {"_name_or_path": "/home/ada/llama"}, None),
        ("---\nbase_model: [\n---\n", {}, None),
        ("no header\n---\nbase_model: tiny/llama\n---\n", {}, None),
        ("---\nbase_model: tiny/quantized\n---\n", {"_name_or_path": "tiny/quantized"}, None),
    ],
)
def test_the_original_model_is_read_from_card_or_config(
    tmp_path: Path, card: str | None, config: dict[str, Any], original: str | None
) -> None:
    folder = tmp_path / "quantized"
    folder.mkdir()
    if card is not None:
        (folder / "README.md").write_text(card)
    assert prequantized.original_model(folder, config) == original
