"""Solving tasks from a checkpoint, counting votes, scoring, and the report."""

from hybrid.evaluate.hybrid import HybridAnswerer, play
from hybrid.evaluate.merge import describe
from hybrid.evaluate.report import write_report
from hybrid.evaluate.run import Job, Outcome, evaluate, local_solve_all, open_solver
from hybrid.evaluate.solve import Question, Solver, exact, predict, said_to
from hybrid.evaluate.validate import Validation, validate

__all__ = [
    "HybridAnswerer",
    "Job",
    "Outcome",
    "Question",
    "Solver",
    "Validation",
    "describe",
    "evaluate",
    "exact",
    "local_solve_all",
    "open_solver",
    "play",
    "predict",
    "said_to",
    "validate",
    "write_report",
]
