"""Grids as text, and cell-by-cell comparison."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hybrid.arc.task import Grid, parse_grid
from hybrid.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Differences between a predicted grid and the answer.

    `wrong`: (row, column, predicted colour, correct colour) of each wrong cell, row by row.
    For grids of different shape, `wrong` is empty and `accuracy` is 0.
    """

    same_shape: bool
    wrong: tuple[tuple[int, int, int, int], ...]
    accuracy: float

    @property
    def right(self) -> bool:
        """Whether the grids are equal."""
        return self.same_shape and not self.wrong


def grid_to_string(grid: Grid) -> str:
    """Format one line of digits per row without separators: at most one LLaMA token per cell."""
    return "\n".join("".join(map(str, row)) for row in grid.tolist())


def string_to_grid(text: str) -> Grid:
    """Parse a grid from rows of digits, ignoring whitespace around rows and between digits.

    Raise UserError if the text is not a rectangle of digits with sides 1..30.
    """
    rows = ["".join(line.split()) for line in text.strip().splitlines()]
    for number, row in enumerate(rows):
        if not (row.isascii() and row.isdecimal()):
            raise UserError(f"grid text: line {number} is not a row of digits: {row[:40]!r}")
    return parse_grid([[int(digit) for digit in row] for row in rows], "grid text")


def compare_grids(predicted: Grid, answer: Grid) -> Comparison:
    """Return the wrong cells of a prediction and the share of correct ones (0..1)."""
    if predicted.shape != answer.shape:
        return Comparison(same_shape=False, wrong=(), accuracy=0.0)
    cells = np.argwhere(predicted != answer).tolist()
    wrong = tuple((r, c, int(predicted[r, c]), int(answer[r, c])) for r, c in cells)
    return Comparison(same_shape=True, wrong=wrong, accuracy=1 - len(wrong) / max(answer.size, 1))
