"""Stablemax cross-entropy (arXiv 2501.04697) and the loss of one ACT step (2510.04871)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100
"""Label of positions without loss."""


def log_stablemax(logits: Tensor) -> Tensor:
    """Return log(s(x) / sum s(x)) over the last axis: s(x) = x + 1 if x >= 0, else 1 / (1 - x).

    log s(x) is log1p(x) or -log1p(-x). Both branches are clamped, so that the unused one has no NaN
    gradient; the shorter sign(x) log1p(|x|) has no gradient at x = 0, where it must be 1.
    """
    above, below = logits.clamp_min(0), logits.clamp_max(0)
    log_s = torch.where(logits >= 0, torch.log1p(above), -torch.log1p(-below))
    return log_s - torch.logsumexp(log_s, dim=-1, keepdim=True)


def stablemax_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the loss [...], float64, 0 at IGNORE, of logits [..., V] and labels [...]."""
    log_p = log_stablemax(logits.double())
    labels = labels.long()
    scored = labels != IGNORE
    picked = log_p.gather(-1, labels.where(scored, 0).unsqueeze(-1)).squeeze(-1)
    return torch.where(scored, -picked, 0.0)


def act_loss(
    logits: Tensor, q_halt: Tensor, labels: Tensor, steps: Tensor, halted: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss *summed* over rows and sums for metrics; the caller divides by row counts.

    Arguments are logits [B, L, V], q_halt [B], labels [B, L], steps [B] and halted [B]. A row's
    loss is the mean over its labelled positions plus half the binary cross-entropy of its halt
    logit, whose target is an exactly right prediction. `count`, accuracies and `steps` cover the
    rows that halted in this step; both losses cover all rows. A row without labels counts as right
    in the halting loss, as in the published code; the training stream has no such rows.
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
