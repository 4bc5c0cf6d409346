"""The training stream: order as a function of (seed, epoch), and content of the rows."""

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

PARTS = {"start": [0, 1, 2], "unordered": [1000, 37, 5], "repeated": [0]}


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
    """Return the offset and the grid of a row, which must contain one complete grid."""
    side = int(len(tokens) ** 0.5)
    canvas = tokens.reshape(side, side)
    top, left = np.argwhere(canvas >= 2).min(axis=0).tolist()
    corner = np.full((side, side), PAD, np.uint8)
    corner[: side - top, : side - left] = canvas[top:, left:]
    return top, left, tokens_to_grid(corner.ravel())


def test_rows_do_not_depend_on_process_or_global_generators(
    dataset: Dataset, tmp_path: Path, start: Start
) -> None:
    process = start(save_rows, dataset.folder, 7, PARTS, tmp_path / "rows.npz")
    process.join()
    assert process.exitcode == 0
    expected = np.load(tmp_path / "rows.npz")
    for seed in (1, 2):
        np.random.seed(seed)
        stream = Stream(dataset, 7)
        for part, positions in reversed(PARTS.items()):
            rows = stream.rows(np.array(positions))
            assert same(rows, {name: expected[f"{part}.{name}"] for name in rows}), part


def columns(rows: Rows) -> Iterator[Any]:
    return (rows[name] for name in ("inputs", "labels", "puzzle_identifiers"))


def test_epochs_and_seeds_give_different_rows(dataset: Dataset) -> None:
    a, b = epoch_rows(Stream(dataset, 0), 0), epoch_rows(Stream(dataset, 0), 1)
    c = epoch_rows(Stream(dataset, 1), 0)
    for name in a.keys() - {"side"}:
        assert not np.array_equal(a[name], b[name]) and not np.array_equal(a[name], c[name])


@pytest.mark.parametrize("epoch", range(6))
def test_an_epoch_has_every_pair_once_and_one_variant_per_task(
    dataset: Dataset, epoch: int
) -> None:
    """Each row is an augmented and translated training pair of its variant."""
    rows = epoch_rows(Stream(dataset, 3), epoch)
    counts: Counter[tuple[int, Pair]] = Counter()
    variants, untranslated = set(), Counter[int]()
    for inputs, labels, identifier in zip(*columns(rows), strict=True):
        top, left, input_grid = on_canvas(inputs)
        *offset, answer = on_canvas(labels)
        assert [top, left] == offset, "input and output have different offsets"
        augmentation = dataset.augmentation(int(identifier) - 1)
        task = int(dataset.task_of[identifier - 1])
        pair = Pair(input=augmentation.invert(input_grid), output=augmentation.invert(answer))
        counts[task, pair] += 1
        variants.add(int(identifier))
        untranslated[int(identifier)] += (top, left) == (0, 0)
        expected = tokenize_pair(pair, augmentation, 6, (top, left))
        assert np.array_equal(inputs, expected[0]) and np.array_equal(labels, expected[1])
    all_pairs = [(t, p) for t in range(len(dataset.tasks)) for p in dataset.training_pairs(t)]
    assert counts == Counter(all_pairs)
    assert len(variants) == len(dataset.tasks)
    assert all(untranslated[identifier] >= 1 for identifier in variants)


def test_translations_reach_every_offset_that_fits_both_grids(dataset: Dataset) -> None:
    """Grids of d037b0a7 are 3 x 3 and have 16 offsets; those of d631b094 are wide or tall."""
    stream = Stream(dataset, 0)
    offsets: dict[str, set[tuple[int, int]]] = {"d037b0a7": set(), "d631b094": set()}
    for epoch in range(60):
        rows = epoch_rows(stream, epoch)
        for labels, identifier in zip(rows["labels"], rows["puzzle_identifiers"], strict=True):
            task = dataset.tasks[int(dataset.task_of[int(identifier) - 1])].id
            if task in offsets:
                offsets[task].add(on_canvas(labels)[:2])
    assert offsets["d037b0a7"] == {(r, c) for r in range(4) for c in range(4)}
    assert (
        {r for r, _ in offsets["d631b094"]} == {c for _, c in offsets["d631b094"]} == {0, 1, 2, 3}
    )


def test_all_variants_and_all_first_tasks_are_drawn(dataset: Dataset) -> None:
    """Every variant is drawn, and every task comes first in some epoch."""
    stream = Stream(dataset, 0)
    epochs = [epoch_rows(stream, epoch)["puzzle_identifiers"] for epoch in range(120)]
    assert set(np.concatenate(epochs).tolist()) == set(range(1, dataset.num_identifiers))
    first = Counter(int(dataset.task_of[int(epoch[0]) - 1]) for epoch in epochs)
    assert set(first) == set(range(len(dataset.tasks)))


@settings(
    deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_rounds_of_all_workers_equal_those_of_a_single_worker(
    dataset: Dataset, data: st.DataObject
) -> None:
    workers = data.draw(st.integers(1, 4))
    share = data.draw(st.integers(1, 3))
    first, count = data.draw(st.integers(0, 200)), data.draw(st.integers(1, 4))
    total = workers * share
    stream = Stream(dataset, 5)
    single = stream.rounds(first, count, range(total), total)
    parts = [
        stream.rounds(first, count, range(w * share, (w + 1) * share), total)
        for w in range(workers)
    ]
    for name, values in single.items():
        of_slot = values.reshape(count, total, -1)
        joined = [part[name].reshape(count, share, -1) for part in parts]
        assert np.array_equal(of_slot, np.concatenate(joined, axis=1))


def test_all_slots_together_read_every_position_once(dataset: Dataset) -> None:
    stream = Stream(dataset, 5)
    rows = stream.rounds(0, len(stream), range(4), 4)
    assert same(rows, stream.rows(np.arange(4 * len(stream))))


def test_original_pairs_are_the_untranslated_training_pairs(dataset: Dataset) -> None:
    rows = Stream(dataset, 0).original_pairs(10**6)
    pairs = [(t, p) for t in range(len(dataset.tasks)) for p in dataset.training_pairs(t)]
    assert len(rows["labels"]) == len(pairs)
    for (task, pair), inputs, labels, identifier in zip(pairs, *columns(rows), strict=True):
        assert Pair(input=tokens_to_grid(inputs), output=tokens_to_grid(labels)) == pair
        assert dataset.augmentation(int(identifier) - 1).name == dataset.tasks[task].id
    assert len(Stream(dataset, 0).original_pairs(3)["labels"]) == 3
