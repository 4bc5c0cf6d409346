"""Refilling of halted slots, and the halting rule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hybrid.trm import TRM, TRMConfig, act_loss

Tiny = Callable[..., TRMConfig]
BatchOf = Callable[..., dict[str, Tensor]]
Halting = Callable[[TRM, float], TRM]


def mixed(model: TRM, batch_of: BatchOf) -> tuple[dict[str, Tensor], object]:
    """Return a batch and a carry after two ACT steps on it, with slots 0 and 2 halted."""
    first = batch_of(model.config, seed=1)
    carry = model.initial_carry(first)
    with torch.no_grad():
        for _ in range(2):
            carry, _ = model.act_step(carry, first)
    return first, replace(carry, halted=torch.tensor([True, False, True, False]))


def test_only_halted_slots_take_a_new_row(tiny: Tiny, batch_of: BatchOf, halting: Halting) -> None:
    model = halting(TRM(tiny(halt_max_steps=8)), -5.0).train()
    first, carry = mixed(model, batch_of)
    offered = batch_of(model.config, seed=2)
    after, out = model.act_step(carry, offered)

    assert after.steps.tolist() == [1, 3, 1, 3]
    for name, held in after.current.items():
        assert held.dtype == first[name].dtype
        assert torch.equal(held[[0, 2]], offered[name][[0, 2]]), name
        assert torch.equal(held[[1, 3]], first[name][[1, 3]]), name

    # Data offered to the slots that continue must not affect any slot.
    poison = {name: value.clone() for name, value in offered.items()}
    for value, other in zip(poison.values(), batch_of(model.config, seed=3).values(), strict=True):
        value[[1, 3]] = other[[1, 3]]
    again, repeated = model.act_step(carry, poison)
    assert torch.equal(repeated.logits, out.logits) and torch.equal(repeated.q_halt, out.q_halt)
    assert torch.equal(again.z_H, after.z_H) and torch.equal(again.z_L, after.z_L)
    assert all(torch.equal(again.current[name], after.current[name]) for name in after.current)

    # A refilled slot runs its first step, a continued one does not.
    fresh, _ = model.act_step(model.initial_carry(offered), offered)
    torch.testing.assert_close(after.z_H[[0, 2]], fresh.z_H[[0, 2]], atol=1e-5, rtol=0)
    start, _ = model.act_step(model.initial_carry(first), first)
    assert (after.z_H - start.z_H)[[1, 3]].abs().amax((1, 2)).min() > 1e-3


def test_refilled_slot_does_not_depend_on_its_previous_state(tiny: Tiny, batch_of: BatchOf) -> None:
    model = TRM(tiny(halt_max_steps=8)).train()
    _, carry = mixed(model, batch_of)
    offered = batch_of(model.config, seed=2)
    expected, _ = model.act_step(carry, offered)
    dirty = replace(carry, z_H=carry.z_H.clone(), z_L=carry.z_L.clone())
    dirty.z_H[[0, 2]] = torch.nan
    dirty.z_L[[0, 2]] = torch.nan
    after, out = model.act_step(dirty, offered)
    assert torch.equal(after.z_H, expected.z_H) and torch.equal(after.z_L, expected.z_L)
    loss, _ = act_loss(out.logits, out.q_halt, after.current["labels"], after.steps, after.halted)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def lifetimes(
    model: TRM, batch: dict[str, Tensor], draws: tuple[Tensor, Tensor] | None = None
) -> list[int]:
    """Return the ACT step in which each row halts."""
    carry = model.initial_carry(batch)
    ended = torch.zeros(len(batch["inputs"]), dtype=torch.long)
    for step in range(1, model.config.halt_max_steps + 1):
        with torch.no_grad():
            carry, _ = model.act_step(carry, batch, exploration=draws)
        ended[carry.halted & (ended == 0)] = step
        carry = replace(carry, halted=torch.zeros_like(carry.halted))
    return ended.tolist()


@pytest.mark.parametrize("logit", [-3.0, 0.0, 3.0])
def test_evaluation_ignores_the_halt_head(
    tiny: Tiny, batch_of: BatchOf, halting: Halting, logit: float
) -> None:
    model = halting(TRM(tiny(halt_exploration_prob=0.5)), logit).eval()
    assert lifetimes(model, batch_of(model.config)) == [4] * 4


@pytest.mark.parametrize(("logit", "step"), [(-1e-3, 4), (0.0, 4), (1e-3, 1)])
def test_training_halts_if_the_logit_is_positive(
    tiny: Tiny, batch_of: BatchOf, halting: Halting, logit: float, step: int
) -> None:
    model = halting(TRM(tiny()), logit).train()
    assert lifetimes(model, batch_of(model.config)) == [step] * 4


def test_halt_max_steps_one_runs_one_step(tiny: Tiny, batch_of: BatchOf, halting: Halting) -> None:
    """The minimum of two steps, drawn from an empty range, must not extend the row."""
    model = halting(TRM(tiny(halt_max_steps=1, halt_exploration_prob=1.0)), 3.0).train()
    assert lifetimes(model, batch_of(model.config)) == [1] * 4


def test_exploration_enforces_the_minimum_number_of_steps(
    tiny: Tiny, batch_of: BatchOf, halting: Halting
) -> None:
    model = halting(TRM(tiny(halt_exploration_prob=0.3)), 3.0).train()
    batch = batch_of(model.config, rows=7)
    explore = torch.tensor([0.0, 0.0, 0.29, 0.29, 0.29, 0.31, 0.99])
    min_draw = torch.tensor([0.0, 0.33, 0.34, 0.67, 0.999, 0.999, 0.999])
    assert lifetimes(model, batch, (explore, min_draw)) == [2, 2, 3, 4, 4, 1, 1]


def test_exploration_neither_exceeds_the_last_step_nor_halts_early(
    tiny: Tiny, batch_of: BatchOf, halting: Halting
) -> None:
    model = halting(TRM(tiny(halt_exploration_prob=1.0)), -3.0).train()
    batch = batch_of(model.config, rows=3)
    draws = torch.zeros(3), torch.tensor([0.0, 0.5, 0.999999])
    assert lifetimes(model, batch, draws) == [4, 4, 4]


def test_minima_are_uniform_over_two_to_halt_max_steps(
    tiny: Tiny, batch_of: BatchOf, halting: Halting
) -> None:
    rows = 4000
    small = tiny(seq_len=1, puzzle_emb_ndim=0, H_cycles=1, L_cycles=1, halt_exploration_prob=0.75)
    model = halting(TRM(small), 3.0).train()
    batch = batch_of(small, rows=rows)
    torch.manual_seed(0)
    carry = model.initial_carry(batch)
    share = []
    for steps in range(4):
        # Each step draws a minimum: a row halts at `steps` + 1 unless explored and below it.
        state = replace(carry, steps=torch.full((rows,), steps), halted=torch.zeros(rows).bool())
        with torch.no_grad():
            share.append(float(model.act_step(state, batch)[0].halted.float().mean()))
    expected = [0.25, 0.25 + 0.75 / 3, 0.25 + 0.75 * 2 / 3, 1.0]
    assert share == pytest.approx(expected, abs=5 * 0.5 / rows**0.5)
    assert share[3] == 1.0
