"""The order of training rows is a function of (seed, epoch), and each row is what it says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import save_rows
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hybrid.arc import PAD, Pair, tokens_to_grid
from hybrid.config import Config
from hybrid.dataset import Dataset, Stream, prepare
from hybrid.dataset.stream import Rows, tokenize_pair

Start = Callable[..., BaseProcess]

PARTS = {"front": [0, 1, 2], "far": [1000, 37, 5], "first again": [0]}


@pytest.fixture
def dataset(configure: Callable[..., Config]) -> Dataset:
    config = configure(data={"max_side": 6})
    prepare(config.data, config.data_folder, lambda line: None)
    return Dataset.open(config.data_folder)


def same(a: Rows, b: Rows) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def epoch_rows(stream: Stream, epoch: int) -> Rows:
    return stream.rows(np.arange(epoch * len(stream), (epoch + 1) * len(stream)))


def on_canvas(tokens: np.ndarray) -> tuple[int, int, np.ndarray]:
    """Where on the canvas the grid is, and the grid; the row must hold one whole grid."""
    side = int(len(tokens) ** 0.5)
    canvas = tokens.reshape(side, side)
    top, left = np.argwhere(canvas >= 2).min(axis=0).tolist()
    moved = np.full((side, side), PAD, np.uint8)
    moved[: side - top, : side - left] = canvas[top:, left:]
    return top, left, tokens_to_grid(moved.ravel())


def test_rows_do_not_depend_on_process_or_global_generators(
    dataset: Dataset, tmp_path: Path, start: Start
) -> None:
    process = start(save_rows, dataset.folder, 7, PARTS, tmp_path / "rows.npz")
    process.join()
    assert process.exitcode == 0
    there = np.load(tmp_path / "rows.npz")
    for seed in (1, 2):
        np.random.seed(seed)
        stream = Stream(dataset, 7)
        for part, positions in reversed(PARTS.items()):
            here = stream.rows(np.array(positions))
            assert same(here, {name: there[f"{part}.{name}"] for name in here}), part


def three(rows: Rows) -> Iterator[Any]:
    return (rows[name] for name in ("inputs", "labels", "puzzle_identifiers"))


def test_epochs_and_seeds_differ(dataset: Dataset) -> None:
    a, b = epoch_rows(Stream(dataset, 0), 0), epoch_rows(Stream(dataset, 0), 1)
    c = epoch_rows(Stream(dataset, 1), 0)
    for name in a.keys() - {"side"}:
        assert not np.array_equal(a[name], b[name]) and not np.array_equal(a[name], c[name])


@pytest.mark.parametrize("epoch", range(6))
def test_an_epoch_is_every_pair_once_and_one_variant_of_each_task(
    dataset: Dataset, epoch: int
) -> None:
    """Each row, moved back to the corner, is an augmented training pair of the row's variant."""
    rows = epoch_rows(Stream(dataset, 3), epoch)
    seen: Counter[tuple[int, Pair]] = Counter()
    variants, moved = set(), Counter[int]()
    for inputs, labels, identifier in zip(*three(rows), strict=True):
        top, left, given_grid = on_canvas(inputs)
        *offset, answer = on_canvas(labels)
        assert [top, left] == offset, "input and output were moved apart"
        augmentation = dataset.augmentation(int(identifier) - 1)
        task = int(dataset.task_of[identifier - 1])
        pair = Pair(input=augmentation.invert(given_grid), output=augmentation.invert(answer))
        seen[task, pair] += 1
        variants.add(int(identifier))
        moved[int(identifier)] += (top, left) == (0, 0)
        expected = tokenize_pair(pair, augmentation, 6, (top, left))
        assert np.array_equal(inputs, expected[0]) and np.array_equal(labels, expected[1])
    every = [(t, p) for t in range(len(dataset.tasks)) for p in dataset.training_pairs(t)]
    assert seen == Counter(every)
    assert len(variants) == len(dataset.tasks)
    assert all(moved[identifier] >= 1 for identifier in variants), "a variant always moved"


def test_translations_reach_every_place_that_both_grids_fit(dataset: Dataset) -> None:
    """Of d037b0a7 all grids are 3 x 3: 16 places. Those of d631b094 are wide or tall."""
    stream = Stream(dataset, 0)
    places: dict[str, set[tuple[int, int]]] = {"d037b0a7": set(), "d631b094": set()}
    for epoch in range(60):
        rows = epoch_rows(stream, epoch)
        for labels, identifier in zip(rows["labels"], rows["puzzle_identifiers"], strict=True):
            task = dataset.tasks[int(dataset.task_of[int(identifier) - 1])].id
            if task in places:
                places[task].add(on_canvas(labels)[:2])
    assert places["d037b0a7"] == {(r, c) for r in range(4) for c in range(4)}
    assert {r for r, _ in places["d631b094"]} == {c for _, c in places["d631b094"]} == {0, 1, 2, 3}


def test_variants_and_order_are_drawn_evenly(dataset: Dataset) -> None:
    """Every variant has its turn, and no task always goes first."""
    stream = Stream(dataset, 0)
    epochs = [epoch_rows(stream, epoch)["puzzle_identifiers"] for epoch in range(120)]
    assert set(np.concatenate(epochs).tolist()) == set(range(1, dataset.num_identifiers))
    first = Counter(int(dataset.task_of[int(epoch[0]) - 1]) for epoch in epochs)
    assert set(first) == set(range(len(dataset.tasks)))


@settings(
    deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_the_workers_rounds_together_are_the_single_workers(
    dataset: Dataset, data: st.DataObject
) -> None:
    workers = data.draw(st.integers(1, 4))
    share = data.draw(st.integers(1, 3))
    first, count = data.draw(st.integers(0, 200)), data.draw(st.integers(1, 4))
    total = workers * share
    stream = Stream(dataset, 5)
    whole = stream.rounds(first, count, range(total), total)
    parts = [
        stream.rounds(first, count, range(w * share, (w + 1) * share), total)
        for w in range(workers)
    ]
    for name, values in whole.items():
        of_slot = values.reshape(count, total, -1)
        joined = [part[name].reshape(count, share, -1) for part in parts]
        assert np.array_equal(of_slot, np.concatenate(joined, axis=1))


def test_all_slots_together_take_every_position_once(dataset: Dataset) -> None:
    stream = Stream(dataset, 5)
    taken = stream.rounds(0, len(stream), range(4), 4)
    assert same(taken, stream.rows(np.arange(4 * len(stream))))


def test_original_pairs_are_the_unmoved_training_pairs(dataset: Dataset) -> None:
    rows = Stream(dataset, 0).original_pairs(10**6)
    pairs = [(t, p) for t in range(len(dataset.tasks)) for p in dataset.training_pairs(t)]
    assert len(rows["labels"]) == len(pairs)
    for (task, pair), inputs, labels, identifier in zip(pairs, *three(rows), strict=True):
        assert Pair(input=tokens_to_grid(inputs), output=tokens_to_grid(labels)) == pair
        assert dataset.augmentation(int(identifier) - 1).name == dataset.tasks[task].id
    assert len(Stream(dataset, 0).original_pairs(3)["labels"]) == 3
