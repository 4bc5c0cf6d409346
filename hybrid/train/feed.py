"""Hands each halted slot its next row, and nobody else one."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import torch
from torch import Tensor

from hybrid.arc import PAD
from hybrid.dataset.stream import Rows
from hybrid.trm import IGNORE, Carry


class Feed:
    """Rows by slot from an iterator of rounds.

    A slot that keeps its row falls behind the others: the rounds between the slowest and the fastest
    slot are held here, as uint8.
    """

    def __init__(self, rounds: Iterator[Rows], first: int, taken: Tensor) -> None:
        self.rounds = rounds
        self.first = first
        """Number of the first round held."""
        self.taken = taken
        """[slots] int64, advanced in place."""
        self.held: deque[Rows] = deque()

    def refill(self, carry: Carry) -> dict[str, Tensor]:
        """A batch on the carry's device: new rows for the halted slots, the others' own ones."""
        halted = carry.halted.nonzero().squeeze(1).tolist()
        batch = carry.current
        if halted:
            new = self._take(halted)
            where = carry.halted.nonzero().squeeze(1)
            batch = {
                name: value.index_copy(0, where, new[name].to(value))
                for name, value in carry.current.items()
            }
        return batch

    def _take(self, slots: list[int]) -> dict[str, Tensor]:
        picked = []
        for slot in slots:
            number = int(self.taken[slot]) - self.first
            while number >= len(self.held):
                self.held.append(next(self.rounds))
            picked.append({name: rows[slot] for name, rows in self.held[number].items()})
            self.taken[slot] += 1
        oldest = int(self.taken.min())
        while self.first < oldest and self.held:
            self.held.popleft()
            self.first += 1
        return _to_torch(picked)


def _to_torch(picked: list[dict[str, object]]) -> dict[str, Tensor]:
    """Tokens int32; labels with PAD as IGNORE, each row with at least one label."""
    columns = {name: [torch.as_tensor(row[name]) for row in picked] for name in picked[0]}
    rows = {name: torch.stack(column) for name, column in columns.items()}
    labels = rows["labels"].int()
    assert (labels != PAD).any(-1).all(), "a training row without labels"
    return {
        "inputs": rows["inputs"].int(),
        "labels": labels.masked_fill(labels == PAD, IGNORE),
        "puzzle_identifiers": rows["puzzle_identifiers"].int(),
    }
