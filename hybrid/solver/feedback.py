"""Sources of feedback on an attempt: one class per value of `feedback.source`.

Every source receives the model's `AttemptResult`s; only `Oracle` is constructed with test outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from hybrid.arc import Augmentation, Grid, compare_grids
from hybrid.solver.config import FeedbackConfig

MAX_CELLS = 5
"""Maximum number of cells in a feedback text: a longer list would reveal the answer."""

Cell = tuple[int, int, int]
"""Row, column, colour."""


@dataclass(frozen=True, kw_only=True)
class AttemptResult:
    """Prediction of one attempt at one row, in the row's own orientation and colours."""

    row: int
    """Index in the initial batch."""
    tokens: npt.NDArray[np.uint8]
    """[L], the full canvas."""
    grid: Grid
    confidence: float
    """Probability of the halt head, 0..1."""
    least_confident: tuple[Cell, ...]
    """Least confident cells of the grid, in ascending order of confidence."""


@dataclass(frozen=True, kw_only=True)
class Feedback:
    """Feedback on one attempt at one row."""

    text: str
    """One line for the next attempt's prompt; empty for no feedback."""
    stop: bool


class FeedbackSource(Protocol):
    """Callable that returns feedback on the results of an attempt."""

    def __call__(self, number: int, results: Sequence[AttemptResult]) -> list[Feedback]:
        """Return one feedback per result of attempt `number` (1, 2, ...)."""
        ...


def describe_errors(predicted: Grid, answer: Grid, max_cells: int = MAX_CELLS) -> str:
    """Describe a prediction's errors in one line, with at most min(max_cells, MAX_CELLS) cells."""
    if predicted.size == 0:
        return "no grid"
    comparison = compare_grids(predicted, answer)
    if comparison.right:
        return "right"
    if not comparison.same_shape:
        (h, w), (h2, w2) = predicted.shape, answer.shape
        return f"size {h}x{w} should be {h2}x{w2}"
    cells = comparison.wrong[: min(max_cells, MAX_CELLS)]
    listed = " ".join(f"r{r}c{c}={was} should be {should}" for r, c, was, should in cells)
    return f"{len(comparison.wrong)} wrong: {listed}".removesuffix(": ")


class NoFeedback:
    """Source `none`: empty feedback; never stops a row."""

    def __call__(self, number: int, results: Sequence[AttemptResult]) -> list[Feedback]:
        return [Feedback(text="", stop=False) for _ in results]


class Confidence:
    """Source `confidence`: the halt head's probability and the least confident cells."""

    def __init__(self, config: FeedbackConfig) -> None:
        self.config = config

    def __call__(self, number: int, results: Sequence[AttemptResult]) -> list[Feedback]:
        return [self._feedback(number, result) for result in results]

    def _feedback(self, number: int, result: AttemptResult) -> Feedback:
        least_confident = _cells("least", result.least_confident[: self.config.cells])
        return Feedback(
            text=_line(number, f"{result.confidence:.0%} sure{least_confident}"),
            stop=result.confidence > self.config.threshold,
        )


class Vote:
    """Source `vote`: agreement of a test's variants, compared in the task's own frame."""

    def __init__(
        self, config: FeedbackConfig, tests: Sequence[int], variants: Sequence[Augmentation]
    ) -> None:
        self.config = config
        self.tests = tests
        """Test index of each row."""
        self.variants = variants
        """Augmentation of each row."""
        self.latest: dict[int, Grid] = {}

    def __call__(self, number: int, results: Sequence[AttemptResult]) -> list[Feedback]:
        self.latest |= {one.row: self.variants[one.row].invert(one.grid) for one in results}
        return [self._feedback(number, result) for result in results]

    def _feedback(self, number: int, result: AttemptResult) -> Feedback:
        grid, test = self.latest[result.row], self.tests[result.row]
        votes = [vote for row, vote in self.latest.items() if self.tests[row] == test]
        agree = sum(np.array_equal(grid, vote) for vote in votes)
        share = agree / len(votes)
        text = f"{agree} of {len(votes)} views agree"
        same_shape = [vote for vote in votes if vote.shape == grid.shape]
        if grid.size and share < 1:
            differ = np.mean([grid != vote for vote in same_shape], axis=0)
            # The next attempt sees the row's own frame, so the text must use its coordinates.
            own_frame = self.variants[result.row].transform(differ)
            worst = np.argsort(-own_frame, axis=None, kind="stable")[: self.config.cells]
            cells = [divmod(int(n), own_frame.shape[1]) for n in worst if own_frame.flat[n] > 0]
            text += _cells("differ", [(r, c, int(result.grid[r, c])) for r, c in cells])
        stop = bool(grid.size) and share > self.config.threshold and len(votes) > 1
        return Feedback(text=_line(number, text), stop=stop)


class Demos:
    """Source `demos`: errors of the same attempt on a held-out demonstration."""

    def __init__(
        self, config: FeedbackConfig, partner: Sequence[int], outputs: Mapping[int, Grid]
    ) -> None:
        self.config = config
        self.partner = partner
        """For each row, the row of its held-out demonstration; such a row is its own partner."""
        self.outputs = outputs
        """Expected outputs, by row of a held-out demonstration."""

    def __call__(self, number: int, results: Sequence[AttemptResult]) -> list[Feedback]:
        grids = {result.row: result.grid for result in results}
        feedbacks = []
        for result in results:
            other = self.partner[result.row]
            errors = describe_errors(grids[other], self.outputs[other], self.config.cells)
            text = _line(number, f"on a held-out example {errors}")
            feedbacks.append(Feedback(text=text, stop=errors == "right"))
        return feedbacks


class Oracle:
    """Source `oracle`: errors against the true answer; gives an upper bound, not a score."""

    def __init__(self, config: FeedbackConfig, answers: Sequence[Grid]) -> None:
        self.config = config
        self.answers = answers
        """Answer of each row, in the row's own orientation and colours."""

    def __call__(self, number: int, results: Sequence[AttemptResult]) -> list[Feedback]:
        feedbacks = []
        for result in results:
            errors = describe_errors(result.grid, self.answers[result.row], self.config.cells)
            feedbacks.append(Feedback(text=_line(number, errors), stop=errors == "right"))
        return feedbacks


def _line(number: int, text: str) -> str:
    return f"Try {number}: {text}"


def _cells(label: str, cells: Sequence[Cell]) -> str:
    if not cells:
        return ""
    return f", {label} " + " ".join(f"r{r}c{c}={colour}" for r, c, colour in cells)
