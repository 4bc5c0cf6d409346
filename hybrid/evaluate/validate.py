"""What a checkpoint is worth, on training tasks that are held out: never on an evaluation set."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hybrid.arc import Grid, Rate, score, string_to_grid
from hybrid.checkpoint import read
from hybrid.config import Config
from hybrid.dataset import Dataset
from hybrid.evaluate.hybrid_predictor import HybridPredictor
from hybrid.evaluate.questions import select_questions
from hybrid.evaluate.trm_predictor import Prediction, TRMPredictor
from hybrid.llm import Reader


@dataclass(frozen=True, kw_only=True)
class Validation:
    """A score by which hyperparameters may be chosen."""

    right: int
    """Test outputs of held-out tasks right within two attempts."""
    evaluated: int
    cells: float
    """Mean over these outputs of the share of cells right, in the better of the two attempts."""

    @property
    def objective(self) -> float:
        """Orders by `right` and, where that is equal, by `cells`; 0..1."""
        return (self.right + self.cells) / (self.evaluated + 1)

    @property
    def rate(self) -> Rate:
        """With its interval."""
        return Rate(numerator=self.right, denominator=self.evaluated)

    def metrics(self) -> dict[str, float]:
        """As metrics.jsonl has it."""
        names = ("right", "evaluated", "cells", "objective")
        return {f"validation/{name}": getattr(self, name) for name in names}


def validate(
    config: Config, checkpoint: Path, device: torch.device, reader: Reader | None = None
) -> Validation:
    """Ask the held-out tasks of the dataset what an evaluation of the checkpoint would ask.

    The attempts see no answer: feedback is the config's, and `none` where that is the oracle.
    `reader`: the language model, where it is open already.
    """
    if config.feedback.source == "oracle":
        config = replace(config, feedback=replace(config.feedback, source="none"))
    config = replace(config, evaluation=replace(config.evaluation, baseline=False, limit=None))
    dataset = Dataset.open(config.data_folder)
    assert dataset.meta["config"]["hold_out_tasks"], "nothing is held out for this"
    whole = read(checkpoint)
    solver: TRMPredictor | HybridPredictor
    if whole.state["kind"] == "hybrid":
        solver = HybridPredictor(whole, config, device, reader)
    else:
        compiled = config.cluster.compiles
        solver = TRMPredictor(whole, config.evaluation, device, compiled=compiled)
    questions = select_questions(config, whole, dataset)
    answered = {question.task.id: solver.solve(question) for question in questions}
    # Here predictions meet answers, and nowhere above.
    answers = Dataset.open(config.data_folder, answers=True)
    tasks = [answers.tasks[task] for task in dataset.evaluated]
    ranked = {task: _two(prediction) for task, prediction in answered.items()}
    rate = score(tasks, ranked).outputs
    shares = [
        max((cell_share(grid, pair.output) for grid in grids), default=0.0)
        for task in tasks
        for pair, grids in zip(task.test, ranked[task.id], strict=True)
        if pair.output is not None
    ]
    return Validation(
        right=int(rate.numerator), evaluated=rate.denominator, cells=float(np.mean(shares))
    )


def cell_share(grid: Grid, answer: Grid) -> float:
    """Cells that are there in both and equal, of the cells that are there in either; 0..1."""
    height, width = np.minimum(grid.shape, answer.shape)
    both = grid[:height, :width] == answer[:height, :width]
    return int(both.sum()) / int(grid.size + answer.size - both.size)


def _two(prediction: Prediction) -> list[list[Any]]:
    return [
        [string_to_grid("\n".join(c["grid"])) for c in test["candidates"][:2]]
        for test in prediction["tests"]
    ]
