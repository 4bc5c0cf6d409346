"""Canvas selection: the canvas depends only on visible grids, and rows fit it."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import config_of, poison, write_tasks

from hybrid.arc import PAD, Task, tokens_to_grid
from hybrid.dataset import DataConfig, Dataset, Stream, prepare
from hybrid.dataset.store import TABLES, read_meta, write_meta
from hybrid.dataset.stream import Rows, split_by_canvas, tokenize_pair

Arc = dict[str, Task]
TRAINED = ("0d3d703e", "1b60fb0c", "29c11459", "10fcaaa3", "178fcbfb")
"""Longest sides 3, 10, 11, 12 and 12; in 10fcaaa3 only the answer has side 12."""
EVALUATED = ("25ff71a9", "c59eb873", "f25fbde4", "0962bcdd")
"""Longest sides 3, 10, 10 and 12; without answers 3, 8, 9 and 12."""


def quiet(line: str) -> None:
    pass


def visible_side(task: Task) -> int:
    """Return the longest side of the demonstrations and test inputs."""
    demonstrations = [grid for pair in task.train for grid in pair.grids]
    return max(max(grid.shape) for grid in (*demonstrations, *(pair.input for pair in task.test)))


def longest_side(task: Task) -> int:
    outputs = [max(pair.output.shape) for pair in task.test if pair.output is not None]
    return max(visible_side(task), *outputs)


def smallest_canvas(longest: int, full: int) -> int:
    return next(
        side for side in sorted({11, 16, 21, full}) if full >= side >= min(longest + 1, full)
    )


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of all ARC-AGI-1 tasks, by canvas mode."""
    folder = tmp_path_factory.mktemp("arc1")
    config = DataConfig(variants=1, on_overlap="drop")
    for canvas in ("full", "bucketed"):
        prepare(replace(config, canvas=canvas), folder / canvas, quiet)
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture(scope="module")
def some(tmp_path_factory: pytest.TempPathFactory, arc1: Arc) -> dict[str, Dataset]:
    """A few tasks on a canvas of side 12 and, if bucketed, also 11; by canvas mode."""
    root = tmp_path_factory.mktemp("some")
    write_tasks(root / "training", [arc1[task] for task in TRAINED])
    write_tasks(root / "evaluation", [arc1[task] for task in EVALUATED])
    datasets = {}
    for canvas in ("full", "bucketed"):
        config = config_of(root, data={"max_side": 12, "variants": 8, "canvas": canvas})
        prepare(config.data, root / canvas, quiet)
        datasets[canvas] = Dataset.open(root / canvas)
    return datasets


@pytest.mark.parametrize("answers", [False, True])
def test_the_canvas_is_the_smallest_that_fits_the_visible_grids(
    everything: dict[str, Path], arc1: Arc, answers: bool
) -> None:
    """Test outputs count for training tasks but not for evaluation tasks."""
    dataset = Dataset.open(everything["bucketed"], answers=answers)
    assert len(dataset.sides) == len(dataset.tasks) > 700
    for task, purpose, side in zip(dataset.tasks, dataset.purposes, dataset.sides, strict=True):
        full = arc1[task.id]
        longest = longest_side(full) if purpose == "training" else visible_side(full)
        assert side == smallest_canvas(longest, 30), (task.id, purpose)
    assert set(dataset.sides.tolist()) == {11, 16, 21, 30}


@pytest.mark.parametrize("answers", [False, True])
def test_a_larger_answer_does_not_change_the_canvas(
    everything: dict[str, Path], arc1: Arc, answers: bool
) -> None:
    """Includes evaluation tasks whose answer needs a larger canvas than the one chosen."""
    dataset = Dataset.open(everything["bucketed"], answers=answers)
    sides = {task.id: side for task, side in zip(dataset.tasks, dataset.sides, strict=True)}
    larger = {
        dataset.tasks[task].id
        for task in dataset.evaluated
        if smallest_canvas(longest_side(arc1[dataset.tasks[task].id]), 30)
        > smallest_canvas(visible_side(arc1[dataset.tasks[task].id]), 30)
    }
    assert {"833dafe3", "ccd554ac", "ad7e01d0"} <= larger
    assert sides["833dafe3"] == 11 and arc1["833dafe3"].test[0].output.shape == (16, 16)
    assert sides["ccd554ac"] == 21 and max(arc1["ccd554ac"].test[0].output.shape) == 25


def test_replacing_the_answers_does_not_change_the_canvas(
    some: dict[str, Dataset], arc1: Arc, tmp_path: Path
) -> None:
    dataset = some["bucketed"]
    write_tasks(tmp_path / "evaluation", [poison(arc1[task]) for task in EVALUATED])
    sources = {
        "training": [str(dataset.folder.parent / "training")],
        "evaluation": [str(tmp_path / "evaluation")],
    }
    data = {"max_side": 12, "variants": 8, "canvas": "bucketed"} | sources
    prepare(config_of(tmp_path, data=data).data, tmp_path / "poisoned", quiet)
    for answers in (False, True):
        other = Dataset.open(tmp_path / "poisoned", answers=answers)
        assert [task.id for task in other.tasks] == [task.id for task in dataset.tasks]
        assert np.array_equal(other.sides, dataset.sides)


def test_full_mode_puts_every_task_on_the_full_canvas(everything: dict[str, Path]) -> None:
    dataset = Dataset.open(everything["full"])
    assert not dataset.bucketed and set(dataset.sides.tolist()) == {30}
    assert len(dataset.sides) == len(dataset.tasks)


@pytest.mark.parametrize(("full", "sides"), [(3, {3}), (11, {11}), (12, {11, 12}), (16, {11, 16})])
def test_no_canvas_is_larger_than_the_full_one(full: int, sides: set[int], tmp_path: Path) -> None:
    config = DataConfig(
        training=("arc1-training",), evaluation=(), variants=0, max_side=full, canvas="bucketed"
    )
    prepare(config, tmp_path / "data", quiet)
    assert set(Dataset.open(tmp_path / "data").sides.tolist()) == sides


def test_canvas_mode_does_not_change_fingerprint_or_tables(everything: dict[str, Path]) -> None:
    """Puzzle identifiers therefore have the same meaning in both modes."""
    full, bucketed = (read_meta(everything[canvas]) for canvas in ("full", "bucketed"))
    assert full["fingerprint"] == bucketed["fingerprint"]
    for name in TABLES:
        one, other = (everything[canvas] / name for canvas in ("full", "bucketed"))
        assert one.read_bytes() == other.read_bytes(), name
    assert full["config"] == bucketed["config"] | {"canvas": "full"}
    assert bucketed["config"]["canvas"] == "bucketed"


def test_changing_the_canvas_mode_prepares_the_folder_again(tmp_path: Path) -> None:
    config = DataConfig(training=("arc1-training",), evaluation=(), variants=0, max_side=3)
    for canvas in ("full", "bucketed", "full"):
        prepare(replace(config, canvas=canvas), tmp_path / "data", quiet)
        assert Dataset.open(tmp_path / "data").bucketed == (canvas == "bucketed")


def epochs(dataset: Dataset, count: int, seed: int = 3) -> Rows:
    stream = Stream(dataset, seed)
    return stream.rows(np.arange(count * len(stream)))


def task_of(dataset: Dataset, identifier: Any) -> int:
    return int(dataset.task_of[int(identifier) - 1])


def test_every_row_is_an_augmented_pair_on_its_tasks_canvas(some: dict[str, Dataset]) -> None:
    """Each pair is recovered from the tokens alone; tokens after the canvas are PAD."""
    dataset = some["bucketed"]
    rows = epochs(dataset, 4)
    counts: Counter[tuple[int, int]] = Counter()
    assert rows["side"].dtype == np.uint8 and rows["inputs"].shape[1] == 144
    for n, identifier in enumerate(rows["puzzle_identifiers"]):
        task, side = task_of(dataset, identifier), int(rows["side"][n])
        assert side == smallest_canvas(
            visible_side(dataset.tasks[task])
            if dataset.purposes[task] == "evaluation"
            else longest_side(dataset.tasks[task]),
            12,
        )
        inputs, labels = rows["inputs"][n], rows["labels"][n]
        assert (inputs[side**2 :] == PAD).all() and (labels[side**2 :] == PAD).all()
        position = offset(inputs, side)
        assert position == offset(labels, side), "input and output have different offsets"
        augmentation = dataset.augmentation(int(identifier) - 1)
        matches = [
            number
            for number, pair in enumerate(dataset.training_pairs(task))
            if all(
                np.array_equal(augmentation.apply(grid), decode(tokens, side))
                for grid, tokens in zip(pair.grids, (inputs, labels), strict=True)
            )
        ]
        assert len(matches) == 1, dataset.tasks[task].id
        counts[task, matches[0]] += 1
        pair = dataset.training_pairs(task)[matches[0]]
        expected = tokenize_pair(pair, augmentation, side, position)
        assert np.array_equal(inputs[: side**2], expected[0])
        assert np.array_equal(labels[: side**2], expected[1])
    all_pairs = {
        (t, p) for t in range(len(dataset.tasks)) for p in range(len(dataset.training_pairs(t)))
    }
    assert counts == Counter(dict.fromkeys(all_pairs, 4))
    assert set(rows["side"].tolist()) == {11, 12}


def offset(tokens: np.ndarray, side: int) -> tuple[int, int]:
    top, left = np.argwhere(tokens[: side**2].reshape(side, side) >= 2).min(axis=0).tolist()
    return top, left


def decode(tokens: np.ndarray, side: int) -> np.ndarray:
    top, left = offset(tokens, side)
    corner = np.full((side, side), PAD, np.uint8)
    corner[: side - top, : side - left] = tokens[: side**2].reshape(side, side)[top:, left:]
    return tokens_to_grid(corner.ravel())


def test_translations_reach_the_far_corner_of_the_canvas(some: dict[str, Dataset]) -> None:
    """A side-10 pair on canvas 11 has two offsets per axis, and a side-3 one has nine."""
    dataset = some["bucketed"]
    rows = epochs(dataset, 60)
    last: dict[int, set[tuple[str, int]]] = {task: set() for task in range(len(dataset.tasks))}
    offsets: dict[int, set[tuple[int, int]]] = {task: set() for task in range(len(dataset.tasks))}
    for n, identifier in enumerate(rows["puzzle_identifiers"]):
        task, side = task_of(dataset, identifier), int(rows["side"][n])
        coloured = np.zeros((side, side), bool)
        for tokens in (rows["inputs"][n], rows["labels"][n]):
            coloured |= tokens[: side**2].reshape(side, side) >= 2
        bottom, right = np.argwhere(coloured).max(axis=0).tolist()
        last[task] |= {("row", bottom), ("column", right)}
        offsets[task].add(offset(rows["inputs"][n], side))
    for task, side in enumerate(dataset.sides.tolist()):
        assert max(position for _, position in last[task]) == side - 1, dataset.tasks[task].id
        assert {("row", side - 1), ("column", side - 1)} <= last[task], dataset.tasks[task].id
    by_id = {dataset.tasks[task].id: found for task, found in offsets.items()}
    assert by_id["1b60fb0c"] == {(r, c) for r in range(2) for c in range(2)}
    assert {r for r, _ in by_id["25ff71a9"]} == {c for _, c in by_id["25ff71a9"]} == set(range(9))


def test_a_smaller_canvas_changes_only_the_positions(some: dict[str, Dataset]) -> None:
    """Order, variants and pairs equal full mode; rows on the full canvas are identical."""
    full, bucketed = (epochs(some[canvas], 3) for canvas in ("full", "bucketed"))
    assert np.array_equal(full["puzzle_identifiers"], bucketed["puzzle_identifiers"])
    assert set(full["side"].tolist()) == {12}
    large = bucketed["side"] == 12
    assert 0 < large.sum() < len(large)
    for name in ("inputs", "labels"):
        assert np.array_equal(full[name][large], bucketed[name][large]), name
    for n in np.flatnonzero(~large):
        grids = [decode(rows["labels"][n], side) for rows, side in ((full, 12), (bucketed, 11))]
        assert np.array_equal(*grids)


def test_original_pairs_are_at_the_top_left_of_their_canvas(some: dict[str, Dataset]) -> None:
    dataset = some["bucketed"]
    rows = Stream(dataset, 0).original_pairs(10**6)
    pairs = [(t, p) for t in range(len(dataset.tasks)) for p in dataset.training_pairs(t)]
    assert rows["side"].tolist() == [int(dataset.sides[task]) for task, _ in pairs]
    for n, (_, pair) in enumerate(pairs):
        side = int(rows["side"][n])
        for name, grid in zip(("inputs", "labels"), pair.grids, strict=True):
            assert np.array_equal(tokens_to_grid(rows[name][n][: side**2]), grid)
            assert (rows[name][n][side**2 :] == PAD).all()


@pytest.mark.parametrize("kind", ["arrays", "tensors"])
def test_split_by_canvas_returns_every_row_once(some: dict[str, Dataset], kind: str) -> None:
    rows: dict[str, Any] = epochs(some["bucketed"], 1)
    if kind == "tensors":
        rows = {name: torch.from_numpy(np.asarray(value)) for name, value in rows.items()}
    parts = split_by_canvas(rows)
    assert [part["inputs"].shape[1] for _, part in parts] == [121, 144]
    numbers = [n for chosen, _ in parts for n in chosen]
    assert sorted(numbers) == list(range(len(rows["side"])))
    for chosen, part in parts:
        assert part.keys() == rows.keys()
        side = int(part["side"][0])
        for index, n in enumerate(chosen):
            for name, value in rows.items():
                cut = value[n][: side**2] if name in ("inputs", "labels") else value[n]
                assert (part[name][index] == cut).all(), name


def test_split_by_canvas_does_not_copy_rows_of_one_side(some: dict[str, Dataset]) -> None:
    rows = epochs(some["bucketed"], 1)
    small = {name: value[rows["side"] == 11] for name, value in rows.items()}
    [(chosen, part)] = split_by_canvas(small)
    assert chosen == slice(None) and part["inputs"].shape == (len(small["side"]), 121)
    for name, value in part.items():
        assert np.shares_memory(value, small[name]), name
    assert split_by_canvas({name: value[:0] for name, value in small.items()}) == []


def test_a_dataset_without_canvas_key_is_in_full_mode(
    some: dict[str, Dataset], tmp_path: Path
) -> None:
    """Older datasets have the same FORMAT but no `canvas` key."""
    for name in TABLES:
        (tmp_path / name).write_bytes((some["full"].folder / name).read_bytes())
    meta = read_meta(some["full"].folder)
    del meta["config"]["canvas"]
    write_meta(tmp_path, meta)
    assert set(Dataset.open(tmp_path).sides.tolist()) == {12}
