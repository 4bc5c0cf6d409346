"""Stablemax cross-entropy (golden F) and the halting loss."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from hybrid.trm import IGNORE, act_loss, log_stablemax, stablemax_cross_entropy


@pytest.mark.parametrize("kind", ["normal", "large", "extreme", "bf16"])
def test_loss_and_gradient_match_the_published_code(golden: Path, kind: str) -> None:
    file = np.load(golden / "F_stablemax.npz")
    case = "normal" if kind == "bf16" else kind
    suffix = ("bf16_loss", "bf16_grad") if kind == "bf16" else ("loss", "grad_of_sum")
    loss, gradient = (torch.from_numpy(file[f"{case}.{name}"]) for name in suffix)
    dtype = torch.bfloat16 if kind == "bf16" else torch.float32
    logits = torch.from_numpy(file[f"{case}.logits"]).to(dtype).requires_grad_()
    ours = stablemax_cross_entropy(logits, torch.from_numpy(file[f"{case}.labels"]))
    ours.sum().backward()
    assert ours.dtype == torch.float64 and logits.grad is not None
    torch.testing.assert_close(ours.detach(), loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(logits.grad.float(), gradient, rtol=0, atol=1e-7)


def test_stablemax_matches_its_formula() -> None:
    """The formula is s(x) = x + 1 for x >= 0 and 1 / (1 - x) below, normalised."""
    x = torch.tensor([3.0, 0.0, -1.0, 1.0], dtype=torch.float64)
    s = torch.tensor([4.0, 1.0, 0.5, 2.0], dtype=torch.float64)
    torch.testing.assert_close(log_stablemax(x).exp(), s / 7.5)


@pytest.mark.parametrize("value", [0.0, -0.0])
def test_gradient_at_zero_is_one(value: float) -> None:
    """The form sign(x) log1p(|x|) has no gradient there, so that zero logits would never learn."""
    x = torch.full((4,), value, dtype=torch.float64, requires_grad=True)
    log_stablemax(x)[0].backward()
    # d log s_0 = 1, minus the mean of four ones.
    torch.testing.assert_close(x.grad, torch.tensor([0.75, -0.25, -0.25, -0.25]).double())


@pytest.mark.parametrize("value", [1.0, -1.0, 1e-38, -1e-38, 3e38, -3e38, 1e-45])
def test_loss_and_gradient_are_finite_for_any_logit(value: float) -> None:
    """At x = 1 the unused branch of the naive form divides by zero, with a NaN gradient."""
    logits = torch.tensor([[value, 0.5, -value, 2.0]] * 4, requires_grad=True)
    loss = stablemax_cross_entropy(logits, torch.arange(4))
    loss.sum().backward()
    assert loss.isfinite().all() and (loss >= 0).all()
    assert logits.grad is not None and logits.grad.isfinite().all()
    single = torch.tensor([[value, 0.5, -value, 2.0]], requires_grad=True)
    assert log_stablemax(single).isfinite().all()
    (gradient,) = torch.autograd.grad(log_stablemax(single).sum(), single)
    assert gradient.isfinite().all()


def test_gradient_matches_finite_differences() -> None:
    x = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3
    labels = torch.tensor([0, 1, IGNORE, 3, 2])
    assert torch.autograd.gradcheck(
        lambda x: stablemax_cross_entropy(x, labels), x.requires_grad_()
    )


def test_ignored_positions_have_no_loss_or_gradient() -> None:
    logits = torch.randn(2, 3, 12, generator=torch.Generator().manual_seed(0)).requires_grad_()
    labels = torch.tensor([[IGNORE, 3, IGNORE], [IGNORE] * 3])
    loss = stablemax_cross_entropy(logits, labels)
    loss.sum().backward()
    assert torch.equal(loss == 0, labels == IGNORE)
    assert logits.grad is not None
    assert torch.equal(logits.grad.abs().sum(-1) == 0, labels == IGNORE)


def test_row_loss_does_not_scale_with_its_number_of_labels() -> None:
    logits = torch.zeros(2, 6, 12)
    labels = torch.full((2, 6), IGNORE)
    labels[0, :1], labels[1] = 5, 5
    steps, halted = torch.ones(2), torch.tensor([True, False])
    loss, sums = act_loss(logits, torch.zeros(2), labels, steps, halted)
    assert float(sums["lm_loss"]) == pytest.approx(2 * math.log(12))
    assert float(loss) == pytest.approx(2 * math.log(12) + 0.5 * 2 * math.log(2))
    assert float(sums["count"]) == 1  # metrics cover halted rows, losses all rows


def test_row_without_labels_is_right_and_not_counted() -> None:
    """As in the published code, such a row raises the halt logit."""
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


def test_halt_target_is_an_exactly_right_row() -> None:
    labels = torch.tensor([[1, 2], [1, 2], [1, IGNORE]])
    predicted = torch.tensor([[1, 2], [1, 3], [1, 7]])  # right, one wrong, wrong only if ignored
    q_halt = torch.tensor([0.5, 0.5, 0.5], requires_grad=True)
    logits = torch.nn.functional.one_hot(predicted, 12).float()
    loss, sums = act_loss(logits, q_halt, labels, torch.full((3,), 2), torch.ones(3).bool())
    loss.backward()
    assert q_halt.grad is not None and (q_halt.grad < 0).tolist() == [True, False, True]
    metrics = {name: float(value) for name, value in sums.items()}
    assert (metrics["count"], metrics["exact_accuracy"], metrics["accuracy"]) == (3, 2, 2.5)
    assert (metrics["q_halt_accuracy"], metrics["steps"]) == (2, 6)
