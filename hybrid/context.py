"""The seam between a loop and whatever runs it: one process, several, or a Ray cluster.

A loop sees a `RunContext` and nothing else. Slots of the global batch belong to workers in blocks:
worker r of W computes slots r * B / W to (r + 1) * B / W.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from hybrid.dataset import Stream
from hybrid.dataset.stream import Rows
from hybrid.errors import UserError


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

    def gather(self, tensor: Tensor) -> Tensor:
        """All workers' tensors, equal in shape, joined along the first axis in rank order."""
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

    def gather(self, tensor: Tensor) -> Tensor:
        """The tensor itself."""
        return tensor

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

    def gather(self, tensor: Tensor) -> Tensor:
        """All-gather."""
        parts = [torch.empty_like(tensor) for _ in range(self.world_size)]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)


def compute_device(use_gpu: bool) -> torch.device:
    """The GPU of this process or the CPU; UserError if there is no GPU to use."""
    if use_gpu and not torch.cuda.is_available():
        raise UserError("cluster.use_gpu: torch sees no CUDA device here")
    return torch.device("cuda" if use_gpu else "cpu")


def worker_slots(batch_size: int, rank: int, world_size: int) -> range:
    """The slots of one worker; UserError if the batch cannot be dealt out evenly."""
    if batch_size % world_size:
        raise UserError(
            f"training.batch_size={batch_size} cannot be dealt out to {world_size} workers evenly"
        )
    share = batch_size // world_size
    return range(rank * share, (rank + 1) * share)


def share_cores(workers_on_this_machine: int) -> None:
    """Compute with this worker's share of the cores; Ray would leave it one thread."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // max(1, workers_on_this_machine)))
