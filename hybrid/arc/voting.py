"""Which grid the variants of a test input agree on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hybrid.arc.task import Grid


@dataclass(frozen=True, kw_only=True, eq=False)
class Candidate:
    """A distinct predicted grid with its votes and their mean confidence (0..1)."""

    grid: Grid
    votes: int
    confidence: float


def halt_confidence(halt_logits: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """The halt head's probability, sigmoid in float64: what a vote weighs in the published rule."""
    logits = np.asarray(halt_logits, np.float64)
    # Never exponentiates a positive number, so no logit overflows.
    small = np.exp(-np.abs(logits))
    return np.where(logits >= 0, 1.0, small) / (1.0 + small)


def vote(grids: Sequence[Grid], confidences: Sequence[float]) -> list[Candidate]:
    """The distinct grids, most votes first, then highest mean confidence, then first to arrive.

    Grids must be in the task's own orientation and colours (`Augmentation.invert`). Unlike in the
    published evaluator a 0 x 0 grid is no vote: it means that there was no answer.
    """
    ballots: dict[tuple[tuple[int, ...], bytes], list[int]] = {}
    for index, (grid, _) in enumerate(zip(grids, confidences, strict=True)):
        if grid.size:
            ballots.setdefault((grid.shape, grid.tobytes()), []).append(index)
    candidates = [
        Candidate(
            grid=grids[indices[0]],
            votes=len(indices),
            confidence=sum(float(confidences[i]) for i in indices) / len(indices),
        )
        for indices in ballots.values()
    ]
    return sorted(candidates, key=lambda c: (-c.votes, -c.confidence))
