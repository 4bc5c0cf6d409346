"""The Tiny Recursive Model, its loss and optimisers, and conversion of published checkpoints."""

from hybrid.trm import upstream
from hybrid.trm.config import TRMConfig
from hybrid.trm.loss import IGNORE, act_loss, log_stablemax, stablemax_cross_entropy
from hybrid.trm.model import TRM, Batch, Carry, Outputs
from hybrid.trm.optim import AdamAtan2, ExponentialMovingAverage, learning_rate, sign_sgd_

__all__ = [
    "IGNORE",
    "TRM",
    "AdamAtan2",
    "Batch",
    "Carry",
    "ExponentialMovingAverage",
    "Outputs",
    "TRMConfig",
    "act_loss",
    "learning_rate",
    "log_stablemax",
    "sign_sgd_",
    "stablemax_cross_entropy",
    "upstream",
]
