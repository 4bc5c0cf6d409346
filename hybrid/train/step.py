"""One optimiser step of the TRM."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from hybrid.config import TrainingConfig
from hybrid.context import RunContext
from hybrid.train.state import TrainState
from hybrid.trm import Batch, act_loss, learning_rate, sign_sgd_

Sums = dict[str, Tensor]


class Diverged(RuntimeError):
    """The loss or a gradient is not finite; raised before any weight has moved."""


def train_step(
    state: TrainState, batch: Batch, config: TrainingConfig, total_steps: int, context: RunContext
) -> Sums:
    """Advance `state` by one step; returns this worker's sums for metrics.

    The order is the published one: count, forward, backward, puzzle table, weights, average. The
    loss is summed over rows and divided by the *global* batch, gradients are summed over workers.
    """
    state.step += 1
    state.model.train()
    explore, least = exploration(config.seed, state.step, config.batch_size, state.slots)
    draws = explore.to(context.device), least.to(context.device)
    carry, outputs = state.model.act_step(state.carry, batch, exploration=draws)
    loss, sums = act_loss(
        outputs.logits, outputs.q_halt, carry.current["labels"], carry.steps, carry.halted
    )
    parameters = state.optimizer.parameters.values()
    for parameter in parameters:
        parameter.grad = None
    torch.autograd.backward(loss / config.batch_size)
    _sum_gradients(parameters, context)
    ids = context.gather(carry.current["puzzle_identifiers"])
    rows = outputs.puzzle_rows
    row_grads = None if rows is None or rows.grad is None else context.gather(rows.grad)
    _refuse_non_finite(state, loss, row_grads, ids, context)

    def rate(base: float) -> float:
        return learning_rate(
            state.step,
            base=base,
            warmup=config.lr_warmup_steps,
            total=total_steps,
            min_ratio=config.lr_min_ratio,
        )

    if row_grads is not None:
        sign_sgd_(
            state.model.puzzle_table,
            ids,
            row_grads,
            lr=rate(config.puzzle_lr),
            weight_decay=config.puzzle_weight_decay,
        )
    state.optimizer.step(rate(config.lr))
    state.average.update()
    state.carry = carry
    return sums


def exploration(seed: int, step: int, batch_size: int, slots: range) -> tuple[Tensor, Tensor]:
    """Uniform draws of a step for some slots; every worker draws for the whole batch and cuts."""
    draws = np.random.default_rng([seed, step]).random((2, batch_size), dtype=np.float32)
    explore, least = torch.from_numpy(draws[:, slots.start : slots.stop])
    return explore, least


def _sum_gradients(parameters: Iterable[Tensor], context: RunContext) -> None:
    """One flat all-reduce: a sum, because the loss is divided by the global batch already."""
    if context.world_size == 1:
        return
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = context.sum_(torch.cat([grad.flatten() for grad in grads]))
    parts = torch.split(flat, [grad.numel() for grad in grads])
    for grad, summed in zip(grads, parts, strict=True):
        grad.copy_(summed.view_as(grad))


def _refuse_non_finite(
    state: TrainState, loss: Tensor, row_grads: Tensor | None, ids: Tensor, context: RunContext
) -> None:
    """Raise Diverged on every worker if anything is not finite on one."""
    sound = loss.detach().isfinite()
    for parameter in state.optimizer.parameters.values():
        assert parameter.grad is not None
        sound = sound & parameter.grad.isfinite().all()
    if row_grads is not None:
        sound = sound & row_grads.isfinite().all()
    if int(context.sum_((~sound).int())):
        state.step -= 1
        raise Diverged(
            f"step {state.step + 1}: the loss or a gradient is not finite;"
            f" puzzle identifiers of the batch: {sorted(set(ids.tolist()))}"
        )
