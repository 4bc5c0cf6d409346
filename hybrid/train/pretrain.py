"""Pretraining and test-time training of the TRM on the dataset's training pairs."""

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
from hybrid.train.state import TrainState, create_state
from hybrid.train.update import (
    Sums,
    accumulate_sums,
    apply_gradients,
    clear_gradients,
    exploration,
    micro_batches,
)
from hybrid.trm import Batch, act_loss


class Pretraining:
    """Train module of the TRM alone: one ACT step per optimizer step."""

    kind = "trm"
    project = "arc-trm-pretrain"
    sections = ("trm", "training")

    def __init__(self, config: Config, dataset: Dataset, context: RunContext, slots: range) -> None:
        self.config, self.context = config, context
        self.state = create_state(config, dataset, slots, context.device)

    def setup(self) -> None:
        """Do nothing."""

    def step(self, batch: Batch, total_steps: int) -> Sums:
        """Advance every slot by one ACT step and update the weights."""
        return train_step(self.state, batch, self.config.training, total_steps, self.context)

    def predict_training_pairs(self, stream: Stream, count: int) -> Rows:
        """Predict after all ACT steps, with each variant's puzzle embedding."""
        rows = stream.original_pairs(count)
        predicted = predict_rows(self.state.trm, rows, self.config.evaluation.batch_size)
        return {**rows, "predicted": predicted}

    def validate(self, checkpoint: Path) -> Validation:
        """Score a checkpoint on held-out tasks, see `hybrid.evaluate.validate`."""
        return validate(self.config, checkpoint, self.context.device)

    def metadata(self) -> dict[str, Any]:
        """Return no entries in addition to those of every run."""
        return {}


def pretrain(config: Config, context: RunContext) -> Result:
    """Train the TRM to the last step, resuming from the newest checkpoint if there is one."""
    return train(config, context, Pretraining)


def train_step(
    state: TrainState, batch: Batch, config: TrainingConfig, total_steps: int, context: RunContext
) -> Sums:
    """Take one optimizer step of the TRM; return this worker's sums for metrics.

    `batch` comes from `SlotLoader.refill`: new rows for halted slots, and every slot's canvas side.
    Gradients accumulate over canvas sides and over micro-batches of `micro_batch_size` rows.
    The order is the published one: step count, forward, backward, puzzle table, weights, EMA. The
    loss is summed over rows and divided by the *global* batch size; gradients are summed over
    workers.
    """
    state.step += 1
    state.model.train()
    clear_gradients(state)
    draws = exploration(config.seed, state.step, config.batch_size, state.slots)
    explore, min_steps = to_device(draws, context.device)
    ids = torch.zeros_like(batch["puzzle_identifiers"])
    row_grads = torch.zeros(len(ids), state.trm.config.puzzle_emb_ndim, device=context.device)
    loss = torch.zeros((), dtype=torch.float64, device=context.device)
    sums: Sums = {}
    parts = []
    for _, slots, rows in micro_batches(batch, config.micro_batch_size):
        carry, outputs = state.trm.act_step(
            state.carry.select(slots, rows["inputs"].shape[1]),
            rows,
            exploration=(explore[slots], min_steps[slots]),
        )
        part, part_sums = act_loss(
            outputs.logits, outputs.q_halt, carry.current["labels"], carry.steps, carry.halted
        )
        torch.autograd.backward(part / config.batch_size)
        loss += part.detach()
        accumulate_sums(sums, part_sums)
        ids[slots] = carry.current["puzzle_identifiers"]
        if outputs.puzzle_rows is not None and outputs.puzzle_rows.grad is not None:
            row_grads[slots] = outputs.puzzle_rows.grad
        parts.append((slots, carry))
    after = state.carry.scatter(parts)
    # Enqueued before the host waits in `apply_gradients`, which then waits for both.
    halted = after.halted.to("cpu", non_blocking=True)
    rates = dict.fromkeys(state.optimizer.parameters, config.lr)
    apply_gradients(state, loss, ids, row_grads, rates, config, total_steps, context)
    state.carry, state.halted = after, halted
    return sums
