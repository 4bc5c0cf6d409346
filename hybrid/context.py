"""The seam between a loop and whatever runs it: one process, several, or a Ray cluster.

A loop sees a `RunContext` and nothing else. Slots of the global batch belong to workers in blocks:
worker r of W computes slots r * B // W to (r + 1) * B // W.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from enum import IntEnum
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from hybrid.dataset import Stream
from hybrid.dataset.stream import Rows
from hybrid.errors import UserError

T = TypeVar("T")


class Signal(IntEnum):
    """What a run is asked for from outside, between two steps."""

    NONE = 0
    SAVE = 1
    """A checkpoint now: this worker will not live long."""
    STOP = 2
    """A checkpoint now, and the end."""


class RunContext(Protocol):
    """What a training loop may ask of its surroundings."""

    rank: int
    world_size: int
    device: torch.device

    def rounds(self, stream: Stream, slots: range, total_slots: int, first: int) -> Iterator[Rows]:
        """Rounds `first`, `first` + 1, ... of this worker's slots, [len(slots), ...] each."""
        ...

    def sum_(self, tensor: Tensor) -> Tensor:
        """Add up over all workers, in place; every worker must call it."""
        ...

    def gather(self, tensor: Tensor, total: int) -> Tensor:
        """[total, ...]: all workers' rows in rank order, shared out as `worker_slots` does."""
        ...

    def gather_objects(self, value: T) -> list[T]:
        """Return every worker's picklable `value` in rank order; every worker must call it."""
        ...

    def signal(self) -> Signal:
        """What this worker's surroundings ask for; workers may differ."""
        ...

    def agree(self, signal: Signal) -> Signal:
        """The most that any worker was asked for; every worker must call it."""
        ...

    def gauge(self, metrics: Mapping[str, float]) -> None:
        """Show numbers to whoever watches the cluster."""
        ...

    def report(self, metrics: Mapping[str, Any], checkpoint: Path) -> None:
        """Tell whoever runs the loop of a checkpoint that stands; every worker must call it."""
        ...


class LocalContext:
    """One process, no cluster: rows are made between steps."""

    rank = 0
    world_size = 1

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def rounds(self, stream: Stream, slots: range, total_slots: int, first: int) -> Iterator[Rows]:
        """Made in this process."""
        while True:
            yield stream.rounds(first, 1, slots, total_slots)
            first += 1

    def sum_(self, tensor: Tensor) -> Tensor:
        """The tensor itself."""
        return tensor

    def gather(self, tensor: Tensor, total: int) -> Tensor:
        """The tensor itself."""
        return tensor

    def gather_objects(self, value: T) -> list[T]:
        """Return a list of the value."""
        return [value]

    def signal(self) -> Signal:
        """Nothing."""
        return Signal.NONE

    def agree(self, signal: Signal) -> Signal:
        """The signal itself."""
        return signal

    def gauge(self, metrics: Mapping[str, float]) -> None:
        """Nobody watches."""

    def report(self, metrics: Mapping[str, Any], checkpoint: Path) -> None:
        """Nobody to tell."""


class ProcessGroupContext(LocalContext):
    """Several processes joined by torch.distributed, which the caller has set up."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()

    def sum_(self, tensor: Tensor) -> Tensor:
        """All-reduce."""
        dist.all_reduce(tensor)
        return tensor

    def gather(self, tensor: Tensor, total: int) -> Tensor:
        """A sum of what is zero outside a worker's own rows: their numbers may differ."""
        mine = worker_slots(total, self.rank, self.world_size)
        joined = tensor.new_zeros(total, *tensor.shape[1:])
        joined[mine.start : mine.stop] = tensor
        return self.sum_(joined)

    def gather_objects(self, value: T) -> list[T]:
        """Return all workers' values; NCCL sends them from the current CUDA device."""
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, value)
        return gathered

    def agree(self, signal: Signal) -> Signal:
        """Return the largest of all workers' signals."""
        if self.world_size == 1:
            return signal  # reading it back from a GPU would wait for the step
        asked = torch.tensor([signal], dtype=torch.int32, device=self.device)
        dist.all_reduce(asked, dist.ReduceOp.MAX)
        return Signal(int(asked))


def worker_slots(batch_size: int, rank: int, world_size: int) -> range:
    """The slots of one worker, as many as others have or one less; UserError if it has none."""
    if batch_size < world_size:
        raise UserError(
            f"training.batch_size={batch_size} leaves some of {world_size} workers without a row"
        )
    return range(rank * batch_size // world_size, (rank + 1) * batch_size // world_size)
