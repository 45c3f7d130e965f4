"""The sum of a step's gradients is exact: it does not depend on micro-batches' order or on who computes them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from conftest import CPU
from tiny_training import make_examples, make_model, read_log, train_tiny

from job.settings import Train
from job.training.gradients import FRACTION_BITS, ExactSum, StepComputer, StepRequest, deal


def exact_sum(*gradients: float, order: list[int] | None = None, loss: float = 1.0) -> tuple[ExactSum, torch.Tensor]:
    parameter = torch.nn.Parameter(torch.zeros(1))
    exact = ExactSum([parameter], torch.device("cpu"))
    exact.reset()
    for i in order or range(len(gradients)):
        assert parameter.grad is not None
        parameter.grad.fill_(gradients[i])
        exact.add(torch.tensor(loss), count=len(gradients), loss_scale=1.0, fraction_bits=FRACTION_BITS)
    return exact, exact.sums


@pytest.mark.parametrize("quantize", ["int8", "nf4", "none"])
def test_every_number_of_processes_gives_bitwise_the_same_gradients(llama: Path, quantize: str) -> None:
    settings = Train(batch_size=8, gradient_accumulation_steps=2)
    computer = StepComputer(make_model(llama, quantize, dropout=0.1), make_examples(20), settings, 0, CPU)
    request = StepRequest(step=3, micro_batch_tokens=60, parts=5, recompute=False, loss_scale=1.0)
    computer.set_recompute(False)
    with computer.installed():
        sums = {n: [computer.share(request, rank, n).clone() for rank in range(n)] for n in (1, 2, 3, 5, 40)}
    for n, shares in sums.items():
        assert torch.equal(sum(shares[1:], shares[0]), sums[1][0]), n
    assert not any(share.any() for share in sums[40][-10:]), "some processes have no micro-batch"


def test_the_order_of_a_sum_does_not_change_it() -> None:
    gradients = (1e-7, 3.0, -3.0, 1e-12, 0.1, 7e-8)
    orders = [[0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0], [1, 0, 4, 2, 5, 3]]
    sums = [exact_sum(*gradients, order=order)[1].clone() for order in orders]
    assert torch.equal(sums[0], sums[1])
    assert torch.equal(sums[0], sums[2])
    exact, total = exact_sum(*gradients)
    exact.load(total)
    assert exact._parameters[0].grad is not None
    assert float(exact._parameters[0].grad) == pytest.approx(1e-7 + 1e-12 + 0.1 + 7e-8, rel=1e-6)


@pytest.mark.parametrize(
    ("gradients", "finite", "too_large"),
    [
        ((1.0, 2.0), True, False),
        ((2000.0, -2000.0), True, False),
        ((1.0, 1e5), True, True),
        ((3000.0, 3000.0), True, True),
        ((float("nan"), 1.0), False, False),
        ((float("inf"), 1.0), False, False),
    ],
)
def test_what_the_fixed_point_cannot_hold_is_reported(
    gradients: tuple[float, ...], finite: bool, too_large: bool
) -> None:
    exact, total = exact_sum(*gradients)
    outcome = exact.load(total)
    assert (outcome.finite, outcome.too_large, outcome.out_of_memory) == (finite, too_large, False)
    assert outcome.loss == 2.0
    if not finite:
        assert outcome.grad_norm == math.inf, "by which a skipped step is recognized"
    elif not too_large:
        assert outcome.grad_norm == abs(sum(gradients))


def test_a_loss_that_is_not_finite_is_reported() -> None:
    exact, total = exact_sum(1.0, loss=float("nan"))
    assert str(exact.load(total).loss) == "nan"


def test_gradients_that_are_too_large_are_computed_again(tmp_path: Path, llama: Path) -> None:
    norms = []
    for factor in (1.0, 2.0**26):
        model = make_model(llama)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_hook(lambda gradient, factor=factor: gradient * factor)
        train_tiny(tmp_path / str(factor), llama, model=model, max_steps=1, micro_batch_tokens=40)
        norms.append(read_log(tmp_path / str(factor))[0]["grad_norm"])
    assert norms[1] == pytest.approx(norms[0] * 2.0**26, rel=1e-5)


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_micro_batches_are_dealt_evenly_and_completely(size: int) -> None:
    costs = [100, 100, 50, 49, 1]
    shares = deal(costs, size)
    assert sorted(item for share in shares for item in share) == list(range(5))
    loads = [sum(costs[i] for i in share) for share in shares]
    assert max(loads) <= max(100, sum(costs) / size + 50)
    assert deal(costs, size) == shares
