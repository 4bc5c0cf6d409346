"""Grids as rows of tokens on a square canvas, and back."""

from __future__ import annotations

from math import isqrt
from typing import Any

import numpy as np
import numpy.typing as npt

from hybrid.arc.task import MAX_SIDE, Grid, Pair

PAD = 0
EOS = 1
FIRST_COLOUR = 2
VOCABULARY = 12


def tokenize_grid(
    grid: Grid, canvas: int = MAX_SIDE, offset: tuple[int, int] = (0, 0)
) -> npt.NDArray[np.uint8]:
    """Tokens (canvas * canvas,) of the grid with its top-left cell at `offset` (row, column).

    EOS marks the row below and the column right of the grid, along the grid's own extent and
    where the canvas still has it; the corner between them and all else is PAD.
    """
    (top, left), (height, width) = offset, grid.shape
    bottom, right = top + height, left + width
    assert min(offset) >= 0 and max(bottom, right) <= canvas, (
        f"{grid.shape} at {offset} leaves a canvas of side {canvas}"
    )
    tokens = np.full((canvas, canvas), PAD, np.uint8)
    tokens[top:bottom, left:right] = grid + np.uint8(FIRST_COLOUR)
    tokens[bottom : bottom + 1, left:right] = EOS
    tokens[top:bottom, right : right + 1] = EOS
    return tokens.ravel()


def tokens_to_grid(tokens: npt.NDArray[Any], canvas: int | None = None) -> Grid:
    """The largest rectangle of colours anchored at the canvas' top-left; (0, 0) if there is none.

    `tokens` (canvas * canvas,) of any integer type, so labels with -100 decode too; `canvas`
    defaults to the root of the length. Of equally large rectangles the one with fewest rows wins.
    """
    side = isqrt(tokens.size) if canvas is None else canvas
    assert side * side == tokens.size, f"{tokens.size} tokens do not fill a canvas of side {side}"
    rows = np.reshape(tokens, (side, side))
    coloured = (rows >= FIRST_COLOUR) & (rows < VOCABULARY)
    leading = np.logical_and.accumulate(coloured, axis=1).sum(axis=1)
    # A rectangle of n rows is as wide as the shortest of the first n leading runs.
    widths = np.minimum.accumulate(leading)
    areas = widths * np.arange(1, side + 1)
    last = int(areas.argmax())
    if areas[last] == 0:
        return np.zeros((0, 0), np.uint8)
    return (rows[: last + 1, : widths[last]] - FIRST_COLOUR).astype(np.uint8)


def offset_range(pair: Pair, canvas: int = MAX_SIDE) -> tuple[int, int]:
    """How many row and column offsets (from 0) keep both grids of the pair on the canvas."""
    height, width = np.max([grid.shape for grid in pair.grids], axis=0)
    return canvas - int(height) + 1, canvas - int(width) + 1
