"""The interface between the training loop and the model it trains: the TRM or the hybrid."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from hybrid.config import Config
from hybrid.context import RunContext
from hybrid.dataset import Dataset, Stream
from hybrid.dataset.stream import Rows
from hybrid.evaluate import Validation
from hybrid.train.state import TrainState
from hybrid.train.update import Sums
from hybrid.trm import Batch


class TrainModule(Protocol):
    """A model with its training step."""

    state: TrainState

    @property
    def kind(self) -> str:
        """Checkpoint kind: 'trm' or 'hybrid'."""
        ...

    @property
    def project(self) -> str:
        """W&B project."""
        ...

    @property
    def sections(self) -> tuple[str, ...]:
        """Config sections that must not change on resume."""
        ...

    def setup(self) -> None:
        """Prepare the model once, before the first step of a new run."""
        ...

    def step(self, batch: Batch, total_steps: int) -> Sums:
        """Take one optimizer step; return this worker's sums for metrics."""
        ...

    def predict_training_pairs(self, stream: Stream, count: int) -> Rows:
        """Return up to `count` original training pairs with the predicted tokens in `predicted`."""
        ...

    def validate(self, checkpoint: Path) -> Validation:
        """Score a checkpoint on held-out tasks, see `hybrid.evaluate.validate`."""
        ...

    def metadata(self) -> dict[str, Any]:
        """Return entries of state.json in addition to those of every run."""
        ...


MakeTrainModule = Callable[[Config, Dataset, RunContext, range], TrainModule]
