"""The hybrid solver: one attempt, the loop of attempts, and what is said between them."""

from hybrid.llm.prompt import format_problem_text
from hybrid.solver.config import FeedbackConfig
from hybrid.solver.feedback import (
    Confidence,
    Demos,
    Judge,
    Nothing,
    Oracle,
    Seen,
    Verdict,
    Vote,
    grid_to_feedback,
)
from hybrid.solver.hybrid import Attempt, HybridSolver, Rows, attempts, read_out

__all__ = [
    "Attempt",
    "Confidence",
    "Demos",
    "FeedbackConfig",
    "HybridSolver",
    "Judge",
    "Nothing",
    "Oracle",
    "Rows",
    "Seen",
    "Verdict",
    "Vote",
    "attempts",
    "format_problem_text",
    "grid_to_feedback",
    "read_out",
]
