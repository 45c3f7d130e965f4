"""Freeze the base model, and make it ready for adapters to be trained on it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def freeze(model: PreTrainedModel) -> None:
    """Freeze every parameter, hold the 1-D ones in fp32, and let the logits leave in fp32.

    LLM.int8 (Dettmers et al., 2022) keeps norms out of its matrix products, and norms and biases in
    half precision lose what little gradient flows to the adapters. The 2-D parameters stay as they
    are: peft's own preparation would double the embedding of a 250,880-token vocabulary.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        if parameter.ndim == 1:
            parameter.data = parameter.data.to(torch.float32)
    # a hook and not a wrapping module, which would rename the head and attract an adapter
    model.get_output_embeddings().register_forward_hook(_to_fp32)


def _to_fp32(module: torch.nn.Module, inputs: tuple[Any, ...], logits: torch.Tensor) -> torch.Tensor:
    return logits.to(torch.float32)
