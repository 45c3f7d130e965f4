"""What cannot be merged into the base model is found before training."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import make_settings
from test_quantize import make_bitsandbytes

from job.merge import merge_problems


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings")
@pytest.mark.parametrize(("targets", "module"), [("q_proj,lm_head", "lm_head"), ("embed_tokens", "model.embed_tokens")])
def test_adapters_on_tied_weights_are_reported(llama: Path, tmp_path: Path, targets: str, module: str) -> None:
    [problem] = merge_problems(make_settings(llama, tmp_path, lora={"targets": targets}))
    assert f"cannot merge an adapter into {module}, because embedding and head share their weights" in problem


def test_adapters_on_other_layers_can_be_merged(llama: Path, tmp_path: Path) -> None:
    for lora in ({}, {"targets": "all-linear"}):
        assert merge_problems(make_settings(llama, tmp_path, lora=dict(lora))) == []


def test_a_quantized_checkpoint_has_no_weights_to_merge_into(llama: Path, tmp_path: Path) -> None:
    folder = make_bitsandbytes(llama, tmp_path / "nf4", "nf4")
    [problem] = merge_problems(make_settings(folder, tmp_path, base={"quantize": "nf4"}))
    assert "needs the base model's original weights" in problem
