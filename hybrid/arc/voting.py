"""Vote over the predictions for the variants of a test input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hybrid.arc.task import Grid


@dataclass(frozen=True, kw_only=True, eq=False)
class Candidate:
    """A distinct predicted grid with its number of votes and their mean confidence (0..1)."""

    grid: Grid
    votes: int
    confidence: float


def halt_confidence(halt_logits: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Return the halt probability (float64 sigmoid), a vote's confidence in the published rule."""
    logits = np.asarray(halt_logits, np.float64)
    # The exponent is never positive, so no logit overflows.
    small = np.exp(-np.abs(logits))
    return np.where(logits >= 0, 1.0, small) / (1.0 + small)


def vote(grids: Sequence[Grid], confidences: Sequence[float]) -> list[Candidate]:
    """Rank the distinct grids by votes, then by mean confidence, then by order of arrival.

    Grids must be in the task's own orientation and colours (`Augmentation.invert`). Unlike in the
    published evaluator, 0 x 0 grids do not vote: they mean that there was no answer.
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
