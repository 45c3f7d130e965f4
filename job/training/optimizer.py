"""The update of the adapters: clipping, AdamW, and fp16's loss scale."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from job.training.kernels import Kernels

MAX_GRAD_NORM = 1.0


def make_optimizer(parameters: Iterable[torch.nn.Parameter], kernels: Kernels) -> torch.optim.AdamW:
    """Return AdamW (Loshchilov and Hutter, 2019) without weight decay; its learning rate is set for each update."""
    fused = True if kernels.optimizer == "fused" else None
    return torch.optim.AdamW(parameters, lr=0.0, weight_decay=0.0, fused=fused)


def initial_step(parameter: torch.nn.Parameter, kernels: Kernels) -> torch.Tensor:
    """Return the number of updates of a parameter, 0, where the kernel of make_optimizer expects it."""
    return torch.zeros((), device=parameter.device if kernels.optimizer == "fused" else "cpu")


def update_weights(
    optimizer: torch.optim.Optimizer, gradient: torch.Tensor, *, grad_norm: float, learning_rate: float
) -> None:
    """Apply the gradients of the optimizer's parameters, clipped to MAX_GRAD_NORM.

    `gradient` is the buffer that they are views of, `grad_norm` its norm, which the CPU knows: it waits for nothing.
    """
    coefficient = float((MAX_GRAD_NORM / (torch.tensor(grad_norm) + 1e-6)).clamp(max=1.0))
    if coefficient < 1.0:
        gradient.mul_(coefficient)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.step()


class LossScale:
    """The factor of fp16's loss and gradients (Micikevicius et al., 2018), with the rules of torch.amp.GradScaler.

    It is halved when gradients overflow, and doubled after GROWTH_INTERVAL steps in which they do not. GradScaler keeps
    it on the GPU, and the CPU waits for the GPU to learn it; here the CPU knows already whether gradients are finite.
    """

    INITIAL = 2.0**16
    GROWTH_INTERVAL = 2000

    def __init__(self, *, enabled: bool) -> None:
        self._enabled = enabled
        self.scale = self.INITIAL if enabled else 1.0
        self._steps = 0
        """Steps since the last change."""

    def update(self, *, finite: bool) -> None:
        """Change the scale after a step whose gradients were finite or not."""
        if not self._enabled:
            return
        self._steps = self._steps + 1 if finite else 0
        if not finite:
            self.scale /= 2
        elif self._steps == self.GROWTH_INTERVAL:
            self.scale *= 2
            self._steps = 0

    def state_dict(self) -> dict[str, float]:
        """Return the state by the names that GradScaler uses, which checkpoints have; empty if not enabled."""
        return {"scale": self.scale, "_growth_tracker": self._steps} if self._enabled else {}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Set the state; an empty one changes nothing."""
        if state and self._enabled:
            self.scale, self._steps = float(state["scale"]), int(state["_growth_tracker"])
