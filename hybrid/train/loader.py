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
from hybrid.device import to_device
from hybrid.trm import IGNORE, Carry


class SlotLoader:
    """Rows by slot from an iterator of rounds.

    A slot that keeps its row falls behind the others: the rounds between the slowest and the
    fastest slot are held here, as uint8.
    """

    def __init__(
        self, rounds: Iterator[Rows], first: int, rows_consumed: Tensor, sides: Tensor
    ) -> None:
        """`sides` [slots]: canvas side of the rows that the slots hold, from the carry."""
        self.rounds = rounds
        self.sides = sides.to("cpu", copy=True)
        """Kept on the host, where a step splits its rows by side."""
        self.first = first
        """Number of the first round held."""
        self.rows_consumed = rows_consumed
        """[slots] int64, advanced in place."""
        self.held: deque[Rows] = deque()
        self.waited = 0.0
        """Seconds spent on getting rounds: on making them, or on waiting for who makes them."""

    def refill(self, carry: Carry, halted: Tensor) -> dict[str, Tensor]:
        """Return a batch: new rows for the slots in `halted` [slots], the others' own rows.

        `halted` is on the host, tensors are on the carry's device but for `side`.
        """
        slots = halted.nonzero().squeeze(1)
        batch = carry.current
        if len(slots):
            new = self._take(slots.tolist())
            self.sides = self.sides.index_copy(0, slots, new.pop("side"))
            device = carry.halted.device
            where = to_device(slots, device)
            batch = {
                name: value.index_copy(0, where, to_device(new[name], device))
                for name, value in batch.items()
                if name != "side"
            }
        return {**batch, "side": self.sides}

    def _take(self, slots: list[int]) -> dict[str, Tensor]:
        picked = []
        for slot in slots:
            number = int(self.rows_consumed[slot]) - self.first
            while number >= len(self.held):
                started = time.perf_counter()
                self.held.append(next(self.rounds))
                self.waited += time.perf_counter() - started
            picked.append({name: rows[slot] for name, rows in self.held[number].items()})
            self.rows_consumed[slot] += 1
        oldest = int(self.rows_consumed.min())
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
