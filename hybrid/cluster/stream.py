"""Training rows from Ray Data tasks: block numbers -> rows of augmented tasks -> batches."""

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
"""Rows per Ray Data task."""
BLOCKS_PER_PIPELINE = 32
"""Blocks per pipeline: a worker waits for one pipeline at the start and holds two at a time."""


def quiet() -> None:
    """Turn off Ray Data's progress bars and log lines for every pipeline."""
    DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)


def ray_rounds(stream: Stream, slots: range, total_slots: int, first: int) -> Iterator[Rows]:
    """Yield rounds `first`, `first` + 1, ... of `slots`, made by Ray Data tasks in the cluster.

    A task needs only a block number and the dataset's folder, because rows are a function of their
    position. Each pipeline is materialized while the rows of the previous one are consumed: a
    streaming pipeline would keep Ray Data's executor spinning in the worker while it waits, which
    cost two workers on two cores half of their time.
    """
    folder = storage.uri(stream.dataset.folder)
    per_block = max(1, ROWS_PER_BLOCK // len(slots))
    context = DataContext.get_current()
    quiet()
    # Blocks must arrive in order.
    context.execution_options.preserve_order = True
    recipe = stream.dataset.fingerprint, stream.seed, stream.variants

    def make(block: dict[str, np.ndarray]) -> Rows:
        (number,) = block["id"].tolist()
        return _stream(folder, *recipe).rounds(number, per_block, slots, total_slots)

    def pipeline(first: int) -> MaterializedDataset:
        last = first + BLOCKS_PER_PIPELINE * per_block
        numbers = [{"id": number} for number in range(first, last, per_block)]
        blocks = ray.data.from_items(numbers, override_num_blocks=len(numbers))
        return blocks.map_batches(make, batch_size=None, batch_format="numpy").materialize()

    with ThreadPoolExecutor(1) as executor:
        upcoming = executor.submit(pipeline, first)
        while True:
            dataset = upcoming.result()
            first += BLOCKS_PER_PIPELINE * per_block
            upcoming = executor.submit(pipeline, first)
            yield from dataset.iter_batches(batch_size=len(slots), batch_format="numpy")


@lru_cache(maxsize=2)
def _stream(folder: str, fingerprint: str, seed: int, variants: int | None = None) -> Stream:
    """Open the dataset once per process; raise UserError if the run started with another one."""
    dataset = Dataset.open(storage.folder(folder))
    if dataset.fingerprint != fingerprint:
        raise UserError(f"{folder}: another dataset was prepared here while a run was reading it")
    return Stream(dataset, seed, variants)
