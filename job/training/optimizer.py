"""The optimizer of the adapters, and one update of them."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from job.training.kernels import Kernels

MAX_GRAD_NORM = 1.0


def make_optimizer(parameters: Iterable[torch.nn.Parameter], kernels: Kernels) -> torch.optim.AdamW:
    """Return AdamW (Loshchilov and Hutter, 2019) without weight decay; its learning rate is set for each update."""
    fused = True if kernels.optimizer == "fused" else None
    return torch.optim.AdamW(parameters, lr=0.0, weight_decay=0.0, fused=fused)


def update_weights(
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    parameters: Iterable[torch.nn.Parameter],
    learning_rate: float,
) -> float:
    """Apply the clipped gradients; return their norm before clipping, which is not finite if fp16 overflowed."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    scaler.unscale_(optimizer)
    norm = float(torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM))
    scaler.step(optimizer)
    scaler.update()
    return norm
