"""Solving tasks from a checkpoint, counting votes, scoring, and the report."""

from hybrid.evaluate.merge import describe
from hybrid.evaluate.report import write_report
from hybrid.evaluate.run import Job, Outcome, evaluate, local_solve_all
from hybrid.evaluate.solve import Question, Solver, exact_accuracy, predict

__all__ = [
    "Job",
    "Outcome",
    "Question",
    "Solver",
    "describe",
    "evaluate",
    "exact_accuracy",
    "local_solve_all",
    "predict",
    "write_report",
]
