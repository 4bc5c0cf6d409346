"""Predict test outputs from a checkpoint, tally votes, score, and write the report."""

from hybrid.evaluate.hybrid_predictor import HybridPredictor, run_attempts
from hybrid.evaluate.questions import Question
from hybrid.evaluate.records import Prediction
from hybrid.evaluate.report import write_report
from hybrid.evaluate.results import describe
from hybrid.evaluate.run import Job, Outcome, evaluate, open_predictor, predict_locally
from hybrid.evaluate.trm_predictor import TRMPredictor, exact_match, predict_rows, predict_tokens
from hybrid.evaluate.validate import Validation, validate

__all__ = [
    "HybridPredictor",
    "Job",
    "Outcome",
    "Prediction",
    "Question",
    "TRMPredictor",
    "Validation",
    "describe",
    "evaluate",
    "exact_match",
    "open_predictor",
    "predict_locally",
    "predict_rows",
    "predict_tokens",
    "run_attempts",
    "validate",
    "write_report",
]
