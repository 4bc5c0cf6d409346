"""Stablemax cross-entropy (arXiv 2501.04697) and the loss of one ACT step (2510.04871)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100
"""Label of a position that is not scored."""


def log_stablemax(logits: Tensor) -> Tensor:
    """log(s(x) / sum s(x)) over the last axis, s(x) = x + 1 for x >= 0 and 1 / (1 - x) below.

    In logarithms log1p(x) and -log1p(-x). Both branches are clamped, so that the one not taken
    holds no NaN; the shorter sign(x) log1p(|x|) would have no gradient at x = 0, where it is 1.
    """
    above, below = logits.clamp_min(0), logits.clamp_max(0)
    log_s = torch.where(logits >= 0, torch.log1p(above), -torch.log1p(-below))
    return log_s - torch.logsumexp(log_s, dim=-1, keepdim=True)


def stablemax_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Per position, float64, 0 where the label is IGNORE; logits [..., V], labels [...]."""
    log_p = log_stablemax(logits.double())
    labels = labels.long()
    scored = labels != IGNORE
    picked = log_p.gather(-1, labels.where(scored, 0).unsqueeze(-1)).squeeze(-1)
    return torch.where(scored, -picked, 0.0)


def act_loss(
    logits: Tensor, q_halt: Tensor, labels: Tensor, steps: Tensor, halted: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss *summed* over rows, and sums for metrics; divide both by what the caller counts.

    Per row the mean over its labelled positions plus half the binary cross-entropy of the halt
    logit against "this row is exactly right". `count` and the metrics that go with it cover the
    rows that halted in this step, the two losses all rows. A row without labels counts as right in
    the halting loss, as published; the training stream never hands one out.
    """
    scored = labels != IGNORE
    counts = scored.sum(-1)
    per_row = stablemax_cross_entropy(logits, labels).sum(-1) / counts.clamp_min(1)
    with torch.no_grad():
        hits = (scored & (logits.argmax(-1) == labels)).sum(-1)
        right = hits == counts
        ended = halted & (counts > 0)
    lm_loss = per_row.sum()
    q_halt_loss = F.binary_cross_entropy_with_logits(q_halt, right.to(q_halt), reduction="sum")
    sums = {
        "count": ended.sum(),
        "accuracy": ((hits / counts.clamp_min(1)) * ended).sum(),
        "exact_accuracy": (right & ended).sum(),
        "q_halt_accuracy": (((q_halt >= 0) == right) & ended).sum(),
        "steps": (steps * ended).sum(),
        "lm_loss": lm_loss.detach(),
        "q_halt_loss": q_halt_loss.detach(),
    }
    return lm_loss + 0.5 * q_halt_loss, sums
