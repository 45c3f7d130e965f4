"""The lean forward passes compute what the libraries' own do, and keep less of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from conftest import CPU
from torch.nn import functional

from job.freeze import freeze
from job.lora import add_adapters
from job.quantize import load_model
from job.settings import Base, Lora
from job.system.device import ComputeSpec
from job.training import memory_efficient

IDS = torch.randint(10, 500, (1, 24), generator=torch.Generator().manual_seed(0))


def adapted(folder: Path, quantize: str, machine: ComputeSpec = CPU, dropout: float = 0.0) -> peft.PeftModel:
    model = load_model(Base.model_validate({"model": str(folder), "quantize": quantize}), machine)
    freeze(model)
    model = add_adapters(model, Lora(dropout=dropout), seed=42).train()
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter.data, std=0.1)
    return model


def batch() -> dict[str, torch.Tensor]:
    keep = torch.zeros(IDS.shape, dtype=torch.bool)
    keep[0, 5:20] = True
    return {"input_ids": IDS, "labels": IDS, "shift_labels": IDS[0, 6:21], "logits_to_keep": keep}


def loss_and_gradients(model: peft.PeftModel, machine: ComputeSpec = CPU) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    torch.manual_seed(7)
    with machine.autocast():
        loss = model(**batch(), num_items_in_batch=15, use_cache=False).loss
    loss.backward()
    return float(loss.detach()), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("architecture", ["bloom", "llama"])
@pytest.mark.parametrize(
    ("quantize", "dtype"), [("int8", "fp32"), ("none", "fp32"), ("int8", "bf16"), ("none", "bf16")]
)
def test_loss_and_gradients_are_the_library_s_and_its_forwards_come_back(
    request: pytest.FixtureRequest, architecture: str, quantize: str, dtype: str
) -> None:
    machine = ComputeSpec(torch.device("cpu"), dtype)  # type: ignore[arg-type]
    model = adapted(request.getfixturevalue(architecture), quantize, machine)
    loss, gradients = loss_and_gradients(model, machine)
    with memory_efficient.patched(model):
        own_loss, own = loss_and_gradients(model, machine)
    near = {"rel": 1e-6} if dtype == "fp32" else {"rel": 1e-2}
    assert own_loss == pytest.approx(loss, **near)
    assert own.keys() == gradients.keys()
    for name, gradient in gradients.items():
        if dtype == "fp32":
            torch.testing.assert_close(
                own[name], gradient, rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}"
            )
        else:
            assert functional.cosine_similarity(own[name].flatten(), gradient.flatten(), dim=0) > 0.99, name
    assert loss_and_gradients(model, machine)[0] == loss
    assert not [module for module in model.modules() if "forward" in vars(module)]


def test_dropout_drops_at_its_rate_and_its_gradient_is_that_of_what_was_kept() -> None:
    x = torch.ones(200, 64, requires_grad=True)
    a, b = torch.randn(8, 64, requires_grad=True), torch.randn(32, 8, requires_grad=True)
    torch.manual_seed(3)
    y = memory_efficient._Adapter.apply(x, a, b, 0.25, 2.0)
    torch.manual_seed(3)
    kept = ~torch.empty(x.shape, dtype=torch.bool).bernoulli_(0.25)
    assert 0.23 < 1 - kept.float().mean() < 0.27
    expected = (x * kept / 0.75) @ a.T @ b.T * 2.0
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-3)
    weight = torch.randn_like(y)
    found = torch.autograd.grad((y * weight).sum(), (x, a, b))
    for own, plain in zip(found, torch.autograd.grad((expected * weight).sum(), (x, a, b)), strict=True):
        torch.testing.assert_close(own, plain, rtol=1e-4, atol=1e-3)


def test_the_swiglu_and_the_head_have_the_gradients_that_finite_differences_give() -> None:
    def double(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    torch.manual_seed(0)
    assert torch.autograd.gradcheck(memory_efficient._SwiGLU.apply, (double(3, 5), double(3, 5)))
    hidden, head, labels = torch.randn(6, 8, requires_grad=True), torch.randn(30, 8), torch.tensor([0, 3, 29, 3, 7, 1])
    loss = memory_efficient._HeadLoss.apply(hidden, head, labels) * 0.5
    expected = functional.cross_entropy(hidden @ head.T, labels, reduction="sum") * 0.5
    torch.testing.assert_close(loss, expected)
    (own,), (plain,) = torch.autograd.grad(loss, hidden), torch.autograd.grad(expected, hidden)
    torch.testing.assert_close(own, plain)


def test_in_half_precision_small_probabilities_still_count() -> None:
    torch.manual_seed(0)
    hidden, head = torch.randn(4, 16, requires_grad=True), torch.randn(5000, 16)
    labels = torch.arange(4)
    (exact,) = torch.autograd.grad(functional.cross_entropy(hidden @ head.T, labels, reduction="sum"), hidden)
    (own,) = torch.autograd.grad(memory_efficient._HeadLoss.apply(hidden, head.half(), labels), hidden)
    torch.testing.assert_close(own, exact, rtol=0.02, atol=0.02)


def kept_bytes(step: Callable[[], torch.Tensor]) -> int:
    """Bytes of the distinct tensors that autograd saves for the backward pass."""
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = step()
    assert loss.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("architecture", ["bloom", "llama"])
def test_less_is_kept_for_the_backward_pass(request: pytest.FixtureRequest, architecture: str) -> None:
    model = adapted(request.getfixturevalue(architecture), "none", dropout=0.1)

    def step() -> torch.Tensor:
        loss: torch.Tensor = model(**batch(), num_items_in_batch=15, use_cache=False).loss
        return loss

    weights = sum(p.untyped_storage().nbytes() for p in model.parameters())
    own = kept_bytes(step)
    with memory_efficient.patched(model):
        leaner = kept_bytes(step)
    assert leaner < 0.9 * own, (leaner, own, weights)
