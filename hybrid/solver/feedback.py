"""Typed feedback: what is said of an attempt, and whether the row stops. One class a source.

Every source receives the same `AttemptResult`, made by the model alone. Only `Oracle` is built with
answers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from hybrid.arc import Augmentation, Grid, compare_grids
from hybrid.solver.config import FeedbackConfig

MOST_CELLS = 5
"""Cells named in a feedback at most: more would be the answer itself."""

Cell = tuple[int, int, int]
"""Row, column, colour."""


@dataclass(frozen=True, kw_only=True)
class AttemptResult:
    """What an attempt made of a row, in the row's own orientation and colours."""

    row: int
    """Number of the row in the batch that the loop began with."""
    tokens: npt.NDArray[np.uint8]
    """[L] the whole canvas."""
    grid: Grid
    confidence: float
    """Probability of the halt head, 0..1."""
    least_confident: tuple[Cell, ...]
    """The least sure cells of the grid, the least sure first."""


@dataclass(frozen=True, kw_only=True)
class Feedback:
    """The feedback on an attempt."""

    text: str
    """One line for the next attempt; empty: nothing is said."""
    stop: bool


class FeedbackSource(Protocol):
    """A source of feedback."""

    def __call__(self, number: int, seen: Sequence[AttemptResult]) -> list[Feedback]:
        """Verdicts on attempt `number` (1, 2, ...) of some rows."""
        ...


def describe_errors(predicted: Grid, answer: Grid, most: int = MOST_CELLS) -> str:
    """What is wrong with a prediction, at most `most` cells of it and never more than five."""
    if predicted.size == 0:
        return "no grid"
    comparison = compare_grids(predicted, answer)
    if comparison.right:
        return "right"
    if not comparison.same_shape:
        (h, w), (h2, w2) = predicted.shape, answer.shape
        return f"size {h}x{w} should be {h2}x{w2}"
    cells = comparison.wrong[: min(most, MOST_CELLS)]
    named = " ".join(f"r{r}c{c}={was} should be {should}" for r, c, was, should in cells)
    return f"{len(comparison.wrong)} wrong: {named}".removesuffix(": ")


class NoFeedback:
    """Source `none`: silence, to the last attempt."""

    def __call__(self, number: int, seen: Sequence[AttemptResult]) -> list[Feedback]:
        return [Feedback(text="", stop=False) for _ in seen]


class Confidence:
    """Source `confidence`: the halt head's probability, the cells it is least sure of."""

    def __init__(self, config: FeedbackConfig) -> None:
        self.config = config

    def __call__(self, number: int, seen: Sequence[AttemptResult]) -> list[Feedback]:
        return [self._judge(number, one) for one in seen]

    def _judge(self, number: int, one: AttemptResult) -> Feedback:
        least_confident = _cells("least", one.least_confident[: self.config.cells])
        return Feedback(
            text=_line(number, f"{one.confidence:.0%} sure{least_confident}"),
            stop=one.confidence > self.config.threshold,
        )


class Vote:
    """Source `vote`: the other views of the same test, each undone into the task's own frame."""

    def __init__(
        self, config: FeedbackConfig, tests: Sequence[int], views: Sequence[Augmentation]
    ) -> None:
        self.config = config
        self.tests = tests
        """Per row the test it asks."""
        self.views = views
        """Per row its augmentation."""
        self.latest: dict[int, Grid] = {}

    def __call__(self, number: int, seen: Sequence[AttemptResult]) -> list[Feedback]:
        self.latest |= {one.row: self.views[one.row].invert(one.grid) for one in seen}
        return [self._judge(number, one) for one in seen]

    def _judge(self, number: int, one: AttemptResult) -> Feedback:
        mine = self.latest[one.row]
        all_views = [g for row, g in self.latest.items() if self.tests[row] == self.tests[one.row]]
        agree = sum(np.array_equal(mine, other) for other in all_views)
        share = agree / len(all_views)
        text = f"{agree} of {len(all_views)} views agree"
        shaped = [other for other in all_views if other.shape == mine.shape]
        if mine.size and share < 1:
            differ = np.mean([mine != other for other in shaped], axis=0)
            # Back into the row's own frame, where its cells are what the text speaks of.
            where = self.views[one.row].turn(differ)
            worst = np.argsort(-where, axis=None, kind="stable")[: self.config.cells]
            places = [divmod(int(n), where.shape[1]) for n in worst if where.flat[n] > 0]
            text += _cells("differ", [(r, c, int(one.grid[r, c])) for r, c in places])
        stop = bool(mine.size) and share > self.config.threshold and len(all_views) > 1
        return Feedback(text=_line(number, text), stop=stop)


class Demos:
    """Source `demos`: how the same attempt did on a demonstration that nobody has seen."""

    def __init__(
        self, config: FeedbackConfig, partner: Sequence[int], outputs: Mapping[int, Grid]
    ) -> None:
        self.config = config
        self.partner = partner
        """Per row the row that asks its held-out demonstration; that one is its own partner."""
        self.outputs = outputs
        """Of the rows that ask held-out demonstrations."""

    def __call__(self, number: int, seen: Sequence[AttemptResult]) -> list[Feedback]:
        grids = {one.row: one.grid for one in seen}
        feedbacks = []
        for one in seen:
            other = self.partner[one.row]
            said = describe_errors(grids[other], self.outputs[other], self.config.cells)
            text = _line(number, f"on a held-out example {said}")
            feedbacks.append(Feedback(text=text, stop=said == "right"))
        return feedbacks


class Oracle:
    """Source `oracle`: the answer. An upper bound, never a result."""

    def __init__(self, config: FeedbackConfig, answers: Sequence[Grid]) -> None:
        self.config = config
        self.answers = answers
        """Per row, in its own orientation and colours."""

    def __call__(self, number: int, seen: Sequence[AttemptResult]) -> list[Feedback]:
        feedbacks = []
        for one in seen:
            said = describe_errors(one.grid, self.answers[one.row], self.config.cells)
            feedbacks.append(Feedback(text=_line(number, said), stop=said == "right"))
        return feedbacks


def _line(number: int, said: str) -> str:
    return f"Try {number}: {said}"


def _cells(word: str, cells: Sequence[Cell]) -> str:
    if not cells:
        return ""
    return f", {word} " + " ".join(f"r{r}c{c}={colour}" for r, c, colour in cells)
