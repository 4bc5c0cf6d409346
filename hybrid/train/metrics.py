"""Training metrics: sums over steps and workers, train accuracy and validation."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hybrid.config import Config
from hybrid.context import RunContext
from hybrid.dataset import Stream
from hybrid.evaluate import Validation, exact_match
from hybrid.train.module import TrainModule
from hybrid.train.tracking import RunTracker, read_metrics
from hybrid.train.update import Sums


class MetricsAggregator:
    """Sum metrics over steps and workers; write them every `logging.every` steps and on saving."""

    def __init__(
        self,
        module: TrainModule,
        stream: Stream,
        config: Config,
        context: RunContext,
        tracker: RunTracker,
    ) -> None:
        self.module, self.state = module, module.state
        self.stream, self.config, self.context, self.tracker = stream, config, context, tracker
        self.latest: dict[str, Any] = {}
        self.waited = 0.0
        self._restart()

    def _restart(self) -> None:
        self.sums: Sums = {}
        self.waited_before = self.waited
        self.steps = 0
        self.since = time.perf_counter()

    def add(self, sums: Sums, waited: float, saving: bool) -> None:
        """Add one step; every worker must call it, because writing sums over workers.

        `waited`: seconds spent waiting for rows since the start, `SlotLoader.waited`.
        """
        self.waited = waited
        for name, value in sums.items():
            self.sums[name] = self.sums.get(name, 0) + value.double()
        self.steps += 1
        if saving or self.state.step % self.config.logging.every == 0:
            self._write()

    def _write(self) -> None:
        names = sorted(self.sums)
        packed = torch.stack([self.sums[name] for name in names])
        rows_consumed = self.state.rows_consumed.sum().to(packed)
        *values, rows = self.context.sum_(torch.cat((packed, rows_consumed[None]))).tolist()
        sums = dict(zip(names, values, strict=True))
        seconds = time.perf_counter() - self.since
        rows_trained = self.steps * self.config.training.batch_size
        ended = max(1.0, sums.pop("count"))
        # The TRM has one loss per row and step, the hybrid one per attempt.
        predictions = sums.pop("attempts", rows_trained)
        losses = {name: sums.pop(name) / predictions for name in ("lm_loss", "q_halt_loss")}
        if "compared" in sums:
            compared, variance = sums.pop("compared"), sums.pop("latent_variance")
            if compared:  # zero if every micro-batch has one row
                losses["latent_variance"] = variance / compared
        self.latest = {
            "loss": losses["lm_loss"] + 0.5 * losses["q_halt_loss"],
            **losses,
            **{name: value / ended for name, value in sums.items()},
            "epoch": rows / len(self.stream),
            "samples_per_s": rows_trained / seconds,
            "seconds_per_step": seconds / self.steps,
            "waiting_for_rows": (self.waited - self.waited_before) / seconds,
        }
        self.tracker.write({"step": self.state.step, **self.latest})
        if self.context.rank == 0:
            self.context.gauge({"step": self.state.step, **self.latest})
        self._restart()

    def measure_train_accuracy(self) -> None:
        """Write the exact accuracy of the EMA weights on original training pairs; rank 0 only."""
        count = self.config.training.train_accuracy_pairs
        if self.context.rank or not count:
            return
        started = time.perf_counter()
        with self.state.ema.applied():
            rows = self.module.predict_training_pairs(self.stream, count)
        correct = exact_match(rows["predicted"].astype(np.uint8), rows["labels"])
        self.tracker.write(
            {
                "step": self.state.step,
                "train_accuracy/exact": float(correct.mean()),
                "train_accuracy/pairs": len(correct),
            }
        )
        self.tracker.log_predictions(self.state.step, rows, correct)
        self.since += time.perf_counter() - started  # not part of seconds_per_step

    def validated(self) -> dict[int, Validation]:
        """Return the run's validations so far, by step."""
        return validated(read_metrics(self.config.run_folder / "metrics.jsonl"))

    def validate(self, checkpoint: Path) -> None:
        """Score a checkpoint on held-out tasks; called by rank 0 while the other workers wait."""
        started = time.perf_counter()
        metrics = self.module.validate(checkpoint).metrics()
        self.latest = {**self.latest, **metrics}
        self.tracker.write({"step": self.state.step, **metrics})
        self.context.gauge({"validation_right": metrics["validation/right"]})
        self.since += time.perf_counter() - started


def train_accuracies(run_folder: Path) -> dict[int, float]:
    """Return the exact accuracies on training pairs in metrics.jsonl, by step."""
    key = "train_accuracy/exact"
    metrics = read_metrics(run_folder / "metrics.jsonl")
    return {m["step"]: m[key] for m in metrics if key in m}


def validated(metrics: Sequence[Mapping[str, Any]]) -> dict[int, Validation]:
    """Return the validations among the lines of a metrics.jsonl, by step."""
    names = ("right", "evaluated", "cells")
    return {
        m["step"]: Validation(**{name: m[f"validation/{name}"] for name in names})
        for m in metrics
        if "validation/evaluated" in m
    }
