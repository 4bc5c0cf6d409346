"""One optimiser step of the TRM."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor

from hybrid.config import TrainingConfig
from hybrid.context import RunContext
from hybrid.dataset.stream import by_side
from hybrid.train.state import TrainState
from hybrid.trm import Batch, act_loss, learning_rate, sign_sgd_

Sums = dict[str, Tensor]


class Diverged(RuntimeError):
    """The loss or a gradient is not finite; raised before any weight has moved."""


def train_step(
    state: TrainState, batch: Batch, config: TrainingConfig, total_steps: int, context: RunContext
) -> Sums:
    """Advance the TRM by one step; returns this worker's sums for metrics.

    `batch` has new rows for the slots that have halted, and for all slots the side of their canvas,
    as `Feed.refill` makes it; rows on different canvases go through the model one after the other.
    The order is the published one: count, forward, backward, puzzle table, weights, average. The
    loss is summed over rows and divided by the *global* batch, gradients are summed over workers.
    """
    state.step += 1
    state.model.train()
    clear_gradients(state)
    draws = exploration(config.seed, state.step, config.batch_size, state.slots)
    explore, least = draws.to(context.device)
    ids = torch.zeros_like(batch["puzzle_identifiers"])
    row_grads = torch.zeros(len(ids), state.trm.config.puzzle_emb_ndim, device=context.device)
    loss = torch.zeros((), dtype=torch.float64, device=context.device)
    sums: Sums = {}
    parts = []
    for slots, rows in by_side(batch):
        carry, outputs = state.trm.act_step(
            state.carry.take(slots, rows["inputs"].shape[1]),
            rows,
            exploration=(explore[slots], least[slots]),
        )
        part, counted = act_loss(
            outputs.logits, outputs.q_halt, carry.current["labels"], carry.steps, carry.halted
        )
        torch.autograd.backward(part / config.batch_size)
        loss += part.detach()
        add_up(sums, counted)
        ids[slots] = carry.current["puzzle_identifiers"]
        if outputs.puzzle_rows is not None and outputs.puzzle_rows.grad is not None:
            row_grads[slots] = outputs.puzzle_rows.grad
        parts.append((slots, carry))
    rates = dict.fromkeys(state.optimizer.parameters, config.lr)
    move(state, loss, ids, row_grads, rates, config, total_steps, context)
    state.carry = state.carry.put(parts)
    return sums


def add_up(sums: Sums, more: Sums) -> None:
    """Add `more` to `sums`, by name."""
    for name, value in more.items():
        sums[name] = sums.get(name, 0) + value


def clear_gradients(state: TrainState) -> None:
    """No parameter has a gradient."""
    for parameter in state.optimizer.parameters.values():
        parameter.grad = None


def move(
    state: TrainState,
    loss: Tensor,
    ids: Tensor,
    row_grads: Tensor,
    rates: Mapping[str, float],
    config: TrainingConfig,
    total_steps: int,
    context: RunContext,
) -> None:
    """What follows backward: sum over workers, refuse what is not finite, table, weights, average.

    `ids` [slots] and `row_grads` [slots, ndim]: puzzle identifiers and their rows' gradients.
    `rates`: learning rate of each parameter before the schedule.
    """
    parameters = state.optimizer.parameters.values()
    _sum_gradients(parameters, context)
    ids = context.gather(ids, config.batch_size)
    row_grads = context.gather(row_grads, config.batch_size)
    _refuse_non_finite(state, loss, row_grads, ids, context)
    if config.clip_norm is not None:
        torch.nn.utils.clip_grad_norm_(parameters, config.clip_norm)

    def rate(base: float) -> float:
        return learning_rate(
            state.step,
            base=base,
            warmup=config.lr_warmup_steps,
            total=total_steps,
            min_ratio=config.lr_min_ratio,
        )

    sign_sgd_(
        state.trm.puzzle_table,
        ids,
        row_grads,
        lr=rate(config.puzzle_lr),
        weight_decay=config.puzzle_weight_decay,
    )
    frozen = state.step <= config.freeze_trunk * total_steps
    state.optimizer.step({name: 0.0 if frozen else rate(base) for name, base in rates.items()})
    state.average.update()


def exploration(seed: int, step: int, batch_size: int, slots: range) -> Tensor:
    """[2, slots] uniform draws of a step; every worker draws for the whole batch and cuts."""
    draws = np.random.default_rng([seed, step]).random((2, batch_size), dtype=np.float32)
    return torch.from_numpy(draws[:, slots.start : slots.stop])


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
    state: TrainState, loss: Tensor, row_grads: Tensor, ids: Tensor, context: RunContext
) -> None:
    """Raise Diverged on every worker if anything is not finite on one."""
    sound = loss.detach().isfinite()
    for parameter in state.optimizer.parameters.values():
        assert parameter.grad is not None
        sound = sound & parameter.grad.isfinite().all()
    sound = sound & row_grads.isfinite().all()
    if int(context.sum_((~sound).int())):
        state.step -= 1
        raise Diverged(
            f"step {state.step + 1}: the loss or a gradient is not finite;"
            f" puzzle identifiers of the batch: {sorted(set(ids.tolist()))}"
        )
