"""Freeze the base model and prepare it for the training of adapters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def freeze(model: PreTrainedModel) -> None:
    """Freeze every parameter, convert the 1-D ones (norms, biases) to fp32, and make the logits fp32.

    LLM.int8 (Dettmers et al., 2022) keeps norms out of the quantized matmuls; in fp16, norms and biases lose
    precision in the gradients that reach the adapters. 2-D parameters keep their dtype: peft's
    `prepare_model_for_kbit_training` would double the size of a 250,880-token embedding.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        if parameter.ndim == 1:
            parameter.data = parameter.data.to(torch.float32)
    # a hook instead of a wrapping module, which would rename the head and could become a LoRA target
    model.get_output_embeddings().register_forward_hook(_to_fp32)


def _to_fp32(module: torch.nn.Module, inputs: tuple[Any, ...], logits: torch.Tensor) -> torch.Tensor:
    return logits.to(torch.float32)
