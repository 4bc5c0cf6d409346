"""What the optimisers must do that a trajectory alone would not explain."""

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


def test_the_first_step_is_almost_the_learning_rate() -> None:
    """With the first moment corrected inside atan2 it would be 0.785 of it."""
    for scale in (1e-12, 1.0, 1e6):
        p = torch.zeros(3, requires_grad=True)
        p.grad = torch.tensor([scale, -scale, 0.0])
        AdamAtan2({"p": p}, weight_decay=0.0).step(0.5)
        expected = 0.5 * torch.atan(torch.tensor(0.1)) / 0.1
        assert expected / 0.5 == pytest.approx(0.99669, abs=1e-5)
        torch.testing.assert_close(p.detach(), torch.stack((-expected, expected, 0 * expected)))


def test_decay_is_decoupled_and_comes_first() -> None:
    p = torch.full((1,), 2.0, requires_grad=True)
    p.grad = torch.zeros(1)
    AdamAtan2({"p": p}, weight_decay=0.1).step(0.5)
    assert p.item() == pytest.approx(2.0 * 0.95)


def test_a_weight_without_gradient_is_named() -> None:
    p = torch.zeros(1, requires_grad=True)
    with pytest.raises(AssertionError, match="lonely has no gradient"):
        AdamAtan2({"lonely": p}).step(0.1)


def test_the_schedule_meets_its_corners() -> None:
    def rate(step: int, min_ratio: float = 0.2) -> float:
        return learning_rate(step, base=2.0, warmup=4, total=24, min_ratio=min_ratio)

    assert [rate(step) for step in (1, 2, 4, 14, 24)] == pytest.approx([0.5, 1.0, 2.0, 1.2, 0.4])
    assert [rate(step, 1.0) for step in (4, 9, 24)] == [2.0, 2.0, 2.0]
    assert learning_rate(1, base=2.0, warmup=0, total=10, min_ratio=1.0) == 2.0


def test_gradients_of_one_id_are_summed_before_the_sign() -> None:
    """Two small ones against a large one: sign by sign, or the last one, goes the other way."""
    table = torch.zeros(4, 2)
    ids = torch.tensor([2, 1, 2, 2], dtype=torch.int32)
    grads = torch.tensor([[3.0, -3.0], [1.0, 0.0], [-1.0, 1.0], [-1.0, 1.0]])
    sign_sgd_(table, ids, grads, lr=0.25, weight_decay=0.0)
    assert table.tolist() == [[0, 0], [-0.25, 0], [-0.25, 0.25], [0, 0]]


def test_rows_that_no_one_touched_stay_bit_equal() -> None:
    table = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    before = table.clone()
    ids = torch.tensor([1, 4, 1])
    sign_sgd_(table, ids, torch.zeros(3, 3), lr=0.5, weight_decay=0.1)
    assert torch.equal(table[[0, 2, 3, 5]], before[[0, 2, 3, 5]])
    # Touched rows decay once, however often their id occurs, even where the gradient is zero.
    torch.testing.assert_close(table[[1, 4]], before[[1, 4]] * 0.95)


Gradients = tuple[dict[str, Tensor], Tensor]


def gradients(model: TRM, batch: dict[str, Tensor], rows: slice, of: int) -> Gradients:
    """What a rank that holds `rows` of a global batch of `of` rows computes."""
    part = {name: value[rows] for name, value in batch.items()}
    model.zero_grad()
    carry, out = model.act_step(model.initial_carry(part), part)
    loss, _ = act_loss(out.logits, out.q_halt, part["labels"], carry.steps, carry.halted)
    (loss / of).backward()
    assert out.puzzle_rows is not None and out.puzzle_rows.grad is not None
    return {n: p.grad.clone() for n, p in model.named_parameters()}, out.puzzle_rows.grad


def test_ranks_sum_and_who_would_notice_a_mean(
    tiny: Callable[..., TRMConfig], batch_of: Callable[..., dict[str, Tensor]]
) -> None:
    """Two ranks' gradients sum to the global batch's. Scale-free optimisers hide half of it."""
    model = TRM(tiny()).train()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    summed, rows = [], []
    for seed in range(4):
        batch = batch_of(model.config, rows=4, seed=seed)
        whole, whole_rows = gradients(model, batch, slice(0, 4), of=4)
        (left, left_rows), (right, right_rows) = (
            gradients(model, batch, half, of=4) for half in (slice(0, 2), slice(2, 4))
        )
        for name, gradient in whole.items():
            torch.testing.assert_close(left[name] + right[name], gradient, atol=1e-5, rtol=1e-4)
        rows.append(torch.cat((left_rows, right_rows)))
        torch.testing.assert_close(rows[-1], whole_rows, atol=1e-5, rtol=1e-4)
        # As training does, the gradient's scale falls over the steps: past AdamW's clipping norm.
        summed.append({name: (left[name] + right[name]) / 4**seed for name in whole})

    def trained(optimiser: str, scale: float) -> Tensor:
        weights = {name: p.clone().requires_grad_() for name, p in start.items()}
        ours = AdamAtan2(weights)
        theirs = torch.optim.AdamW(weights.values(), lr=1e-2)
        for step in summed:
            for name, p in weights.items():
                p.grad = step[name] * scale
            if optimiser == "atan2":
                ours.step(1e-2)
            else:
                torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
                theirs.step()
        return torch.cat([p.detach().flatten() for p in weights.values()])

    def table(scale: float) -> Tensor:
        result = torch.zeros(5, 8)
        for gradient in rows:
            sign_sgd_(
                result, torch.tensor([1, 2, 1, 4]), gradient * scale, lr=0.1, weight_decay=0.1
            )
        return result

    mean = 1 / 2  # of two ranks
    assert torch.equal(trained("atan2", mean), trained("atan2", 1.0))
    assert torch.equal(table(mean), table(1.0))
    assert (trained("adamw", mean) - trained("adamw", 1.0)).abs().max() > 1e-3


def test_the_average_holds_the_weights_and_nothing_else(tiny: Callable[..., TRMConfig]) -> None:
    model = TRM(tiny(num_puzzle_identifiers=10_000))
    ema = ExponentialMovingAverage(dict(model.named_parameters()), rate=0.75)
    assert ema.values.keys() == dict(model.named_parameters()).keys()
    assert not ema.values.keys() & {"H_init", "L_init", "puzzle_table"}
    held = {t.untyped_storage().data_ptr() for t in ema.values.values()}
    live = {t.untyped_storage().data_ptr() for t in model.state_dict().values()}
    assert not held & live
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


def test_the_average_stands_in_without_a_copy(tiny: Callable[..., TRMConfig]) -> None:
    model = TRM(tiny())
    ema = ExponentialMovingAverage(dict(model.named_parameters()), rate=0.5)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    ema.update()
    live = {name: p.detach().clone() for name, p in model.named_parameters()}
    values = {name: value.clone() for name, value in ema.values.items()}
    places = {value.data_ptr() for value in ema.values.values()}
    with pytest.raises(KeyboardInterrupt), ema.applied():
        for name, p in model.named_parameters():
            assert torch.equal(p.detach(), values[name]) and p.data_ptr() in places
        raise KeyboardInterrupt
    for name, p in model.named_parameters():
        assert torch.equal(p.detach(), live[name])
        assert torch.equal(ema.values[name], values[name])
