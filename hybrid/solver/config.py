"""Settings of the feedback between attempts and of early stopping."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hybrid.errors import check_fields

Source = Literal["none", "confidence", "vote", "demos", "oracle"]


@dataclass(frozen=True, kw_only=True)
class FeedbackConfig:
    """Feedback signal of the self-correction loop; only `oracle` reads the test output."""

    source: Source = "confidence"
    """none: no feedback, no early stop. confidence: the halt head's probability and the least
    confident cells. vote: disagreement between variants of the same test. demos: the error on a
    held-out demonstration (data.hold_out_demos). oracle: the true answer, for an upper bound; its
    results are marked and no submission is written."""
    threshold: float = 0.5
    """Stop a row above this halt probability or share of agreeing variants."""
    history: int = 1
    """Latest attempts in the feedback text; older ones reach the model only through the latent."""
    cells: int = 1
    """Cells listed per attempt, at most five; each costs about seven tokens."""

    def __post_init__(self) -> None:
        problems = check_fields(self, threshold=(0, 1), history=(0, None), cells=(0, 5))
        if problems:
            raise ValueError("\n".join(problems))
