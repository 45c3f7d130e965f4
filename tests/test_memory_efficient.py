"""The memory-efficient forward passes compute what the libraries' own do, and save less for the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from conftest import CPU
from peft.tuners.lora import LoraLayer
from tiny_training import make_model
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM

from job.system.device import ComputeSpec
from job.training import dropout, memory_efficient
from job.training.dropout import DropoutKeys
from job.training.loss import mean_loss

IDS = torch.randint(10, 500, (1, 24), generator=torch.Generator().manual_seed(0))


def batch() -> dict[str, torch.Tensor]:
    keep = torch.zeros(IDS.shape, dtype=torch.bool)
    keep[0, 5:20] = True
    kept = keep.flatten().nonzero().flatten()
    return {"input_ids": IDS, "shift_labels": IDS[0, 6:21], "logits_to_keep": keep, "kept": kept}


def library_loss(model: peft.PeftModel) -> torch.Tensor:
    loss: torch.Tensor = model(**batch(), labels=IDS, num_items_in_batch=15, use_cache=False).loss
    return loss


def own_loss(model: peft.PeftModel) -> torch.Tensor:
    return mean_loss(model, batch(), label_tokens=15)


def loss_and_gradients(
    model: peft.PeftModel, loss_of: Callable[[peft.PeftModel], torch.Tensor], compute: ComputeSpec = CPU
) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    torch.manual_seed(7)
    with compute.autocast():
        loss = loss_of(model)
    loss.backward()
    return float(loss.detach()), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(own: dict[str, torch.Tensor], gradients: dict[str, torch.Tensor]) -> None:
    assert own.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(own[name], gradient, rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("architecture", ["bloom", "llama"])
@pytest.mark.parametrize(
    ("quantize", "dtype"), [("int8", "fp32"), ("none", "fp32"), ("int8", "bf16"), ("none", "bf16")]
)
def test_loss_and_gradients_equal_the_libraries_until_restored(
    request: pytest.FixtureRequest, architecture: str, quantize: str, dtype: str
) -> None:
    compute = ComputeSpec(torch.device("cpu"), dtype)  # type: ignore[arg-type]
    model = make_model(request.getfixturevalue(architecture), quantize, std=0.1, compute=compute).train()
    loss, gradients = loss_and_gradients(model, library_loss, compute)
    with memory_efficient.patched(model):
        found_loss, own = loss_and_gradients(model, own_loss, compute)
    assert found_loss == pytest.approx(loss, rel=1e-6 if dtype == "fp32" else 1e-2)
    if dtype == "fp32":
        assert_same_gradients(own, gradients)
    else:
        assert own.keys() == gradients.keys()
        for name, gradient in gradients.items():
            assert functional.cosine_similarity(own[name].flatten(), gradient.flatten(), dim=0) > 0.99, name
    assert loss_and_gradients(model, library_loss, compute)[0] == loss
    assert not [module for module in model.modules() if "forward" in vars(module)]


@pytest.mark.parametrize(
    ("quantize", "lora", "own_forwards"),
    [
        *((quantize, {"use_rslora": True, "r": 4}, True) for quantize in ("none", "int8", "nf4")),
        *((quantize, {"init": "gaussian", "targets": ("all-linear",)}, True) for quantize in ("none", "int8", "nf4")),
        ("none", {"init": "orthogonal"}, True),
        *((quantize, {"use_dora": True}, False) for quantize in ("none", "nf4")),
        ("nf4", {"use_dora": True, "use_rslora": True, "targets": ("all-linear",)}, False),
    ],
)
def test_gradients_are_equal_for_every_kind_of_lora(
    llama: Path, quantize: str, lora: dict[str, object], own_forwards: bool
) -> None:
    model = make_model(llama, quantize, std=0.1, **lora).train()
    loss, gradients = loss_and_gradients(model, library_loss)
    with memory_efficient.patched(model):
        replaced = [module for module in model.modules() if isinstance(module, LoraLayer) and "forward" in vars(module)]
        found_loss, own = loss_and_gradients(model, own_loss)
    assert bool(replaced) == own_forwards, "DoRA needs the norms of the adapted weights, which only peft computes"
    assert found_loss == pytest.approx(loss, rel=1e-6)
    assert_same_gradients(own, gradients)


@pytest.mark.parametrize("architecture", ["bloom", "llama"])
def test_an_adapted_head_or_embedding_has_equal_gradients(
    request: pytest.FixtureRequest, architecture: str, tmp_path: Path
) -> None:
    config = AutoConfig.from_pretrained(request.getfixturevalue(architecture), tie_word_embeddings=False)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    embedding = {"bloom": "word_embeddings", "llama": "embed_tokens"}[architecture]
    model = make_model(tmp_path, std=0.1, targets=("lm_head", embedding)).train()
    loss, gradients = loss_and_gradients(model, library_loss)
    with memory_efficient.patched(model):
        found_loss, own = loss_and_gradients(model, own_loss)
    assert found_loss == pytest.approx(loss, rel=1e-6)
    assert_same_gradients(own, gradients)


def test_lora_with_dropout_has_the_right_gradients() -> None:
    x = torch.randn(200, 64, requires_grad=True)
    a, b = torch.randn(8, 64, requires_grad=True), torch.randn(32, 8, requires_grad=True)
    dropped = torch.rand(x.shape) < 0.25
    y = memory_efficient.LoraFunction.apply(x, a, b, dropped, 0.25, 2.0)
    expected = (x * ~dropped / 0.75) @ a.T @ b.T * 2.0
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-3)
    weight = torch.randn_like(y)
    found = torch.autograd.grad((y * weight).sum(), (x, a, b))
    for own, plain in zip(found, torch.autograd.grad((expected * weight).sum(), (x, a, b)), strict=True):
        torch.testing.assert_close(own, plain, rtol=1e-4, atol=1e-3)


def test_swiglu_has_the_right_gradients() -> None:
    torch.manual_seed(0)
    gate, up = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(memory_efficient.SwiGLUFunction.apply, (gate, up))


def saved_bytes(step: Callable[[], torch.Tensor]) -> int:
    """Bytes of the distinct tensors that autograd saves for the backward pass."""
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = step()
    assert loss.requires_grad
    return sum(saved.values())


@pytest.mark.parametrize("architecture", ["bloom", "llama"])
def test_less_is_saved_for_the_backward_pass(request: pytest.FixtureRequest, architecture: str) -> None:
    model = make_model(request.getfixturevalue(architecture), dropout=0.1, std=0.1).train()
    weights = sum(p.untyped_storage().nbytes() for p in model.parameters())
    original = saved_bytes(lambda: library_loss(model))
    keys = DropoutKeys(seed=1)
    with dropout.installed(model, keys), memory_efficient.patched(model):
        keys.set_tokens(keys.tokens(0, [0], [IDS.shape[1]], packed=False))
        efficient = saved_bytes(lambda: own_loss(model))
    assert efficient < 0.9 * original, (efficient, original, weights)


def test_adapters_that_are_switched_off_stay_off(bloom: Path) -> None:
    model = make_model(bloom).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad(), model.disable_adapter():
        expected = model(input_ids=ids).logits
        with memory_efficient.patched(model):
            assert torch.allclose(model(input_ids=ids).logits, expected, atol=1e-5)
    with torch.no_grad(), memory_efficient.patched(model):
        assert not torch.allclose(model(input_ids=ids).logits, expected, atol=1e-2)
