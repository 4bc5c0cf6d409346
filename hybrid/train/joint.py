"""Joint training of TRM and adapters around a language model, over all attempts at a puzzle.

Each step takes a new row for every slot. The reader sees the row's input and the *other*
demonstrations of its task. The loss is summed over all attempts of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hybrid.arc import PAD
from hybrid.config import Config
from hybrid.context import RunContext
from hybrid.dataset import Dataset, Stream
from hybrid.dataset.stream import Rows, split_by_canvas
from hybrid.evaluate import Validation, run_attempts, validate
from hybrid.llm import Reader, open_reader
from hybrid.solver import (
    Attempt,
    FeedbackSource,
    HybridModel,
    NoFeedback,
    Oracle,
    attempts,
    extract_grid,
)
from hybrid.solver.feedback import Confidence
from hybrid.train.loop import Result, train
from hybrid.train.preflight import training_stream
from hybrid.train.state import create_state
from hybrid.train.update import (
    Sums,
    accumulate_sums,
    apply_gradients,
    clear_gradients,
    exploration,
    micro_batches,
)
from hybrid.trm import IGNORE, Batch, act_loss

CALIBRATION_ROWS = 64
"""Training rows from which the adapter's input mean and standard deviation are computed."""


class Joint:
    """Train module of the hybrid: TRM and adapters, and the language model if it is not frozen."""

    kind = "hybrid"
    project = "arc-hybrid-joint"
    sections = ("trm", "training", "llama", "adapter", "feedback")

    def __init__(
        self,
        config: Config,
        dataset: Dataset,
        context: RunContext,
        slots: range,
        reader: Reader | None = None,
    ) -> None:
        """Build the hybrid; `reader` replaces the one that config.llama describes."""
        self.config, self.context, self.reader = config, context, reader
        if reader is None and config.adapter.inject != "none":
            self.reader = open_reader(
                config.llama,
                context.device,
                models=config.models_folder,
                prompt_cache=config.prompt_cache_folder,
            )
        self.state = create_state(config, dataset, slots, context.device, self.reader, hybrid=True)
        assert isinstance(self.state.model, HybridModel)
        self.solver = self.state.model
        self.stream = training_stream(config, dataset)
        adapter = config.adapter.lr
        group = {"trm": config.training.lr, "to_latent": adapter, "to_text": adapter}
        group["llama"] = config.llama.lr
        self.rates = {name: group[name.split(".")[0]] for name in self.state.optimizer.parameters}

    @torch.no_grad()
    def setup(self) -> None:
        """Fit the adapter's input mean and std on the first CALIBRATION_ROWS training rows."""
        if self.reader is None or self.solver.to_latent is None:
            return
        size, device = self.config.llama.batch_size, self.context.device
        hidden = []
        for first in range(0, CALIBRATION_ROWS, size):
            positions = np.arange(first, min(first + size, CALIBRATION_ROWS))
            rows = self.stream.rows(positions)
            for selection, part in split_by_canvas(rows):
                inputs = torch.from_numpy(part["inputs"]).int().to(device)
                blank = self.state.trm.puzzle_table[:1].repeat(len(inputs), 1)
                problems = self.stream.problems(positions[selection])
                cache = self.reader.prefill([self.reader.prompt(task) for task in problems])
                for attempt in attempts(
                    self.solver,
                    self.solver.initial_state({"inputs": inputs}, blank, cache),
                    self._feedback_source(None),
                    max_attempts=min(2, self.config.training.max_attempts),
                    history=self.config.feedback.history,
                ):
                    assert attempt.reading.hidden is not None
                    hidden.append(attempt.reading.hidden)
        # Workers may round differently; all of them use the statistics of rank 0.
        self.solver.to_latent.calibrate(torch.cat(hidden))
        for statistic in (self.solver.to_latent.mean, self.solver.to_latent.std):
            statistic.copy_(self.context.gather(statistic[None], self.context.world_size)[0])

    def step(self, batch: Batch, total_steps: int) -> Sums:
        """Run all attempts at the rows of the batch, then update the weights once."""
        state, training = self.state, self.config.training
        state.step += 1
        self.solver.train()
        clear_gradients(state)
        rounds = state.rows_consumed.numpy() - 1  # the loader has counted these rows already
        positions = rounds * training.batch_size + np.array(state.slots)
        ids = self._puzzle_ids(batch)
        row_grads = state.trm.puzzle_table.new_zeros(len(ids), state.trm.config.puzzle_emb_ndim)
        loss = torch.zeros((), device=ids.device)
        sums: Sums = {}
        min_attempts = self._min_attempts()
        for numbers, slots, rows in micro_batches(batch, training.micro_batch_size):
            puzzle_rows = state.trm.puzzle_table[ids[slots].long()].requires_grad_()
            part, part_sums = self._attempts(
                rows, puzzle_rows, positions[numbers], min_attempts[numbers].tolist()
            )
            loss = loss + part
            accumulate_sums(sums, part_sums)
            if puzzle_rows.grad is not None:
                row_grads[slots] = puzzle_rows.grad
        apply_gradients(
            state, loss, ids, row_grads, self.rates, training, total_steps, self.context
        )
        return sums

    def predict_training_pairs(self, stream: Stream, count: int) -> Rows:
        """Predict after the last attempt; the reader sees each pair as it sees a training row."""
        rows, problems = stream.original_pairs(count), stream.original_problems(count)
        inputs = np.asarray(rows["inputs"], np.uint8)
        ids = torch.from_numpy(np.asarray(rows["puzzle_identifiers"])).long()
        table = self.state.trm.puzzle_table
        self.solver.eval()
        size = min(self.config.training.batch_size, self.config.evaluation.batch_size)
        predicted = np.full_like(inputs, PAD)
        for selection, part in split_by_canvas(rows):
            numbers = np.arange(len(inputs))[selection]
            for first in range(0, len(numbers), size):
                batch = numbers[first : first + size]
                prompts = None
                if self.reader:
                    prompts = [self.reader.prompt(problems[n]) for n in batch]
                records = run_attempts(
                    self.solver,
                    part["inputs"][first : first + size],
                    table[ids[batch].to(table.device)],
                    prompts,
                    self._feedback_source(None),
                    max_attempts=self.config.training.max_attempts,
                    history=self.config.feedback.history,
                )
                for n, row_records in zip(batch, records, strict=True):
                    predicted[n, : len(row_records[-1].tokens)] = row_records[-1].tokens
        return {**rows, "predicted": predicted}

    def validate(self, checkpoint: Path) -> Validation:
        """Score a checkpoint on held-out tasks, see `hybrid.evaluate.validate`."""
        # A trained language model is loaded again, because this one must keep its weights.
        reader = self.reader if self.config.llama.frozen else None
        return validate(self.config, checkpoint, self.context.device, reader)

    def metadata(self) -> dict[str, Any]:
        """Return the language model's identity and whether feedback came from the answers."""
        return {
            "llama": self.reader.backbone.identity() if self.reader else None,
            "oracle": self.config.feedback.source == "oracle",
        }

    def _attempts(
        self,
        batch: Batch,
        puzzle_rows: Tensor,
        positions: np.ndarray[Any, Any],
        min_attempts: Sequence[int],
    ) -> tuple[Tensor, Sums]:
        """Run backward() over windows of attempts; return the loss and sums for metrics."""
        training = self.config.training
        cache = None
        if self.reader:
            prompts = [self.reader.prompt(task) for task in self.stream.problems(positions)]
            cache = self.reader.prefill(prompts)
        scale = training.batch_size * training.max_attempts
        total = window = torch.zeros((), device=puzzle_rows.device)
        sums: Sums = {}
        for attempt in attempts(
            self.solver,
            self.solver.initial_state(batch, puzzle_rows, cache),
            self._feedback_source(batch),
            max_attempts=training.max_attempts,
            history=self.config.feedback.history,
            min_attempts=min_attempts,
            bptt=training.bptt_attempts,
            recompute=training.recompute,
        ):
            loss, attempt_sums = _loss(attempt)
            window = window + loss / scale
            accumulate_sums(sums, attempt_sums)
            if attempt.cut:
                torch.autograd.backward(window)
                total, window = total + window.detach(), torch.zeros_like(total)
        return total, sums

    def _feedback_source(self, batch: Batch | None) -> FeedbackSource:
        """Return the source of feedback; an oracle needs `batch`, whose labels are the answers."""
        feedback = self.config.feedback
        if feedback.source == "none" or (feedback.source == "oracle" and batch is None):
            return NoFeedback()
        if feedback.source == "confidence" or batch is None:
            return Confidence(feedback)
        assert feedback.source == "oracle", feedback.source
        labels = batch["labels"].masked_fill(batch["labels"] == IGNORE, 0)
        pairs = zip(labels.cpu().numpy(), batch["inputs"].cpu().numpy(), strict=True)
        answers = [extract_grid(a.astype(np.uint8), b.astype(np.uint8))[0] for a, b in pairs]
        return Oracle(feedback, answers)

    def _min_attempts(self) -> Tensor:
        """Return each row's minimum of attempts, [slots]: exploration as in published halting."""
        training, trm = self.config.training, self.config.trm
        explore, draws = exploration(
            training.seed, self.state.step, training.batch_size, self.state.slots
        )
        minimum = 2 + (draws * (training.max_attempts - 1)).long()
        return torch.where(explore < trm.halt_exploration_prob, minimum, 1)

    def _puzzle_ids(self, batch: Batch) -> Tensor:
        """Return the rows' puzzle identifiers [slots], blank with probability blank_puzzle_prob."""
        training, ids = self.config.training, batch["puzzle_identifiers"]
        draws = np.random.default_rng([training.seed, self.state.step, 1])
        blank = draws.random(training.batch_size) < training.blank_puzzle_prob
        own = torch.from_numpy(blank[self.state.slots.start : self.state.slots.stop])
        return ids.masked_fill(own.to(ids.device), 0)


def joint(config: Config, context: RunContext) -> Result:
    """Train the hybrid to the last step, resuming from the newest checkpoint if there is one."""
    return train(config, context, Joint)


def _loss(attempt: Attempt) -> tuple[Tensor, Sums]:
    """Return the loss of one attempt, summed over its rows, and its sums for metrics."""
    number = torch.full_like(attempt.ended, attempt.number, dtype=torch.int32)
    outputs, labels = attempt.outputs, attempt.state.current["labels"]
    loss, sums = act_loss(outputs.logits, outputs.q_halt, labels, number, attempt.ended)
    sums["attempts"] = loss.new_tensor(len(number))
    # Variance needs at least two rows.
    compared = len(number) if len(number) > 1 else 0
    sums["compared"] = loss.new_tensor(compared)
    sums["latent_variance"] = compared * latent_variance(attempt.reading.delta).to(loss)
    return loss, sums


def latent_variance(delta: Tensor | None) -> Tensor:
    """Return the share of the deltas that differs between rows, 0..1; below 0.2 they collapsed."""
    if delta is None or len(delta) < 2:
        return torch.zeros(())
    flat = delta.flatten(1).float()
    power = flat.square().sum(1).mean()
    shared = flat.mean(0).square().sum()
    return (1 - shared / power.clamp_min(1e-30)).clamp(0, 1) * (power > 0)
