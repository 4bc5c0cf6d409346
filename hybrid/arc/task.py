"""ARC tasks: grids, pairs of grids, and hashes of their content."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from reprlib import repr as short_repr
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from hybrid.errors import UserError

Grid: TypeAlias = npt.NDArray[np.uint8]
"""Colours 0..9: uint8 of shape (h, w), sides 1..30; a prediction may also be 0 x 0."""

MAX_SIDE = 30
COLOURS = 10


@dataclass(frozen=True, kw_only=True, eq=False)
class Pair:
    """An input grid and, if known, its output grid; both are read-only copies."""

    input: Grid
    output: Grid | None

    def __post_init__(self) -> None:
        object.__setattr__(self, "input", _frozen(self.input))
        if self.output is not None:
            object.__setattr__(self, "output", _frozen(self.output))

    @property
    def grids(self) -> tuple[Grid, ...]:
        """The input and, if known, the output."""
        return (self.input,) if self.output is None else (self.input, self.output)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Pair) and _content(self) == _content(other)

    def __hash__(self) -> int:
        return hash(_content(self))


@dataclass(frozen=True, kw_only=True)
class Task:
    """One ARC task: demonstrations (`train`) and tests, whose outputs may be unknown."""

    id: str
    train: tuple[Pair, ...]
    test: tuple[Pair, ...]

    @property
    def pairs(self) -> tuple[Pair, ...]:
        """Demonstrations, then tests."""
        return self.train + self.test

    @property
    def max_side(self) -> int:
        """Longest side of any grid of the task, in cells."""
        return max(int(side) for pair in self.pairs for grid in pair.grids for side in grid.shape)

    @property
    def content_hash(self) -> str:
        """SHA-256 of the sorted pair hashes: independent of id, order and train/test split.

        Equals `puzzle_hash` of the published dataset builder. That defines no hash for a missing
        output; here such a pair counts by its input alone, so removing answers changes the hash.
        """
        joined = "|".join(sorted(pair_hash(pair) for pair in self.pairs))
        return hashlib.sha256(joined.encode()).hexdigest()

    def without_answers(self) -> Task:
        """Return the task with every test output set to None, the only form a solver may see."""
        return replace(self, test=tuple(replace(pair, output=None) for pair in self.test))


def grid_hash(grid: Grid) -> str:
    """Return the SHA-256 of the grid's shape and its cells row by row; 0 x 0 is allowed."""
    return hashlib.sha256(bytes(grid.shape) + grid.tobytes()).hexdigest()


def pair_hash(pair: Pair) -> str:
    """Return `{input hash}|{output hash}`; the second part is empty if the output is unknown."""
    return f"{grid_hash(pair.input)}|{'' if pair.output is None else grid_hash(pair.output)}"


def parse_grid(value: object, where: str) -> Grid:
    """Convert nested lists of ints, as parsed from JSON, to a read-only grid.

    Raise UserError that starts with `where` and names the row if the grid is ragged or empty, has
    a side over 30, or has a cell that is not an int in 0..9 (bools are rejected).
    """
    for problem in _grid_problems(value):
        raise UserError(f"{where}: {problem}")
    return _frozen(np.array(value, np.uint8))


def _grid_problems(value: object) -> Iterator[str]:
    if not isinstance(value, list) or not value:
        yield f"a grid must be a non-empty list of rows, got {short_repr(value)}"
        return
    if len(value) > MAX_SIDE:
        yield f"the grid has {len(value)} rows, at most {MAX_SIDE} are allowed"
    for r, row in enumerate(value):
        if not isinstance(row, list) or not row:
            yield f"row {r} must be a non-empty list of colours, got {short_repr(row)}"
            return
        if len(row) > MAX_SIDE:
            yield f"row {r} has {len(row)} cells, at most {MAX_SIDE} are allowed"
        if len(row) != len(value[0]):
            yield f"ragged grid: row {r} has {len(row)} cells, row 0 has {len(value[0])}"
        for c, cell in enumerate(row):
            # type() instead of isinstance(), because isinstance(True, int) holds.
            if type(cell) is not int or not 0 <= cell < COLOURS:
                yield f"row {r}, column {c}: expected an int in 0..9, got {short_repr(cell)}"


def _frozen(grid: Grid) -> Grid:
    assert grid.dtype == np.uint8 and grid.ndim == 2, f"not a grid: {grid.dtype} {grid.shape}"
    copy = np.array(grid, order="C")
    copy.setflags(write=False)
    return copy


def _content(pair: Pair) -> tuple[tuple[tuple[int, ...], bytes], ...]:
    return tuple((grid.shape, grid.tobytes()) for grid in pair.grids)
