"""Scores with their denominators: three metrics that ARC results are reported in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import nan, sqrt

import numpy as np

from hybrid.arc.task import Grid, Task
from hybrid.errors import UserError


def wilson(numerator: float, denominator: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's interval of a proportion (Wilson 1927), 95% by default; (0, 1) without data."""
    if denominator == 0:
        return 0.0, 1.0
    share, shrink = numerator / denominator, 1 + z * z / denominator
    centre = share + z * z / (2 * denominator)
    spread = z * sqrt(share * (1 - share) / denominator + (z / (2 * denominator)) ** 2)
    low, high = (centre - spread) / shrink, (centre + spread) / shrink
    # At shares 0 and 1 rounding would leave the share itself outside.
    return max(0.0, min(low, share)), min(1.0, max(high, share))


@dataclass(frozen=True, kw_only=True)
class Rate:
    """A share that keeps its denominator; prints as `3/167 = 1.8% [0.6, 5.1]`."""

    numerator: float
    denominator: int

    @property
    def value(self) -> float:
        """The share, 0..1; NaN if nothing was asked."""
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

    `outputs`: test outputs right (Kaggle). `task_mean`: mean over tasks of the share of their
    outputs right (the published TRM evaluator). `tasks`: tasks with every output right.
    """

    outputs: Rate
    task_mean: Rate
    tasks: Rate


def score(
    tasks: Sequence[Task], ranked: Mapping[str, Sequence[Sequence[Grid]]], k: int = 2
) -> Scores:
    """Whether one of the first `k` grids is right, for every test output of every task asked.

    `ranked[task id][test index]`: grids, best first. What is missing is wrong, never left out: the
    denominators are those of `tasks`. A 0 x 0 grid takes its place and is wrong. A large k gives
    coverage. Raises UserError for a test without an answer and for predictions not asked for.
    """
    assert len({task.id for task in tasks}) == len(tasks), "tasks asked twice"
    for task_id in ranked.keys() - {task.id for task in tasks}:
        raise UserError(f"task {task_id!r}: predicted, but not among the {len(tasks)} tasks asked")
    right = [_right_outputs(task, ranked.get(task.id, ()), k) for task in tasks]
    return Scores(
        outputs=Rate(numerator=sum(map(sum, right)), denominator=sum(map(len, right))),
        task_mean=Rate(
            numerator=sum(sum(task) / len(task) for task in right), denominator=len(right)
        ),
        tasks=Rate(numerator=sum(map(all, right)), denominator=len(right)),
    )


def _right_outputs(task: Task, ranked: Sequence[Sequence[Grid]], k: int) -> list[bool]:
    if len(ranked) > len(task.test):
        raise UserError(
            f"task {task.id!r}: predictions for {len(ranked)} tests, it has {len(task.test)}"
        )
    right = []
    for index, pair in enumerate(task.test):
        if pair.output is None:
            raise UserError(f"task {task.id!r}, test[{index}]: no answer to score against")
        candidates = ranked[index][:k] if index < len(ranked) else ()
        right.append(any(np.array_equal(grid, pair.output) for grid in candidates))
    return right
