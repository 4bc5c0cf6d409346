"""The plain TRM of the benchmarks is equivalent to hybrid.trm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.plain import PlainTrainer, PlainTRM, stablemax_cross_entropy
from hybrid.trm import (
    TRM,
    AdamAtan2,
    ExponentialMovingAverage,
    TRMConfig,
    act_loss,
    log_stablemax,
    sign_sgd_,
)

LR, PUZZLE_LR, DECAY, RATE = 1e-3, 1e-2, 0.1, 0.9


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_six_steps_of_the_plain_trainer_match_ours(
    tiny: Callable[..., TRMConfig], batch_of: Callable[..., dict[str, Tensor]], compiled: bool
) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    config = tiny(hidden_size=32, halt_max_steps=3, halt_exploration_prob=0.5, L_layers=2)
    ours = TRM(config, seed=1).train()
    plain = PlainTRM(config)
    plain.load_state_dict(ours.state_dict())
    trainer = PlainTrainer(
        plain, batch_size=4, weight_decay=DECAY, ema_rate=RATE, compiled=compiled
    )
    weights = dict(ours.named_parameters())
    adam, ema = AdamAtan2(weights, weight_decay=DECAY), ExponentialMovingAverage(weights, RATE)
    carry = None
    for step in range(6):
        batch = batch_of(config, seed=step)
        draws = tuple(torch.rand(2, 4, generator=torch.Generator().manual_seed(step)))
        metrics = trainer.step(batch, LR, PUZZLE_LR, (draws[0], draws[1]))
        ours.zero_grad()
        carry, out = ours.act_step(
            carry or ours.initial_carry(batch), batch, exploration=(draws[0], draws[1])
        )
        loss, sums = act_loss(
            out.logits, out.q_halt, carry.current["labels"], carry.steps, carry.halted
        )
        (loss / 4).backward()
        assert out.puzzle_rows is not None and out.puzzle_rows.grad is not None
        sign_sgd_(
            ours.puzzle_table,
            carry.current["puzzle_identifiers"],
            out.puzzle_rows.grad,
            lr=PUZZLE_LR,
            weight_decay=DECAY,
        )
        adam.step(LR)
        ema.update()
        for name, value in sums.items():
            torch.testing.assert_close(metrics[name], float(value), rtol=1e-5, atol=1e-6, msg=name)
        assert trainer.carry is not None
        assert torch.equal(trainer.carry.halted, carry.halted)
        assert torch.equal(trainer.carry.current["inputs"], carry.current["inputs"])
    close: dict[str, Any] = {"rtol": 0, "atol": 5e-6}
    for name, value in ours.state_dict().items():
        torch.testing.assert_close(plain.state_dict()[name], value, **close)
    for name, value in ema.values.items():
        torch.testing.assert_close(trainer.values[name], value, **close)

    rows = batch_of(config, seed=9)
    tokens, q_halt = trainer.evaluate(rows)
    ours.eval()
    with ema.applied(), torch.inference_mode():
        carry = ours.initial_carry(rows)
        for _ in range(config.halt_max_steps):
            carry, out = ours.act_step(carry, rows)
    assert torch.equal(tokens, out.logits.argmax(-1))
    torch.testing.assert_close(q_halt, out.q_halt, rtol=0, atol=1e-4)
    # One graph each for training and for evaluation.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2 * compiled
    assert not torch._dynamo.utils.counters["graph_break"]


def test_naive_loss_matches_ours() -> None:
    logits = torch.tensor([[[-3.0, -0.5, 0.0, 0.7, 5.0]]])
    for label in range(5):
        loss = stablemax_cross_entropy(logits, torch.tensor([[label]]))
        expected = -log_stablemax(logits.double())[0, 0, label]
        torch.testing.assert_close(loss[0, 0], expected, rtol=1e-12, atol=0)
