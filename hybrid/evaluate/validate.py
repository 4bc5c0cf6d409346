"""Validate a checkpoint on held-out training tasks, never on an evaluation set."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from hybrid.arc import Grid, Rate, score, string_to_grid
from hybrid.checkpoint import read
from hybrid.config import Config
from hybrid.dataset import Dataset
from hybrid.evaluate.hybrid_predictor import HybridPredictor
from hybrid.evaluate.questions import select_questions
from hybrid.evaluate.records import Prediction
from hybrid.evaluate.trm_predictor import TRMPredictor
from hybrid.llm import Reader


@dataclass(frozen=True, kw_only=True)
class Validation:
    """The score of a checkpoint on held-out tasks, for choosing hyperparameters."""

    right: int
    """Test outputs of held-out tasks that one of two guesses matches exactly."""
    evaluated: int
    cells: float
    """Mean over test outputs of the share of correct cells in the better of the two guesses."""

    @property
    def objective(self) -> float:
        """The value to maximise, 0..1: ordered by `right`, ties broken by `cells`."""
        return (self.right + self.cells) / (self.evaluated + 1)

    @property
    def rate(self) -> Rate:
        """The share of correct test outputs with its interval."""
        return Rate(numerator=self.right, denominator=self.evaluated)

    def metrics(self) -> dict[str, float]:
        """Return the entries for metrics.jsonl."""
        names = ("right", "evaluated", "cells", "objective")
        return {f"validation/{name}": getattr(self, name) for name in names}


def validate(
    config: Config, checkpoint: Path, device: torch.device, reader: Reader | None = None
) -> Validation:
    """Return the score of a checkpoint on the held-out tasks of the dataset.

    Attempts see no answer: `feedback.source=oracle` is replaced by `none`.
    `reader`: the language model of the checkpoint, if it is loaded already.
    """
    if config.feedback.source == "oracle":
        config = replace(config, feedback=replace(config.feedback, source="none"))
    config = replace(config, evaluation=replace(config.evaluation, baseline=False, limit=None))
    dataset = Dataset.open(config.data_folder)
    assert dataset.meta["config"]["hold_out_tasks"], "the dataset has no held-out tasks"
    opened = read(checkpoint)
    predictor: TRMPredictor | HybridPredictor
    if opened.state["kind"] == "hybrid":
        predictor = HybridPredictor(opened, config, device, reader)
    else:
        compiled = config.cluster.compiles
        predictor = TRMPredictor(opened, config.evaluation, device, compiled=compiled)
    questions = select_questions(config, opened, dataset)
    predictions = {question.task.id: predictor.predict(question) for question in questions}
    # Answers are read only after all predictions are made.
    answers = Dataset.open(config.data_folder, answers=True)
    tasks = [answers.tasks[task] for task in dataset.evaluated]
    ranked = {task: _two_guesses(prediction) for task, prediction in predictions.items()}
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
    """Return the share (0..1) of cells that are equal, of the cells that either grid has."""
    height, width = np.minimum(grid.shape, answer.shape)
    equal = grid[:height, :width] == answer[:height, :width]
    return int(equal.sum()) / int(grid.size + answer.size - equal.size)


def _two_guesses(prediction: Prediction) -> list[list[Grid]]:
    return [
        [string_to_grid("\n".join(c["grid"])) for c in test["candidates"][:2]]
        for test in prediction["tests"]
    ]
