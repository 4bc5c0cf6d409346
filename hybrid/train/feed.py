"""Hands each halted slot its next row, and nobody else one."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hybrid.arc import PAD
from hybrid.dataset.stream import Rows
from hybrid.trm import IGNORE, Carry


class Feed:
    """Rows by slot from an iterator of rounds.

    A slot that keeps its row falls behind the others: the rounds between the slowest and the
    fastest slot are held here, as uint8.
    """

    def __init__(self, rounds: Iterator[Rows], first: int, taken: Tensor) -> None:
        self.rounds = rounds
        self.first = first
        """Number of the first round held."""
        self.taken = taken
        """[slots] int64, advanced in place."""
        self.held: deque[Rows] = deque()
        self.waited = 0.0
        """Seconds spent on getting rounds: on making them, or on waiting for who makes them."""

    def refill(self, carry: Carry) -> dict[str, Tensor]:
        """A batch on the carry's device: new rows for the halted slots, the others' own ones."""
        halted = carry.halted.nonzero().squeeze(1)
        if not len(halted):
            return carry.current
        new = self._take(halted.tolist())
        return {
            name: value.index_copy(0, halted, new[name].to(value))
            for name, value in carry.current.items()
        }

    def _take(self, slots: list[int]) -> dict[str, Tensor]:
        picked = []
        for slot in slots:
            number = int(self.taken[slot]) - self.first
            while number >= len(self.held):
                started = time.perf_counter()
                self.held.append(next(self.rounds))
                self.waited += time.perf_counter() - started
            picked.append({name: rows[slot] for name, rows in self.held[number].items()})
            self.taken[slot] += 1
        oldest = int(self.taken.min())
        while self.first < oldest and self.held:
            self.held.popleft()
            self.first += 1
        return _to_torch(picked)


def _to_torch(picked: list[dict[str, Any]]) -> dict[str, Tensor]:
    """int32 each; labels with PAD as IGNORE, every row with at least one label."""
    rows = {
        name: torch.from_numpy(np.stack([row[name] for row in picked]).astype(np.int32))
        for name in picked[0]
    }
    labels = rows["labels"]
    assert (labels != PAD).any(-1).all(), "a training row without labels"
    return {**rows, "labels": labels.masked_fill(labels == PAD, IGNORE)}
