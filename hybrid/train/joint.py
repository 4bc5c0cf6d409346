"""Joint training of TRM and adapters around a language model, over all attempts at a puzzle.

A step takes a new row for every slot. What the reader is shown of it are the task's *other*
demonstrations and its input; the rows make their attempts, and the loss is summed over them.
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
    read_out,
)
from hybrid.solver.feedback import Confidence
from hybrid.train.loop import Result, train
from hybrid.train.preflight import training_stream
from hybrid.train.state import fresh
from hybrid.train.update import Sums, add_up, clear_gradients, exploration, micro_batches, move
from hybrid.trm import IGNORE, Batch, act_loss

CALIBRATION_ROWS = 64


class Joint:
    """The hybrid: TRM and adapters learn; the language model does not unless it is told to."""

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
        """`reader` replaces the one that config.llama describes."""
        self.config = config
        self.context = context
        self.reader = reader
        if reader is None and config.adapter.inject != "none":
            self.reader = open_reader(
                config.llama,
                context.device,
                models=config.models_folder,
                prompt_cache=config.prompt_cache_folder,
            )
        self.state = fresh(config, dataset, slots, context.device, self.reader, hybrid=True)
        assert isinstance(self.state.model, HybridModel)
        self.solver = self.state.model
        self.stream = training_stream(config, dataset)
        adapter = config.adapter.lr
        group = {"trm": config.training.lr, "to_latent": adapter, "to_text": adapter}
        group["llama"] = config.llama.lr
        self.rates = {name: group[name.split(".")[0]] for name in self.state.optimizer.parameters}

    @torch.no_grad()
    def start(self) -> None:
        """Calibrate what the adapter takes for news, on the rows that the stream begins with."""
        if self.reader is None or self.solver.to_latent is None:
            return
        size, device = self.config.llama.batch_size, self.context.device
        hidden = []
        for first in range(0, CALIBRATION_ROWS, size):
            places = np.arange(first, min(first + size, CALIBRATION_ROWS))
            rows = self.stream.rows(places)
            for mine, part in split_by_canvas(rows):
                inputs = torch.from_numpy(part["inputs"]).int().to(device)
                blank = self.state.trm.puzzle_table[:1].repeat(len(inputs), 1)
                problems = self.stream.problems(places[mine])
                encoding = self.reader.prefill([self.reader.prompt(task) for task in problems])
                begun = self.solver.begin({"inputs": inputs}, blank, encoding)
                most = min(2, self.config.training.max_attempts)
                judge, history = self._judge(None), self.config.feedback.history
                for attempt in attempts(self.solver, begun, judge, most=most, history=history):
                    assert attempt.reading.hidden is not None
                    hidden.append(attempt.reading.hidden)
        # The sums of several workers round differently; the first one's are everybody's.
        self.solver.to_latent.calibrate(torch.cat(hidden))
        for statistic in (self.solver.to_latent.mean, self.solver.to_latent.std):
            statistic.copy_(self.context.gather(statistic[None], self.context.world_size)[0])

    def step(self, batch: Batch, total_steps: int) -> Sums:
        """All attempts at the rows of the batch, then one move of the weights."""
        state, training = self.state, self.config.training
        state.step += 1
        self.solver.train()
        clear_gradients(state)
        # The slots have just taken their rows: those belong to the round before.
        rounds = state.rows_consumed.numpy() - 1
        places = rounds * training.batch_size + np.array(state.slots)
        ids = self._puzzle_ids(batch)
        row_grads = state.trm.puzzle_table.new_zeros(len(ids), state.trm.config.puzzle_emb_ndim)
        loss = torch.zeros((), device=ids.device)
        sums: Sums = {}
        least = self._least()
        for mine, slots, rows in micro_batches(batch, training.micro_batch_size):
            puzzle_rows = state.trm.puzzle_table[ids[slots].long()].requires_grad_()
            part, counted = self._attempts(rows, puzzle_rows, places[mine], least[mine].tolist())
            loss = loss + part
            add_up(sums, counted)
            if puzzle_rows.grad is not None:
                row_grads[slots] = puzzle_rows.grad
        move(state, loss, ids, row_grads, self.rates, training, total_steps, self.context)
        return sums

    def predict_training_pairs(self, stream: Stream, count: int) -> Rows:
        """After the last attempt, each pair read like a row of training."""
        rows, problems = stream.original_pairs(count), stream.original_problems(count)
        inputs = np.asarray(rows["inputs"], np.uint8)
        ids = torch.from_numpy(np.asarray(rows["puzzle_identifiers"])).long()
        table = self.state.trm.puzzle_table
        self.solver.eval()
        size = min(self.config.training.batch_size, self.config.evaluation.batch_size)
        said = np.full_like(inputs, PAD)
        for chosen, of_side in split_by_canvas(rows):
            numbers = np.arange(len(inputs))[chosen]
            for first in range(0, len(numbers), size):
                mine = numbers[first : first + size]
                prompts = None
                if self.reader:
                    prompts = [self.reader.prompt(problems[n]) for n in mine]
                played = run_attempts(
                    self.solver,
                    of_side["inputs"][first : first + size],
                    table[ids[mine].to(table.device)],
                    prompts,
                    self._judge(None),
                    most=self.config.training.max_attempts,
                    history=self.config.feedback.history,
                )
                for n, turns in zip(mine, played, strict=True):
                    said[n, : len(turns[-1].tokens)] = turns[-1].tokens
        return {**rows, "said": said}

    def validate(self, checkpoint: Path) -> Validation:
        """See `hybrid.evaluate.validate`. A language model that learns is opened once more: the
        one here must keep its weights.
        """
        reader = self.reader if self.config.llama.frozen else None
        return validate(self.config, checkpoint, self.context.device, reader)

    def describe(self) -> dict[str, Any]:
        """Name and revision of the language model; whether an answer was ever looked at."""
        return {
            "llama": self.reader.backbone.identity() if self.reader else None,
            "oracle": self.config.feedback.source == "oracle",
        }

    def _attempts(
        self,
        batch: Batch,
        puzzle_rows: Tensor,
        places: np.ndarray[Any, Any],
        least: Sequence[int],
    ) -> tuple[Tensor, Sums]:
        """Backward over windows of attempts; returns the loss and sums for metrics."""
        training = self.config.training
        encoding = None
        if self.reader:
            prompts = [self.reader.prompt(task) for task in self.stream.problems(places)]
            encoding = self.reader.prefill(prompts)
        scale = training.batch_size * training.max_attempts
        total = window = torch.zeros((), device=puzzle_rows.device)
        sums: Sums = {}
        for attempt in attempts(
            self.solver,
            self.solver.begin(batch, puzzle_rows, encoding),
            self._judge(batch),
            most=training.max_attempts,
            history=self.config.feedback.history,
            least=least,
            bptt=training.bptt_attempts,
            recompute=training.recompute,
        ):
            loss, of_attempt = _loss(attempt)
            window = window + loss / scale
            add_up(sums, of_attempt)
            if attempt.cut:
                torch.autograd.backward(window)
                total, window = total + window.detach(), torch.zeros_like(total)
        return total, sums

    def _judge(self, batch: Batch | None) -> FeedbackSource:
        """The source of feedback; of training rows the answer is a label, and known."""
        feedback = self.config.feedback
        if feedback.source == "none" or (feedback.source == "oracle" and batch is None):
            return NoFeedback()
        if feedback.source == "confidence" or batch is None:
            return Confidence(feedback)
        assert feedback.source == "oracle", feedback.source
        labels = batch["labels"].masked_fill(batch["labels"] == IGNORE, 0)
        pairs = zip(labels.cpu().numpy(), batch["inputs"].cpu().numpy(), strict=True)
        answers = [read_out(a.astype(np.uint8), b.astype(np.uint8))[0] for a, b in pairs]
        return Oracle(feedback, answers)

    def _least(self) -> Tensor:
        """[slots] attempts that rows make at least: exploration as in the published halting."""
        training, trm = self.config.training, self.config.trm
        explore, least = exploration(
            training.seed, self.state.step, training.batch_size, self.state.slots
        )
        minimum = 2 + (least * (training.max_attempts - 1)).long()
        return torch.where(explore < trm.halt_exploration_prob, minimum, 1)

    def _puzzle_ids(self, batch: Batch) -> Tensor:
        """[slots]: the rows' own, or the blank one where it is drawn."""
        training, ids = self.config.training, batch["puzzle_identifiers"]
        draws = np.random.default_rng([training.seed, self.state.step, 1])
        blank = draws.random(training.batch_size) < training.blank_puzzle_prob
        mine = torch.from_numpy(blank[self.state.slots.start : self.state.slots.stop])
        return ids.masked_fill(mine.to(ids.device), 0)


def joint(config: Config, context: RunContext) -> Result:
    """Train the hybrid to the end, from the newest checkpoint of the run folder if there is one."""
    return train(config, context, Joint)


def _loss(attempt: Attempt) -> tuple[Tensor, Sums]:
    """Of one attempt, summed over its rows."""
    number = torch.full_like(attempt.ended, attempt.number, dtype=torch.int32)
    outputs, labels = attempt.outputs, attempt.rows.current["labels"]
    loss, sums = act_loss(outputs.logits, outputs.q_halt, labels, number, attempt.ended)
    sums["attempts"] = loss.new_tensor(len(number))
    # One row differs from nobody: it is not among those compared.
    compared = len(number) if len(number) > 1 else 0
    sums["compared"] = loss.new_tensor(compared)
    sums["latent_variance"] = compared * latent_variance(attempt.reading.latent).to(loss)
    return loss, sums


def latent_variance(latent: Tensor | None) -> Tensor:
    """Share of what the reader says that differs between rows, 0..1; below 0.2 it has collapsed."""
    if latent is None or len(latent) < 2:
        return torch.zeros(())
    flat = latent.flatten(1).float()
    power = flat.square().sum(1).mean()
    shared = flat.mean(0).square().sum()
    return (1 - shared / power.clamp_min(1e-30)).clamp(0, 1) * (power > 0)
