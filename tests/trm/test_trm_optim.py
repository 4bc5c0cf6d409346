"""Properties of the optimisers, the schedule and the EMA."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hybrid.trm import (
    TRM,
    AdamAtan2,
    ExponentialMovingAverage,
    TRMConfig,
    act_loss,
    learning_rate,
    sign_sgd_,
)


def test_first_step_is_almost_the_learning_rate() -> None:
    """With the bias correction inside atan2, the first step would be 0.785 * lr."""
    for scale in (1e-12, 1.0, 1e6):
        p = torch.zeros(3, requires_grad=True)
        p.grad = torch.tensor([scale, -scale, 0.0])
        AdamAtan2({"p": p}, weight_decay=0.0).step(0.5)
        expected = 0.5 * torch.atan(torch.tensor(0.1)) / 0.1
        assert expected / 0.5 == pytest.approx(0.99669, abs=1e-5)
        torch.testing.assert_close(p.detach(), torch.stack((-expected, expected, 0 * expected)))


def test_weight_decay_is_decoupled_and_comes_first() -> None:
    p = torch.full((1,), 2.0, requires_grad=True)
    p.grad = torch.zeros(1)
    AdamAtan2({"p": p}, weight_decay=0.1).step(0.5)
    assert p.item() == pytest.approx(2.0 * 0.95)


def test_missing_gradient_is_reported_by_name() -> None:
    p = torch.zeros(1, requires_grad=True)
    with pytest.raises(AssertionError, match="lonely has no gradient"):
        AdamAtan2({"lonely": p}).step(0.1)


def test_schedule_has_the_expected_rates() -> None:
    def rate(step: int, min_ratio: float = 0.2) -> float:
        return learning_rate(step, base=2.0, warmup=4, total=24, min_ratio=min_ratio)

    assert [rate(step) for step in (1, 2, 4, 14, 24)] == pytest.approx([0.5, 1.0, 2.0, 1.2, 0.4])
    assert [rate(step, 1.0) for step in (4, 9, 24)] == [2.0, 2.0, 2.0]
    assert learning_rate(1, base=2.0, warmup=0, total=10, min_ratio=1.0) == 2.0


def test_gradients_of_equal_ids_are_summed_before_the_sign() -> None:
    """Summing signs, or using the last gradient, would give the opposite sign."""
    table = torch.zeros(4, 2)
    ids = torch.tensor([2, 1, 2, 2], dtype=torch.int32)
    grads = torch.tensor([[3.0, -3.0], [1.0, 0.0], [-1.0, 1.0], [-1.0, 1.0]])
    sign_sgd_(table, ids, grads, lr=0.25, weight_decay=0.0)
    assert table.tolist() == [[0, 0], [-0.25, 0], [-0.25, 0.25], [0, 0]]


def test_other_rows_are_unchanged_bit_for_bit() -> None:
    table = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    before = table.clone()
    ids = torch.tensor([1, 4, 1])
    sign_sgd_(table, ids, torch.zeros(3, 3), lr=0.5, weight_decay=0.1)
    assert torch.equal(table[[0, 2, 3, 5]], before[[0, 2, 3, 5]])
    # Rows decay once even if their id is repeated or their gradient is zero.
    torch.testing.assert_close(table[[1, 4]], before[[1, 4]] * 0.95)


Gradients = tuple[dict[str, Tensor], Tensor]


def gradients(model: TRM, batch: dict[str, Tensor], rows: slice, batch_size: int) -> Gradients:
    """Return the gradients of a rank with `rows` of a global batch of `batch_size` rows."""
    part = {name: value[rows] for name, value in batch.items()}
    model.zero_grad()
    carry, out = model.act_step(model.initial_carry(part), part)
    loss, _ = act_loss(out.logits, out.q_halt, part["labels"], carry.steps, carry.halted)
    (loss / batch_size).backward()
    assert out.puzzle_rows is not None and out.puzzle_rows.grad is not None
    return {n: p.grad.clone() for n, p in model.named_parameters()}, out.puzzle_rows.grad


def test_rank_gradients_sum_to_the_global_batch(
    tiny: Callable[..., TRMConfig], batch_of: Callable[..., dict[str, Tensor]]
) -> None:
    """Scale-invariant optimisers do not detect a mean instead of a sum; clipped AdamW does."""
    model = TRM(tiny()).train()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    summed, rows = [], []
    for seed in range(4):
        batch = batch_of(model.config, rows=4, seed=seed)
        full, full_rows = gradients(model, batch, slice(0, 4), batch_size=4)
        (left, left_rows), (right, right_rows) = (
            gradients(model, batch, half, batch_size=4) for half in (slice(0, 2), slice(2, 4))
        )
        for name, gradient in full.items():
            torch.testing.assert_close(left[name] + right[name], gradient, atol=1e-5, rtol=1e-4)
        rows.append(torch.cat((left_rows, right_rows)))
        torch.testing.assert_close(rows[-1], full_rows, atol=1e-5, rtol=1e-4)
        # As in training, the gradient shrinks over the steps, below AdamW's clipping norm.
        summed.append({name: (left[name] + right[name]) / 4**seed for name in full})

    def trained(optimiser: str, scale: float) -> Tensor:
        weights = {name: p.clone().requires_grad_() for name, p in start.items()}
        atan2 = AdamAtan2(weights)
        adamw = torch.optim.AdamW(weights.values(), lr=1e-2)
        for step in summed:
            for name, p in weights.items():
                p.grad = step[name] * scale
            if optimiser == "atan2":
                atan2.step(1e-2)
            else:
                torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
                adamw.step()
        return torch.cat([p.detach().flatten() for p in weights.values()])

    def table(scale: float) -> Tensor:
        result = torch.zeros(5, 8)
        for gradient in rows:
            sign_sgd_(
                result, torch.tensor([1, 2, 1, 4]), gradient * scale, lr=0.1, weight_decay=0.1
            )
        return result

    mean = 1 / 2  # scale of a mean over two ranks
    assert torch.equal(trained("atan2", mean), trained("atan2", 1.0))
    assert torch.equal(table(mean), table(1.0))
    assert (trained("adamw", mean) - trained("adamw", 1.0)).abs().max() > 1e-3


def test_ema_contains_only_the_weights(tiny: Callable[..., TRMConfig]) -> None:
    model = TRM(tiny(num_puzzle_identifiers=10_000))
    ema = ExponentialMovingAverage(dict(model.named_parameters()), rate=0.75)
    assert ema.values.keys() == dict(model.named_parameters()).keys()
    assert not ema.values.keys() & {"H_init", "L_init", "puzzle_table"}
    averaged = {t.untyped_storage().data_ptr() for t in ema.values.values()}
    live = {t.untyped_storage().data_ptr() for t in model.state_dict().values()}
    assert not averaged & live
    floats = sum(t.untyped_storage().nbytes() for t in ema.values.values()) // 4
    assert floats == sum(p.numel() for p in model.parameters()) < model.puzzle_table.numel()

    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    ema.update()
    for name, p in model.named_parameters():
        torch.testing.assert_close(ema.values[name], before[name] + 0.25)
        assert torch.equal(p.detach(), before[name] + 1.0)
        assert not ema.values[name].requires_grad


def test_ema_is_swapped_in_without_a_copy(tiny: Callable[..., TRMConfig]) -> None:
    model = TRM(tiny())
    ema = ExponentialMovingAverage(dict(model.named_parameters()), rate=0.5)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    ema.update()
    live = {name: p.detach().clone() for name, p in model.named_parameters()}
    values = {name: value.clone() for name, value in ema.values.items()}
    pointers = {value.data_ptr() for value in ema.values.values()}
    with pytest.raises(KeyboardInterrupt), ema.applied():
        for name, p in model.named_parameters():
            assert torch.equal(p.detach(), values[name]) and p.data_ptr() in pointers
        raise KeyboardInterrupt
    for name, p in model.named_parameters():
        assert torch.equal(p.detach(), live[name])
        assert torch.equal(ema.values[name], values[name])
