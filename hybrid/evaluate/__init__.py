"""Solving tasks from a checkpoint, counting votes, scoring, and the report."""

from hybrid.evaluate.hybrid_predictor import HybridPredictor, run_attempts
from hybrid.evaluate.questions import Question
from hybrid.evaluate.report import write_report
from hybrid.evaluate.results import describe
from hybrid.evaluate.run import Job, Outcome, evaluate, open_predictor, predict_locally
from hybrid.evaluate.trm_predictor import TRMPredictor, exact_match, predict, predict_rows
from hybrid.evaluate.validate import Validation, validate

__all__ = [
    "HybridPredictor",
    "Job",
    "Outcome",
    "Question",
    "TRMPredictor",
    "Validation",
    "describe",
    "evaluate",
    "exact_match",
    "open_predictor",
    "predict",
    "predict_locally",
    "predict_rows",
    "run_attempts",
    "validate",
    "write_report",
]
