"""Conversion between grids and rows of tokens on a square canvas."""

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
    """Return the tokens [canvas * canvas] of a grid whose top-left cell is at `offset`.

    `offset` is (row, column). EOS marks the row below and the column right of the grid, as far as
    the grid extends and if inside the canvas; their corner and all other cells are PAD.
    """
    (top, left), (height, width) = offset, grid.shape
    bottom, right = top + height, left + width
    assert min(offset) >= 0 and max(bottom, right) <= canvas, (
        f"{grid.shape} at {offset} does not fit a canvas of side {canvas}"
    )
    tokens = np.full((canvas, canvas), PAD, np.uint8)
    tokens[top:bottom, left:right] = grid + np.uint8(FIRST_COLOUR)
    tokens[bottom : bottom + 1, left:right] = EOS
    tokens[top:bottom, right : right + 1] = EOS
    return tokens.ravel()


def tokens_to_grid(tokens: npt.NDArray[Any], canvas: int | None = None) -> Grid:
    """Return the largest rectangle of colours at the canvas's top-left corner; 0 x 0 if none.

    `tokens` [canvas * canvas] may have any integer dtype, so labels with -100 decode too; `canvas`
    defaults to the root of the length. Of rectangles of equal area, the one with fewest rows wins.
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
    """Return the number of row and column offsets that keep both grids on the canvas."""
    height, width = np.max([grid.shape for grid in pair.grids], axis=0)
    return canvas - int(height) + 1, canvas - int(width) + 1
