"""Parts of an optimizer step: micro-batches, finite check, update of weights, table and EMA."""

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
"""Scalar tensors by metric name, summed over this worker's rows."""


class Diverged(RuntimeError):
    """Raised before any weight changes if the loss or a gradient is not finite."""


def micro_batches(
    batch: Batch, max_rows: int | None
) -> Iterator[tuple[list[int], Slots, dict[str, Tensor]]]:
    """Split a batch by canvas side, and each side into micro-batches of at most `max_rows` rows.

    Yields the row numbers, the same numbers as an index on the device, and the rows with tokens cut
    to the canvas. `batch["side"]` is on the CPU, so the split does not wait for the device. The
    index of consecutive rows is a slice, which makes them views of the batch.
    """
    device = batch["inputs"].device
    for side, numbers in row_numbers_by_canvas(batch["side"].tolist()).items():
        passes = -(-len(numbers) // (max_rows or len(numbers)))
        for part in range(passes):  # of equal size: a short pass would leave the GPU idle
            first, last = (n * len(numbers) // passes for n in (part, part + 1))
            part_numbers = numbers[first:last]
            slots = _slots(tuple(part_numbers), device)
            rows = {name: value[slots] for name, value in batch.items() if name != "side"}
            rows |= {name: value[:, : side**2] for name, value in rows.items() if name in TOKENS}
            rows["side"] = torch.full((last - first,), side, dtype=torch.int32, device=device)
            yield part_numbers, slots, rows


@lru_cache(maxsize=256)
def _slots(numbers: tuple[int, ...], device: torch.device) -> Slots:
    if len(numbers) == numbers[-1] - numbers[0] + 1:
        return slice(numbers[0], numbers[-1] + 1)
    return to_device(torch.tensor(numbers), device)


def accumulate_sums(sums: Sums, more: Sums) -> None:
    """Add `more` to `sums` in place, by name."""
    for name, value in more.items():
        sums[name] = sums.get(name, 0) + value


def clear_gradients(state: TrainState) -> None:
    """Set the gradient of every trained parameter to None."""
    for parameter in state.optimizer.parameters.values():
        parameter.grad = None


def apply_gradients(
    state: TrainState,
    loss: Tensor,
    ids: Tensor,
    row_grads: Tensor,
    rates: Mapping[str, float],
    config: TrainingConfig,
    total_steps: int,
    context: RunContext,
) -> None:
    """Update puzzle table, weights and EMA from the gradients of all workers.

    `ids` [slots] and `row_grads` [slots, ndim]: puzzle identifiers and their rows' gradients.
    `rates`: learning rate of each parameter before the schedule. Raises Diverged if the loss or a
    gradient is not finite.
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
    """Return the [2, slots] uniform draws of a step: those of the global batch, cut to `slots`."""
    draws = np.random.default_rng([seed, step]).random((2, batch_size), dtype=np.float32)
    return torch.from_numpy(draws[:, slots.start : slots.stop])


def read_flag(flag: Tensor) -> bool:
    """Read a bool from the device; the only point of a step where the host waits for the device.

    With several workers the host also waits in `RunContext.agree`.
    """
    return bool(flag)


def _sum_gradients(parameters: Iterable[Tensor], context: RunContext) -> None:
    """Sum gradients over workers in one flat all-reduce; the loss has the global batch's scale."""
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
    """Return a bool scalar: True if loss and gradients are finite on every worker.

    The maximum norm of a tensor is finite if and only if all its elements are.
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    if row_grads.numel():
        grads.append(row_grads)
    norms = torch.stack(torch._foreach_norm(grads, float("inf")))
    finite = loss.detach().isfinite() & norms.isfinite().all()
    return context.sum_((~finite).int()) == 0
