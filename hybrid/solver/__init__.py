"""The hybrid model, its self-correction loop, and the feedback between attempts."""

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
from hybrid.solver.model import Attempt, AttemptState, HybridModel, attempts, extract_grid

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
    "extract_grid",
    "format_problem_text",
]
