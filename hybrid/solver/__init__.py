"""The hybrid solver: one attempt, the loop of attempts, and what is said between them."""

from hybrid.llm.prompt import format_problem_text
from hybrid.solver.config import FeedbackConfig
from hybrid.solver.feedback import (
    AttemptResult,
    Confidence,
    Demos,
    Feedback,
    FeedbackSource,
    NoFeedback,
    Oracle,
    Vote,
    describe_errors,
)
from hybrid.solver.model import Attempt, AttemptState, HybridModel, attempts, read_out

__all__ = [
    "Attempt",
    "AttemptResult",
    "AttemptState",
    "Confidence",
    "Demos",
    "Feedback",
    "FeedbackConfig",
    "FeedbackSource",
    "HybridModel",
    "NoFeedback",
    "Oracle",
    "Vote",
    "attempts",
    "describe_errors",
    "format_problem_text",
    "read_out",
]
