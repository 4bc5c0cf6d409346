"""Pretraining of the TRM on the dataset's training pairs, and test-time training of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hybrid.config import Config
from hybrid.context import RunContext
from hybrid.dataset import Dataset, Stream
from hybrid.dataset.stream import Rows
from hybrid.evaluate import Validation, said_to, validate
from hybrid.train.loop import Result, train
from hybrid.train.state import fresh
from hybrid.train.step import Sums, train_step
from hybrid.trm import Batch


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

    def probe(self, stream: Stream, count: int) -> Rows:
        """After all ACT steps, with each puzzle's own row."""
        rows = stream.original_pairs(count)
        said = said_to(self.state.trm, rows, self.config.evaluation.batch_size)
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
