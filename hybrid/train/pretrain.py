"""Pretraining of the TRM on the dataset's training pairs, and test-time training of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from hybrid.config import Config, TrainingConfig
from hybrid.context import RunContext
from hybrid.dataset import Dataset, Stream
from hybrid.dataset.stream import Rows
from hybrid.device import to_device
from hybrid.evaluate import Validation, predict_rows, validate
from hybrid.train.loop import Result, train
from hybrid.train.state import TrainState, fresh
from hybrid.train.update import Sums, add_up, clear_gradients, exploration, micro_batches, move
from hybrid.trm import Batch, act_loss


class Pretraining:
    """The TRM alone, one ACT step an optimiser step."""

    kind = "trm"
    project = "arc-trm-pretrain"
    sections = ("trm", "training")

    def __init__(self, config: Config, dataset: Dataset, context: RunContext, slots: range) -> None:
        self.config = config
        self.context = context
        self.state = fresh(config, dataset, slots, context.device)

    def start(self) -> None:
        """Nothing to prepare."""

    def step(self, batch: Batch, total_steps: int) -> Sums:
        """One ACT step of every slot."""
        return train_step(self.state, batch, self.config.training, total_steps, self.context)

    def predict_training_pairs(self, stream: Stream, count: int) -> Rows:
        """After all ACT steps, with each puzzle's own row."""
        rows = stream.original_pairs(count)
        said = predict_rows(self.state.trm, rows, self.config.evaluation.batch_size)
        return {**rows, "said": said}

    def validate(self, checkpoint: Path) -> Validation:
        """See `hybrid.evaluate.validate`."""
        return validate(self.config, checkpoint, self.context.device)

    def describe(self) -> dict[str, Any]:
        """Nothing but what all say."""
        return {}


def pretrain(config: Config, context: RunContext) -> Result:
    """Train the TRM to the end, from the newest checkpoint of the run folder if there is one."""
    return train(config, context, Pretraining)


def train_step(
    state: TrainState, batch: Batch, config: TrainingConfig, total_steps: int, context: RunContext
) -> Sums:
    """Advance the TRM by one step; returns this worker's sums for metrics.

    `batch` is what `Feed.refill` returns: new rows for the slots that have halted, and the canvas
    side of every slot. Canvases of different sides, and micro-batches of `micro_batch_size` rows,
    go through the model one after the other; gradients add up. The order is the published one:
    count, forward, backward, puzzle table, weights, average. The loss is summed over rows and
    divided by the *global* batch, gradients are summed over workers.
    """
    state.step += 1
    state.model.train()
    clear_gradients(state)
    draws = exploration(config.seed, state.step, config.batch_size, state.slots)
    explore, least = to_device(draws, context.device)
    ids = torch.zeros_like(batch["puzzle_identifiers"])
    row_grads = torch.zeros(len(ids), state.trm.config.puzzle_emb_ndim, device=context.device)
    loss = torch.zeros((), dtype=torch.float64, device=context.device)
    sums: Sums = {}
    parts = []
    for _, slots, rows in micro_batches(batch, config.micro_batch_size):
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
    after = state.carry.put(parts)
    # Enqueued before the read in `move`, which thereby waits for both.
    halted = after.halted.to("cpu", non_blocking=True)
    rates = dict.fromkeys(state.optimizer.parameters, config.lr)
    move(state, loss, ids, row_grads, rates, config, total_steps, context)
    state.carry, state.halted = after, halted
    return sums
