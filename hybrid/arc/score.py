"""Scores with their denominators: the three metrics used to report ARC results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import nan, sqrt

import numpy as np

from hybrid.arc.task import Grid, Task
from hybrid.errors import UserError


def wilson(numerator: float, denominator: int, z: float = 1.96) -> tuple[float, float]:
    """Return the Wilson (1927) interval of a proportion, 95% by default; (0, 1) without data."""
    if denominator == 0:
        return 0.0, 1.0
    share, shrink = numerator / denominator, 1 + z * z / denominator
    centre = share + z * z / (2 * denominator)
    spread = z * sqrt(share * (1 - share) / denominator + (z / (2 * denominator)) ** 2)
    low, high = (centre - spread) / shrink, (centre + spread) / shrink
    # Rounding could exclude the share itself where it is 0 or 1.
    return max(0.0, min(low, share)), min(1.0, max(high, share))


@dataclass(frozen=True, kw_only=True)
class Rate:
    """A proportion with its denominator; prints as `3/167 = 1.8% [0.6, 5.1]`."""

    numerator: float
    denominator: int

    @property
    def value(self) -> float:
        """The proportion, 0..1; NaN if the denominator is 0."""
        return self.numerator / self.denominator if self.denominator else nan

    @property
    def low(self) -> float:
        """Lower end of the 95% Wilson interval."""
        return wilson(self.numerator, self.denominator)[0]

    @property
    def high(self) -> float:
        """Upper end of the 95% Wilson interval."""
        return wilson(self.numerator, self.denominator)[1]

    def __str__(self) -> str:
        numerator = f"{self.numerator:.2f}".removesuffix(".00")
        interval = f"[{100 * self.low:.1f}, {100 * self.high:.1f}]"
        return f"{numerator}/{self.denominator} = {self.value:.1%} {interval}"


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Three metrics of the same predictions.

    `outputs`: correct test outputs (Kaggle). `task_mean`: mean over tasks of the share of their
    outputs that are correct (the published TRM evaluator). `tasks`: tasks with all outputs correct.
    """

    outputs: Rate
    task_mean: Rate
    tasks: Rate


def score(
    tasks: Sequence[Task], ranked: Mapping[str, Sequence[Sequence[Grid]]], k: int = 2
) -> Scores:
    """Score every test output of `tasks`: correct if one of its first `k` predicted grids is.

    `ranked[task id][test index]`: grids, best first. Missing predictions count as wrong: the
    denominators are those of `tasks`. A 0 x 0 grid counts as one of the k and is wrong. A large k
    gives coverage. Raise UserError for a test without an answer and for unexpected predictions.
    """
    assert len({task.id for task in tasks}) == len(tasks), "duplicate task ids"
    for task_id in ranked.keys() - {task.id for task in tasks}:
        raise UserError(f"task {task_id!r}: predicted, but not one of the {len(tasks)} evaluated")
    correct = [_correct_outputs(task, ranked.get(task.id, ()), k) for task in tasks]
    return Scores(
        outputs=Rate(numerator=sum(map(sum, correct)), denominator=sum(map(len, correct))),
        task_mean=Rate(
            numerator=sum(sum(task) / len(task) for task in correct), denominator=len(correct)
        ),
        tasks=Rate(numerator=sum(map(all, correct)), denominator=len(correct)),
    )


def _correct_outputs(task: Task, ranked: Sequence[Sequence[Grid]], k: int) -> list[bool]:
    if len(ranked) > len(task.test):
        raise UserError(
            f"task {task.id!r}: predictions for {len(ranked)} tests, but it has {len(task.test)}"
        )
    correct = []
    for index, pair in enumerate(task.test):
        if pair.output is None:
            raise UserError(f"task {task.id!r}, test[{index}]: no answer to score against")
        candidates = ranked[index][:k] if index < len(ranked) else ()
        correct.append(any(np.array_equal(grid, pair.output) for grid in candidates))
    return correct
