"""The stream as a Ray Data pipeline: plan -> augmentation, translation, tokens -> batches."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import numpy as np
import ray.data
from ray.data import DataContext
from ray.data.dataset import MaterializedDataset

from hybrid import storage
from hybrid.dataset import Dataset, Stream
from hybrid.dataset.stream import Rows
from hybrid.errors import UserError

ROWS_PER_BLOCK = 256
"""Rows that a task makes."""
BLOCKS_PER_PIPELINE = 32
"""A worker waits for so many blocks before its first row, and holds twice as many."""


def quiet() -> None:
    """Ray Data reports every pipeline; what a user should know is said elsewhere."""
    DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)


def ray_rounds(stream: Stream, slots: range, total_slots: int, first: int) -> Iterator[Rows]:
    """Rounds `first`, `first` + 1, ... of some slots, made by Ray Data tasks in the cluster.

    What a task needs to know is the number of a block and the dataset's folder: rows are a function
    of their position. A pipeline is made whole, and the next one while its rows are taken. One that
    had to wait for its reader would keep Ray Data's executor busy, in the worker, for as long as it
    lives: that cost two workers on two cores half of their time.
    """
    place = storage.uri(stream.dataset.folder)
    per_block = max(1, ROWS_PER_BLOCK // len(slots))
    context = DataContext.get_current()
    quiet()
    # Blocks must arrive in the order of their numbers.
    context.execution_options.preserve_order = True
    recipe = stream.dataset.fingerprint, stream.seed, stream.variants

    def make(block: dict[str, np.ndarray]) -> Rows:
        (number,) = block["id"].tolist()
        return _stream(place, *recipe).rounds(number, per_block, slots, total_slots)

    def pipeline(first: int) -> MaterializedDataset:
        last = first + BLOCKS_PER_PIPELINE * per_block
        numbers = [{"id": number} for number in range(first, last, per_block)]
        plan = ray.data.from_items(numbers, override_num_blocks=len(numbers))
        return plan.map_batches(make, batch_size=None, batch_format="numpy").materialize()

    with ThreadPoolExecutor(1) as ahead:
        coming = ahead.submit(pipeline, first)
        while True:
            made = coming.result()
            first += BLOCKS_PER_PIPELINE * per_block
            coming = ahead.submit(pipeline, first)
            yield from made.iter_batches(batch_size=len(slots), batch_format="numpy")


@lru_cache(maxsize=2)
def _stream(place: str, fingerprint: str, seed: int, variants: int | None = None) -> Stream:
    """A task's process keeps the dataset it has read; it must be the one the run began with."""
    dataset = Dataset.open(storage.folder(place))
    if dataset.fingerprint != fingerprint:
        raise UserError(f"{place}: another dataset was prepared here while a run was reading it")
    return Stream(dataset, seed, variants)
