"""The loss of a micro-batch: cross-entropy of the label tokens, computed here from the logits of any architecture."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

from job.dataset.tokenization import IGNORE_INDEX

if TYPE_CHECKING:
    import peft

LINEAR_HEAD_ARCHITECTURES = ("bloom", "llama", "qwen2")
"""Architectures whose logits are the product of the last hidden state and the head, and nothing else."""


def mean_loss(
    model: peft.PeftModel,
    batch: Mapping[str, torch.Tensor],
    *,
    label_tokens: int | torch.Tensor,
    padded_labels: bool = False,
) -> torch.Tensor:
    """Return the fp32 cross-entropy of a micro-batch of `batching.Collator`, summed and divided by `label_tokens`.

    With `padded_labels`, some of its `shift_labels` may be IGNORE_INDEX, which carry no loss.

    The models' own losses are not used: some ignore `shift_labels` or the number of label tokens, and those of
    mixtures of experts add a loss that balances routers, which are frozen here.
    """
    base: Any = model.get_base_model()
    parameters = inspect.signature(type(base).forward).parameters
    labels = batch["shift_labels"]
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask") if name in batch}
    if "position_ids" in batch and "position_ids" in parameters:  # BLOOM has ALiBi and takes none
        inputs["position_ids"] = batch["position_ids"]
    if has_linear_head(base):
        states = base.base_model(**inputs, use_cache=False).last_hidden_state
        hidden = states.flatten(0, 1).index_select(0, batch["kept"])
        head = base.get_output_embeddings().weight
        summed = LinearCrossEntropyFunction.apply(hidden, head, labels, padded_labels)  # type: ignore[no-untyped-call]
    else:
        keep = batch["logits_to_keep"]
        selection = {"logits_to_keep": keep} if "logits_to_keep" in parameters else {}
        logits = base(**inputs, **selection, use_cache=False).logits
        logits = logits[keep] if logits.ndim == keep.ndim + 1 else logits  # a mask flattens rows and positions
        summed = functional.cross_entropy(logits.float(), labels, reduction="sum")
    loss: torch.Tensor = summed / label_tokens
    return loss


def has_linear_head(model: Any) -> bool:
    """Return whether the logits are known to be `hidden @ head.T`, so that LinearCrossEntropyFunction applies."""
    if model.config.model_type not in LINEAR_HEAD_ARCHITECTURES:
        return False
    head = model.get_output_embeddings()
    return type(head) is torch.nn.Linear and head.bias is None


class LinearCrossEntropyFunction(torch.autograd.Function):
    """Compute the summed cross-entropy of `hidden @ head.T` with one buffer of fp32 logits, [rows, vocabulary].

    `hidden` is [rows, size], `head` [vocabulary, size] and frozen, `labels` int64 [rows]. The forward pass
    turns the logits in place into their gradient, softmax minus one-hot, and saves only the gradient of
    `hidden`. Autograd saves the logits, their log-softmax and the gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, head: torch.Tensor, labels: torch.Tensor, padded: bool = False
    ) -> torch.Tensor:
        carries_loss = (labels != IGNORE_INDEX) if padded else None
        labels = labels.clamp(min=0) if padded else labels
        with torch.autocast(hidden.device.type, enabled=False):
            logits = (hidden.to(head.dtype) @ head.T).float()
            total = logits.logsumexp(1)
            losses = total - logits.gather(1, labels[:, None])[:, 0]
            loss = (losses if carries_loss is None else losses * carries_loss).sum()
            if ctx.needs_input_grad[0]:
                grad = logits.sub_(total[:, None]).exp_()
                grad[torch.arange(len(labels), device=grad.device), labels] -= 1.0
                if carries_loss is not None:
                    grad.mul_(carries_loss[:, None])
                # most of 250,880 probabilities are below 6e-8, the smallest number of fp16
                loss_scale = 1024.0 if head.dtype == torch.float16 else 1.0
                grad_hidden = (grad.mul_(loss_scale).to(head.dtype) @ head).float().div_(loss_scale)
                ctx.save_for_backward(grad_hidden.to(hidden.dtype))
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (grad_hidden,) = ctx.saved_tensors
        return grad_hidden * grad.to(grad_hidden.dtype), None, None, None
