"""Steps of an optimiser: micro-batches, the finite check, the update of weights, table and EMA."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from hybrid.config import TrainingConfig
from hybrid.context import RunContext
from hybrid.dataset.stream import TOKENS, row_numbers_by_canvas
from hybrid.device import to_device
from hybrid.train.state import TrainState
from hybrid.trm import Batch, learning_rate, sign_sgd_
from hybrid.trm.model import Slots

Sums = dict[str, Tensor]


class Diverged(RuntimeError):
    """The loss or a gradient is not finite; raised before any weight has moved."""


def micro_batches(
    batch: Batch, most: int | None
) -> Iterator[tuple[list[int], Slots, dict[str, Tensor]]]:
    """Split a batch by canvas side, and each side into parts of at most `most` rows.

    Yields row numbers, the same as an index on the device, and the rows, token rows cut to the
    canvas. `batch["side"]` is on the host, so the split waits for nothing. The index is a slice
    where numbers are consecutive, which makes the rows views.
    """
    device = batch["inputs"].device
    for side, numbers in row_numbers_by_canvas(batch["side"].tolist()).items():
        passes = -(-len(numbers) // (most or len(numbers)))
        for part in range(passes):  # of equal size: a short one would leave a GPU idle
            first, last = (n * len(numbers) // passes for n in (part, part + 1))
            mine = numbers[first:last]
            slots = _slots(tuple(mine), device)
            rows = {name: value[slots] for name, value in batch.items() if name != "side"}
            rows |= {name: value[:, : side**2] for name, value in rows.items() if name in TOKENS}
            rows["side"] = torch.full((len(mine),), side, dtype=torch.int32, device=device)
            yield mine, slots, rows


@lru_cache(maxsize=256)
def _slots(numbers: tuple[int, ...], device: torch.device) -> Slots:
    if len(numbers) == numbers[-1] - numbers[0] + 1:
        return slice(numbers[0], numbers[-1] + 1)
    return to_device(torch.tensor(numbers), device)


def add_up(sums: Sums, more: Sums) -> None:
    """Add `more` to `sums`, by name."""
    for name, value in more.items():
        sums[name] = sums.get(name, 0) + value


def clear_gradients(state: TrainState) -> None:
    """Set every parameter's gradient to None."""
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
    """Update table, weights and average from gradients, after a check that all are finite.

    `ids` [slots] and `row_grads` [slots, ndim]: puzzle identifiers and their rows' gradients.
    `rates`: learning rate of each parameter before the schedule. Raises Diverged.
    """
    parameters = state.optimizer.parameters.values()
    _sum_gradients(parameters, context)
    ids = context.gather(ids, config.batch_size)
    row_grads = context.gather(row_grads, config.batch_size)
    if not read_flag(_all_finite(parameters, loss, row_grads, context)):
        state.step -= 1
        raise Diverged(
            f"step {state.step + 1}: the loss or a gradient is not finite;"
            f" puzzle identifiers of the batch: {sorted(set(ids.tolist()))}"
        )
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
    frozen = state.step <= config.freeze_weights_fraction * total_steps
    state.optimizer.step({name: 0.0 if frozen else rate(base) for name, base in rates.items()})
    state.ema.update()


def exploration(seed: int, step: int, batch_size: int, slots: range) -> Tensor:
    """[2, slots] uniform draws of a step; every worker draws for the whole batch and cuts."""
    draws = np.random.default_rng([seed, step]).random((2, batch_size), dtype=np.float32)
    return torch.from_numpy(draws[:, slots.start : slots.stop])


def read_flag(flag: Tensor) -> bool:
    """Read a bool from the device: the one point of a step where the host waits for it.

    Several workers wait once more, in `RunContext.agree`.
    """
    return bool(flag)


def _sum_gradients(parameters: Iterable[Tensor], context: RunContext) -> None:
    """One flat all-reduce: a sum, because the loss is divided by the global batch already."""
    if context.world_size == 1:
        return
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = context.sum_(torch.cat([grad.flatten() for grad in grads]))
    parts = torch.split(flat, [grad.numel() for grad in grads])
    for grad, summed in zip(grads, parts, strict=True):
        grad.copy_(summed.view_as(grad))


def _all_finite(
    parameters: Iterable[Tensor], loss: Tensor, row_grads: Tensor, context: RunContext
) -> Tensor:
    """Return a bool scalar: loss and gradients are finite on every worker.

    A maximum norm is finite if and only if all of its tensor's numbers are.
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    if row_grads.numel():
        grads.append(row_grads)
    norms = torch.stack(torch._foreach_norm(grads, float("inf")))
    sound = loss.detach().isfinite() & norms.isfinite().all()
    return context.sum_((~sound).int()) == 0
