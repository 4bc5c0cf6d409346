"""Interface between a training loop and its launcher: one process, several, or a Ray cluster.

A loop uses only its `RunContext`. The B slots of the global batch are split into blocks: worker r
of W computes slots r * B // W to (r + 1) * B // W.
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
    """Kind of request to a training loop from outside, handled after each step."""

    NONE = 0
    SAVE = 1
    """Save a checkpoint now, because a worker may be lost soon."""
    STOP = 2
    """Save a checkpoint now and end the run."""


class RunContext(Protocol):
    """Services that the launcher provides to a training loop."""

    rank: int
    world_size: int
    device: torch.device

    def rounds(self, stream: Stream, slots: range, total_slots: int, first: int) -> Iterator[Rows]:
        """Yield rounds `first`, `first` + 1, ... of this worker's slots, [len(slots), ...] each."""
        ...

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over all workers in place (collective)."""
        ...

    def gather(self, tensor: Tensor, total: int) -> Tensor:
        """Return all workers' rows [total, ...] in the order of `worker_slots` (collective)."""
        ...

    def gather_objects(self, value: T) -> list[T]:
        """Return every worker's picklable `value` in rank order; every worker must call it."""
        ...

    def signal(self) -> Signal:
        """Return the pending request to this worker; workers may differ."""
        ...

    def agree(self, signal: Signal) -> Signal:
        """Return the highest request to any worker (collective)."""
        ...

    def gauge(self, metrics: Mapping[str, float]) -> None:
        """Publish metrics as gauges of the cluster."""
        ...

    def report(self, metrics: Mapping[str, Any], checkpoint: Path) -> None:
        """Report a completed checkpoint to the launcher (collective)."""
        ...


class LocalContext:
    """Context of a single process, which makes rows between steps."""

    rank = 0
    world_size = 1

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def rounds(self, stream: Stream, slots: range, total_slots: int, first: int) -> Iterator[Rows]:
        """Yield rounds made in this process."""
        while True:
            yield stream.rounds(first, 1, slots, total_slots)
            first += 1

    def sum_(self, tensor: Tensor) -> Tensor:
        """Return the tensor."""
        return tensor

    def gather(self, tensor: Tensor, total: int) -> Tensor:
        """Return the tensor."""
        return tensor

    def gather_objects(self, value: T) -> list[T]:
        """Return a list of the value."""
        return [value]

    def signal(self) -> Signal:
        """Return Signal.NONE."""
        return Signal.NONE

    def agree(self, signal: Signal) -> Signal:
        """Return the signal."""
        return signal

    def gauge(self, metrics: Mapping[str, float]) -> None:
        """Ignore the metrics."""

    def report(self, metrics: Mapping[str, Any], checkpoint: Path) -> None:
        """Ignore the checkpoint."""


class ProcessGroupContext(LocalContext):
    """Context of one of several processes; the caller has initialized torch.distributed."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over all processes in place."""
        dist.all_reduce(tensor)
        return tensor

    def gather(self, tensor: Tensor, total: int) -> Tensor:
        """Return all rows by an all-reduce of zero-padded tensors: workers' row counts differ."""
        own = worker_slots(total, self.rank, self.world_size)
        rows = tensor.new_zeros(total, *tensor.shape[1:])
        rows[own.start : own.stop] = tensor
        return self.sum_(rows)

    def gather_objects(self, value: T) -> list[T]:
        """Return all workers' values; NCCL sends them from the current CUDA device."""
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, value)
        return gathered

    def agree(self, signal: Signal) -> Signal:
        """Return the largest of all workers' signals."""
        if self.world_size == 1:
            return signal  # reading the result back from a GPU would wait for the step
        highest = torch.tensor([signal], dtype=torch.int32, device=self.device)
        dist.all_reduce(highest, dist.ReduceOp.MAX)
        return Signal(int(highest))


def worker_slots(batch_size: int, rank: int, world_size: int) -> range:
    """Return the slots of one worker; raise UserError if there are fewer slots than workers."""
    if batch_size < world_size:
        raise UserError(
            f"training.batch_size={batch_size} leaves some of {world_size} workers without a row"
        )
    return range(rank * batch_size // world_size, (rank + 1) * batch_size // world_size)
