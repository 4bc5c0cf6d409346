"""Training rows, in an order that is a pure function of (seed, epoch).

An epoch draws one variant of every task. Its rows are all training pairs of these variants, task
after task, in random order. Rows are numbered across epochs: a row's number is its *position* in
the stream.

A batch has S slots. Slot s takes positions s, S + s, 2 S + s, ...: its k-th row belongs to *round*
k. One number per slot records its progress, independently of the worker that computes the slot,
and no row is skipped if other slots keep theirs for longer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from hybrid.arc import DIHEDRAL, PAD, Augmentation, Pair, Task, tokenize_grid
from hybrid.dataset.store import Dataset

Ints: TypeAlias = npt.NDArray[np.int64]
Rows: TypeAlias = dict[str, npt.NDArray[np.generic]]
"""inputs, labels: uint8 tokens [n, L] (PAD is not scored); puzzle_identifiers: int32 [n]; side:
uint8 [n], the canvas side of each row, which uses the first side * side tokens."""

TOKENS = {"inputs", "labels"}
"""Keys of `Rows` with one token per cell."""
TRANSPOSING = np.array([transform(np.empty((1, 2))).shape == (2, 1) for transform in DIHEDRAL])


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """The order, variants and translations of one epoch's rows, each [R]."""

    variant: Ints
    """Row of each variant in the dataset."""
    pair: Ints
    """Index of the training pair, over all tasks."""
    row: Ints
    """Vertical translation, in cells."""
    column: Ints
    """Horizontal translation, in cells."""


class Stream:
    """The training rows of a dataset, indexed by position."""

    def __init__(self, dataset: Dataset, seed: int, variants: int | None = None) -> None:
        """Use the first `variants` variants of each task, or all."""
        self.dataset = dataset
        self.seed = seed
        self.variants = variants
        pairs = [dataset.training_pairs(task) for task in range(len(dataset.tasks))]
        self.pairs: list[Pair] = [pair for task_pairs in pairs for pair in task_pairs]
        self._task_of_pair = np.repeat(np.arange(len(pairs)), [len(one) for one in pairs])
        shapes = [np.max([grid.shape for grid in pair.grids], axis=0) for pair in self.pairs]
        self._shapes = np.array(shapes, np.int64).reshape(-1, 2)  # [R, (height, width)]
        self._epoch = lru_cache(maxsize=4)(self._draw_epoch)

    def __len__(self) -> int:
        """Return the number of rows per epoch."""
        return len(self.pairs)

    def rows(self, positions: Ints) -> Rows:
        """Return the rows at `positions` [n], augmented, translated and tokenized."""
        epochs, indices = np.divmod(positions, len(self))
        drawn = [
            (epoch.pair[i], epoch.variant[i], epoch.row[i], epoch.column[i])
            for epoch, i in zip(map(self._epoch, epochs.tolist()), indices, strict=True)
        ]
        return self._tokenize(np.array(drawn, np.int64).reshape(-1, 4))

    def problems(self, positions: Ints) -> list[Task]:
        """Return the `Dataset.problem` of each of the rows at `positions`."""
        epochs, indices = np.divmod(positions, len(self))
        problems = []
        for number, index in zip(epochs.tolist(), indices.tolist(), strict=True):
            epoch = self._epoch(number)
            pair = self.pairs[int(epoch.pair[index])]
            problems.append(self.dataset.problem(int(epoch.variant[index]), pair))
        return problems

    def rounds(self, first: int, count: int, slots: range, total_slots: int) -> Rows:
        """Return `count` rounds of `slots`, starting at round `first`: count * len(slots) rows."""
        rounds = np.arange(first, first + count, dtype=np.int64)[:, None]
        return self.rows((rounds * total_slots + np.array(slots, np.int64)).ravel())

    def original_pairs(self, count: int) -> Rows:
        """Return up to `count` evenly spaced training pairs, unaugmented and not translated."""
        chosen = self._evenly(count)
        originals = self.dataset.first_variant[self._task_of_pair[chosen]]
        zeros = np.zeros_like(chosen)
        return self._tokenize(np.stack((chosen, originals, zeros, zeros), axis=1))

    def original_problems(self, count: int) -> list[Task]:
        """Return the `Dataset.problem` of each of `original_pairs(count)`."""
        return [
            self.dataset.problem(
                int(self.dataset.first_variant[self._task_of_pair[pair]]), self.pairs[pair]
            )
            for pair in self._evenly(count)
        ]

    def _tokenize(self, drawn: Ints) -> Rows:
        """Return the token rows of (pair, variant, row, column) [n, 4]."""
        inputs = np.full((len(drawn), self.dataset.canvas**2), PAD, np.uint8)
        labels = np.full_like(inputs, PAD)
        sides = self.dataset.sides[self.dataset.task_of[drawn[:, 1]]]
        for n, (pair, variant, row, column) in enumerate(drawn.tolist()):
            side = int(sides[n])
            inputs[n, : side**2], labels[n, : side**2] = tokenize_pair(
                self.pairs[pair], self.dataset.augmentation(variant), side, (row, column)
            )
        return {
            "inputs": inputs,
            "labels": labels,
            "puzzle_identifiers": (drawn[:, 1] + 1).astype(np.int32),
            "side": sides,
        }

    def _evenly(self, count: int) -> Ints:
        return np.unique(np.linspace(0, len(self) - 1, min(count, len(self))).astype(np.int64))

    def _draw_epoch(self, epoch: int) -> Epoch:
        rng = np.random.default_rng([self.seed, epoch])
        tasks = len(self.dataset.tasks)
        first = self.dataset.first_variant
        last = first[1:] if self.variants is None else first[:-1] + self.variants
        variant_of_task = rng.integers(first[:-1], np.minimum(last, first[1:]))
        # Tasks in random order, and the pairs of each task in random order.
        order = np.lexsort((rng.random(len(self)), rng.permutation(tasks)[self._task_of_pair]))
        task = self._task_of_pair[order]
        variant = variant_of_task[task]

        transposed = TRANSPOSING[self.dataset.dihedral[variant]][:, None]
        shapes = np.where(transposed, self._shapes[order][:, ::-1], self._shapes[order])
        room = self.dataset.sides[task][:, None] - shapes + 1
        offset = (rng.random(shapes.shape) * room).astype(np.int64)
        # The first pair of each variant is not translated.
        offset[np.flatnonzero(np.diff(task, prepend=-1))] = 0
        return Epoch(variant=variant, pair=order, row=offset[:, 0], column=offset[:, 1])


def row_numbers_by_canvas(sides: Sequence[int]) -> dict[int, list[int]]:
    """Return the row numbers of each canvas side, smallest side first."""
    numbers: dict[int, list[int]] = {side: [] for side in sorted(set(sides))}
    for number, side in enumerate(sides):
        numbers[side].append(number)
    return numbers


def split_by_canvas(rows: Mapping[str, Any]) -> list[tuple[Any, dict[str, Any]]]:
    """Split rows [n, ...] by canvas side: (row numbers, rows) of each side.

    Token rows are cut to the canvas. Rows that share one side are not copied.
    """
    parts = []
    for side, numbers in row_numbers_by_canvas(rows["side"].tolist()).items():
        chosen = slice(None) if len(numbers) == len(rows["side"]) else numbers
        part = {name: value[chosen] for name, value in rows.items()}
        for name in TOKENS & part.keys():
            part[name] = part[name][:, : side**2]
        parts.append((chosen, part))
    return parts


def tokenize_pair(
    pair: Pair, augmentation: Augmentation, canvas: int, offset: tuple[int, int]
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Return the tokens of input and output, uint8 [L] each, both at the same offset."""
    assert pair.output is not None
    inputs, labels = (
        tokenize_grid(augmentation.apply(grid), canvas, offset)
        for grid in (pair.input, pair.output)
    )
    # A row without labels counts as correct and would train the halt head to halt.
    assert (labels != PAD).any()
    return inputs, labels
