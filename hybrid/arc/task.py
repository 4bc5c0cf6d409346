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
"""Colours 0..9, uint8 of shape (h, w), each side 1..30; a prediction may also be 0 x 0."""

MAX_SIDE = 30
COLOURS = 10


@dataclass(frozen=True, kw_only=True, eq=False)
class Pair:
    """An input grid and, where it is known, the output grid; both are read-only copies."""

    input: Grid
    output: Grid | None

    def __post_init__(self) -> None:
        object.__setattr__(self, "input", _frozen(self.input))
        if self.output is not None:
            object.__setattr__(self, "output", _frozen(self.output))

    @property
    def grids(self) -> tuple[Grid, ...]:
        """The grids that exist: the input and, if known, the output."""
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
        """The longest side of any grid of the task, in cells."""
        return max(int(side) for pair in self.pairs for grid in pair.grids for side in grid.shape)

    @property
    def content_hash(self) -> str:
        """SHA-256 over the pairs' hashes, sorted: id, order and train/test split do not count.

        The published builder's `puzzle_hash`. It has no rule for a missing output; here such a
        pair counts with its input alone, so a task and the same task without answers differ.
        """
        joined = "|".join(sorted(pair_hash(pair) for pair in self.pairs))
        return hashlib.sha256(joined.encode()).hexdigest()

    def without_answers(self) -> Task:
        """The same task with every test output None: all that a solver may see."""
        return replace(self, test=tuple(replace(pair, output=None) for pair in self.test))


def grid_hash(grid: Grid) -> str:
    """SHA-256 of the grid's two sides and its cells row by row; also defined for 0 x 0."""
    return hashlib.sha256(bytes(grid.shape) + grid.tobytes()).hexdigest()


def pair_hash(pair: Pair) -> str:
    """`{input hash}|{output hash}`; the second half is empty if the output is unknown."""
    return f"{grid_hash(pair.input)}|{'' if pair.output is None else grid_hash(pair.output)}"


def parse_grid(value: object, where: str) -> Grid:
    """A read-only grid from nested lists of ints, as JSON gives them.

    Raises UserError, naming `where` and the row: ragged or empty, a side over 30, a cell that is
    not an int (bools are not) in 0..9.
    """
    for problem in _grid_problems(value):
        raise UserError(f"{where}: {problem}")
    return _frozen(np.array(value, np.uint8))


def _grid_problems(value: object) -> Iterator[str]:
    if not isinstance(value, list) or not value:
        yield f"a grid is a non-empty list of rows, got {short_repr(value)}"
        return
    if len(value) > MAX_SIDE:
        yield f"the grid has {len(value)} rows, at most {MAX_SIDE} are allowed"
    for r, row in enumerate(value):
        if not isinstance(row, list) or not row:
            yield f"row {r} is not a non-empty list of colours: {short_repr(row)}"
            return
        if len(row) > MAX_SIDE:
            yield f"row {r} has {len(row)} cells, at most {MAX_SIDE} are allowed"
        if len(row) != len(value[0]):
            yield f"ragged grid: row {r} has {len(row)} cells, row 0 has {len(value[0])}"
        for c, cell in enumerate(row):
            # type() rather than isinstance(): True is an int, but no colour.
            if type(cell) is not int or not 0 <= cell < COLOURS:
                yield f"row {r}, column {c}: a colour is an int in 0..9, got {short_repr(cell)}"


def _frozen(grid: Grid) -> Grid:
    assert grid.dtype == np.uint8 and grid.ndim == 2, f"no grid: {grid.dtype} {grid.shape}"
    copy = np.array(grid, order="C")
    copy.setflags(write=False)
    return copy


def _content(pair: Pair) -> tuple[tuple[tuple[int, ...], bytes], ...]:
    return tuple((grid.shape, grid.tobytes()) for grid in pair.grids)
