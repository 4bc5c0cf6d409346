"""What an attempt is told of the one before it, and when a row stops."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hybrid.errors import check_fields

Source = Literal["none", "confidence", "vote", "demos", "oracle"]


@dataclass(frozen=True, kw_only=True)
class FeedbackConfig:
    """The signal of the self-correction loop. Only `oracle` looks at an answer."""

    source: Source = "confidence"
    """none: nothing, no row stops early. confidence: the halt head and its least sure cells. vote:
    where augmented views of the same test disagree. demos: the rule tried on a demonstration that
    was held out (data.hold_out_demos). oracle: the answer itself, an upper bound; whatever it
    touches is marked, and it writes no submission."""
    threshold: float = 0.5
    """A row stops above this: probability of the halt head, share of views that agree."""
    history: int = 1
    """Attempts that the text speaks of, the newest ones; older ones live on in the latent alone."""
    cells: int = 1
    """Cells that the text names of an attempt, five at most; each is about seven tokens."""

    def __post_init__(self) -> None:
        problems = check_fields(self, threshold=(0, 1), history=(0, None), cells=(0, 5))
        if problems:
            raise ValueError("\n".join(problems))
