"""The update of the adapters: against torch's own clipping and GradScaler."""

from __future__ import annotations

import pytest
import torch

from job.training.kernels import Kernels
from job.training.optimizer import MAX_GRAD_NORM, LossScale, initial_step, make_optimizer, update_weights


def flat(optimizer: str, factor: float) -> tuple[list[torch.nn.Parameter], torch.Tensor, torch.optim.AdamW]:
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(3, 4)), torch.nn.Parameter(torch.randn(5))]
    gradient = factor * torch.randn(17)
    parameters[0].grad, parameters[1].grad = gradient[:12].view(3, 4), gradient[12:]
    return parameters, gradient, make_optimizer(parameters, Kernels(optimizer=optimizer))  # type: ignore[arg-type]


@pytest.mark.parametrize("kernel", ["foreach", "fused"])
@pytest.mark.parametrize("factor", [0.01, 100.0], ids=["small", "clipped"])
def test_an_update_equals_that_of_torch(kernel: str, factor: float) -> None:
    expected, _, theirs = flat("foreach", factor)
    theirs.param_groups[0]["lr"] = 1e-2
    norm = torch.nn.utils.clip_grad_norm_(expected, MAX_GRAD_NORM)
    theirs.step()
    found, gradient, optimizer = flat(kernel, factor)
    update_weights(optimizer, gradient, grad_norm=float(norm), learning_rate=1e-2)
    for own, other in zip(found, expected, strict=True):
        torch.testing.assert_close(own, other, rtol=0 if kernel == "foreach" else 1e-6, atol=0)


@pytest.mark.parametrize("kernel", ["foreach", "fused"])
def test_a_resumed_optimizer_has_the_state_that_torch_creates(kernel: str) -> None:
    parameters, gradient, optimizer = flat(kernel, 0.01)
    update_weights(optimizer, gradient, grad_norm=0.1, learning_rate=1e-2)
    created = optimizer.state[parameters[0]]["step"]
    resumed = initial_step(parameters[0], Kernels(optimizer=kernel)).fill_(1)  # type: ignore[arg-type]
    assert (resumed, resumed.dtype, resumed.device) == (created, created.dtype, created.device)


def test_the_loss_scale_is_that_of_grad_scaler() -> None:
    parameter = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([parameter], lr=0.0)
    scaler, own = torch.amp.GradScaler("cpu", growth_interval=3), LossScale(enabled=True)
    own.GROWTH_INTERVAL = 3  # type: ignore[misc]
    for finite in (True, True, True, False, True, True, False, True, True, True, True):
        loss = parameter.sum() * (1.0 if finite else torch.inf)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        own.update(finite=finite)
        assert own.scale == scaler.get_scale()
        state = scaler.state_dict()
        assert own.state_dict() == {name: state[name] for name in ("scale", "_growth_tracker")}
    resumed = LossScale(enabled=True)
    resumed.load_state_dict(scaler.state_dict())
    assert resumed.state_dict() == own.state_dict()


def test_without_fp16_nothing_is_scaled_or_kept() -> None:
    scale = LossScale(enabled=False)
    scale.update(finite=False)
    assert (scale.scale, scale.state_dict()) == (1.0, {})
