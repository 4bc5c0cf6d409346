"""Refills halted slots with their next training row."""

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
    """Serve rows by slot from an iterator of rounds; a round has one row per slot.

    Slots advance at different speeds. The loader holds the rounds between the slowest and the
    fastest slot, as uint8.
    """

    def __init__(
        self, rounds: Iterator[Rows], first: int, rows_consumed: Tensor, sides: Tensor
    ) -> None:
        """Start at round `first`.

        `rows_consumed` [slots] int64: rows each slot has taken, advanced in place.
        `sides` [slots]: canvas side of the rows in the carry.
        """
        self.rounds = rounds
        self.sides = sides.to("cpu", copy=True)
        """On the CPU, where a step splits its rows by side."""
        self.first = first
        """Number of the oldest round held."""
        self.rows_consumed = rows_consumed
        self.held: deque[Rows] = deque()
        self.waited = 0.0
        """Seconds spent in the iterator of rounds."""

    def refill(self, carry: Carry, halted: Tensor) -> dict[str, Tensor]:
        """Return a batch: new rows for slots in `halted` [slots] bool, the carry's for the others.

        `halted` and the batch's `side` are on the CPU, all other tensors on the carry's device.
        """
        slots = halted.nonzero().squeeze(1)
        batch = carry.current
        if len(slots):
            new = self._take(slots.tolist())
            self.sides = self.sides.index_copy(0, slots, new.pop("side"))
            device = carry.halted.device
            index = to_device(slots, device)
            batch = {
                name: value.index_copy(0, index, to_device(new[name], device))
                for name, value in batch.items()
                if name != "side"
            }
        return {**batch, "side": self.sides}

    def _take(self, slots: list[int]) -> dict[str, Tensor]:
        rows = []
        for slot in slots:
            number = int(self.rows_consumed[slot]) - self.first
            while number >= len(self.held):
                started = time.perf_counter()
                self.held.append(next(self.rounds))
                self.waited += time.perf_counter() - started
            rows.append({name: values[slot] for name, values in self.held[number].items()})
            self.rows_consumed[slot] += 1
        oldest = int(self.rows_consumed.min())
        while self.first < oldest and self.held:
            self.held.popleft()
            self.first += 1
        return _to_torch(rows)


def _to_torch(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Stack rows to int32 tensors, with PAD labels as IGNORE."""
    batch = {
        name: torch.from_numpy(np.stack([row[name] for row in rows]).astype(np.int32))
        for name in rows[0]
    }
    labels = batch["labels"]
    assert (labels != PAD).any(-1).all(), "a training row without labels"
    return {**batch, "labels": labels.masked_fill(labels == PAD, IGNORE)}
