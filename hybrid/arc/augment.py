"""One augmentation of a task: a dihedral transform and a permutation of the colours 1..9."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hybrid.arc.task import Grid, Pair, Task
from hybrid.errors import UserError

DIHEDRAL: tuple[Callable[[npt.NDArray[Any]], npt.NDArray[Any]], ...] = (
    lambda grid: grid,
    lambda grid: np.rot90(grid, 1),
    lambda grid: np.rot90(grid, 2),
    lambda grid: np.rot90(grid, 3),
    np.fliplr,
    np.flipud,
    np.transpose,
    lambda grid: np.fliplr(np.rot90(grid)),
)
"""Transforms t0..t7, numbered as in published variant names; np.rot90 is counter-clockwise."""

INVERSE_DIHEDRAL = (0, 3, 2, 1, 4, 5, 6, 7)
"""Index of the inverse transform: DIHEDRAL[INVERSE_DIHEDRAL[t]] undoes DIHEDRAL[t]."""

IDENTITY = tuple(range(10))
_SEPARATOR = "|||"
_TRANSFORM = re.compile(r"\|\|\|t([0-7])\|\|\|(0[1-9]{9})")


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """The colour permutation and the dihedral transform that make a variant of a task.

    `task`: the task's id. `dihedral`: index into DIHEDRAL, applied after the colours. `colours`:
    the new colour of each colour 0..9; colour 0 stays 0.
    """

    task: str
    dihedral: int = 0
    colours: tuple[int, ...] = IDENTITY

    def __post_init__(self) -> None:
        assert self.dihedral in range(len(DIHEDRAL)), self
        assert tuple(sorted(self.colours)) == IDENTITY and self.colours[0] == 0, self

    @property
    def name(self) -> str:
        """Published variant name `{task}|||t{k}|||{10 digits}`; the bare id for the identity."""
        if self.dihedral == 0 and self.colours == IDENTITY:
            return self.task
        digits = "".join(map(str, self.colours))
        return f"{self.task}{_SEPARATOR}t{self.dihedral}{_SEPARATOR}{digits}"

    @classmethod
    def parse(cls, name: str) -> Augmentation:
        """Return the augmentation with this name; raise UserError if the name is malformed."""
        task, separator, _ = name.partition(_SEPARATOR)
        match = _TRANSFORM.fullmatch(name[len(task) :])
        if task and not separator:
            return cls(task=task)
        if not task or not match or len(set(match[2])) != len(IDENTITY):
            raise UserError(
                f"variant {name!r}: expected a task id or 'id|||tK|||DDDDDDDDDD' with K in 0..7 "
                "and the digits a permutation of 0123456789 that starts with 0"
            )
        return cls(task=task, dihedral=int(match[1]), colours=tuple(map(int, match[2])))

    def apply(self, grid: Grid) -> Grid:
        """Return the augmented grid, of shape (h, w) or (w, h)."""
        recoloured = np.array(self.colours, np.uint8)[grid]
        return np.ascontiguousarray(DIHEDRAL[self.dihedral](recoloured))

    def transform(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Apply the dihedral transform alone, to one value per cell (h, w)."""
        return np.ascontiguousarray(DIHEDRAL[self.dihedral](values))

    def invert(self, grid: Grid) -> Grid:
        """Return the grid that `apply` maps to `grid`; a 0 x 0 prediction stays 0 x 0."""
        oriented = DIHEDRAL[INVERSE_DIHEDRAL[self.dihedral]](grid)
        return np.ascontiguousarray(np.argsort(self.colours).astype(np.uint8)[oriented])

    def apply_task(self, task: Task) -> Task:
        """Return the task with every grid augmented and this augmentation's name as its id."""
        assert task.id == self.task, f"augmentation of {self.task} on task {task.id}"
        return Task(
            id=self.name,
            train=tuple(self._apply_pair(pair) for pair in task.train),
            test=tuple(self._apply_pair(pair) for pair in task.test),
        )

    def _apply_pair(self, pair: Pair) -> Pair:
        output = None if pair.output is None else self.apply(pair.output)
        return Pair(input=self.apply(pair.input), output=output)
