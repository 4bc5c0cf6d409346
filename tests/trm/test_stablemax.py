"""Stablemax cross-entropy (golden F) and the halting half of the loss."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from hybrid.trm import IGNORE, act_loss, log_stablemax, stablemax_cross_entropy


@pytest.mark.parametrize("kind", ["normal", "large", "extreme", "bf16"])
def test_loss_and_gradient_are_the_published_ones(golden: Path, kind: str) -> None:
    file = np.load(golden / "F_stablemax.npz")
    of = "normal" if kind == "bf16" else kind
    suffix = ("bf16_loss", "bf16_grad") if kind == "bf16" else ("loss", "grad_of_sum")
    loss, gradient = (torch.from_numpy(file[f"{of}.{name}"]) for name in suffix)
    dtype = torch.bfloat16 if kind == "bf16" else torch.float32
    logits = torch.from_numpy(file[f"{of}.logits"]).to(dtype).requires_grad_()
    ours = stablemax_cross_entropy(logits, torch.from_numpy(file[f"{of}.labels"]))
    ours.sum().backward()
    assert ours.dtype == torch.float64 and logits.grad is not None
    torch.testing.assert_close(ours.detach(), loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(logits.grad.float(), gradient, rtol=0, atol=1e-7)


def test_the_distribution_is_the_formula() -> None:
    """s(x) = x + 1 from 0 up, 1 / (1 - x) below, normalised."""
    x = torch.tensor([3.0, 0.0, -1.0, 1.0], dtype=torch.float64)
    s = torch.tensor([4.0, 1.0, 0.5, 2.0], dtype=torch.float64)
    torch.testing.assert_close(log_stablemax(x).exp(), s / 7.5)


@pytest.mark.parametrize("value", [0.0, -0.0])
def test_the_gradient_at_zero_is_one(value: float) -> None:
    """sign(x) log1p(|x|) has none there, and fresh logits of zero would never learn."""
    x = torch.full((4,), value, dtype=torch.float64, requires_grad=True)
    log_stablemax(x)[0].backward()
    # d log s_0 = 1, less the mean of four ones.
    torch.testing.assert_close(x.grad, torch.tensor([0.75, -0.25, -0.25, -0.25]).double())


@pytest.mark.parametrize("value", [1.0, -1.0, 1e-38, -1e-38, 3e38, -3e38, 1e-45])
def test_no_logit_breaks_loss_or_gradient(value: float) -> None:
    """At x = 1 the branch not taken divides by zero: NaN gradient in the naive float32 form."""
    logits = torch.tensor([[value, 0.5, -value, 2.0]] * 4, requires_grad=True)
    loss = stablemax_cross_entropy(logits, torch.arange(4))
    loss.sum().backward()
    assert loss.isfinite().all() and (loss >= 0).all()
    assert logits.grad is not None and logits.grad.isfinite().all()
    single = torch.tensor([[value, 0.5, -value, 2.0]], requires_grad=True)
    assert log_stablemax(single).isfinite().all()
    (slope,) = torch.autograd.grad(log_stablemax(single).sum(), single)
    assert slope.isfinite().all()


def test_gradient_by_finite_differences() -> None:
    x = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3
    labels = torch.tensor([0, 1, IGNORE, 3, 2])
    assert torch.autograd.gradcheck(
        lambda x: stablemax_cross_entropy(x, labels), x.requires_grad_()
    )


def test_ignored_positions_cost_nothing() -> None:
    logits = torch.randn(2, 3, 12, generator=torch.Generator().manual_seed(0)).requires_grad_()
    labels = torch.tensor([[IGNORE, 3, IGNORE], [IGNORE] * 3])
    loss = stablemax_cross_entropy(logits, labels)
    loss.sum().backward()
    assert torch.equal(loss == 0, labels == IGNORE)
    assert logits.grad is not None
    assert torch.equal(logits.grad.abs().sum(-1) == 0, labels == IGNORE)


def test_a_row_weighs_the_same_however_many_labels_it_has() -> None:
    logits = torch.zeros(2, 6, 12)
    labels = torch.full((2, 6), IGNORE)
    labels[0, :1], labels[1] = 5, 5
    steps, halted = torch.ones(2), torch.tensor([True, False])
    loss, sums = act_loss(logits, torch.zeros(2), labels, steps, halted)
    assert float(sums["lm_loss"]) == pytest.approx(2 * math.log(12))
    assert float(loss) == pytest.approx(2 * math.log(12) + 0.5 * 2 * math.log(2))
    assert float(sums["count"]) == 1  # metrics cover the rows that halted, losses all


def test_a_row_without_labels_is_right_and_not_counted() -> None:
    """As published: it would teach the halt head to stop."""
    labels = torch.tensor([[IGNORE, IGNORE]])
    q_halt = torch.tensor([-2.0], requires_grad=True)
    loss, sums = act_loss(
        torch.zeros(1, 2, 12), q_halt, labels, torch.tensor([3]), torch.tensor([True])
    )
    loss.backward()
    assert loss.item() == pytest.approx(0.5 * math.log1p(math.exp(2.0)))
    assert q_halt.grad is not None and q_halt.grad.item() < 0  # descent raises the halt logit
    assert float(sums["lm_loss"]) == 0
    assert all(float(sums[name]) == 0 for name in ("count", "accuracy", "exact_accuracy", "steps"))


def test_the_halt_logit_learns_whether_the_row_is_exactly_right() -> None:
    labels = torch.tensor([[1, 2], [1, 2], [1, IGNORE]])
    predicted = torch.tensor([[1, 2], [1, 3], [1, 7]])  # right, one wrong, wrong where ignored
    q_halt = torch.tensor([0.5, 0.5, 0.5], requires_grad=True)
    logits = torch.nn.functional.one_hot(predicted, 12).float()
    loss, sums = act_loss(logits, q_halt, labels, torch.full((3,), 2), torch.ones(3).bool())
    loss.backward()
    assert q_halt.grad is not None and (q_halt.grad < 0).tolist() == [True, False, True]
    seen = {name: float(value) for name, value in sums.items()}
    assert (seen["count"], seen["exact_accuracy"], seen["accuracy"]) == (3, 2, 2.5)
    assert (seen["q_halt_accuracy"], seen["steps"]) == (2, 6)
