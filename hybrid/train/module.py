"""What is trained: the TRM alone, or the hybrid. The loop is the same."""

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
    """What is trained."""

    state: TrainState

    @property
    def kind(self) -> str:
        """Of its checkpoints: trm, hybrid."""
        ...

    @property
    def project(self) -> str:
        """In W&B."""
        ...

    @property
    def sections(self) -> tuple[str, ...]:
        """Of the config: a resumed run may not have changed them."""
        ...

    def start(self) -> None:
        """Called once, before a fresh run's first step."""
        ...

    def step(self, batch: Batch, total_steps: int) -> Sums:
        """One optimiser step."""
        ...

    def predict_training_pairs(self, stream: Stream, count: int) -> Rows:
        """Up to `count` original training pairs, and in `said` what it answers them with."""
        ...

    def validate(self, checkpoint: Path) -> Validation:
        """What a checkpoint just written is worth, see `hybrid.evaluate.validate`."""
        ...

    def describe(self) -> dict[str, Any]:
        """What a checkpoint says of it, beside what all say."""
        ...


MakeTrainModule = Callable[[Config, Dataset, RunContext, range], TrainModule]
