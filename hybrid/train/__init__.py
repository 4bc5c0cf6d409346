"""The training loops. They see a `RunContext`, never Ray."""

from hybrid.train.estimate import estimate
from hybrid.train.pretrain import Result, check, pretrain, total_steps
from hybrid.train.state import TrainState
from hybrid.train.step import Diverged

__all__ = ["Diverged", "Result", "TrainState", "check", "estimate", "pretrain", "total_steps"]
