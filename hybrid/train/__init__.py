"""The training loops. They see a `RunContext`, never Ray."""

from hybrid.train.estimate import estimate
from hybrid.train.joint import Joint, joint
from hybrid.train.loop import Result
from hybrid.train.metrics import validated
from hybrid.train.preflight import check, check_feedback, total_steps
from hybrid.train.pretrain import Pretraining, pretrain
from hybrid.train.state import TrainState, initial_checkpoint
from hybrid.train.tracking import parse_metrics
from hybrid.train.update import Diverged

__all__ = [
    "Diverged",
    "Joint",
    "Pretraining",
    "Result",
    "TrainState",
    "check",
    "check_feedback",
    "estimate",
    "initial_checkpoint",
    "joint",
    "parse_metrics",
    "pretrain",
    "total_steps",
    "validated",
]
