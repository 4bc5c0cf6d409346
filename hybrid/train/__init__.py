"""The training loops. They see a `RunContext`, never Ray."""

from hybrid.train.estimate import estimate
from hybrid.train.pretrain import Result, check, pretrain, total_steps
from hybrid.train.state import TrainState

__all__ = ["Result", "TrainState", "check", "estimate", "pretrain", "total_steps"]
