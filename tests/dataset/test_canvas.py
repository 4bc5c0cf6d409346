"""Which canvas a task stands on is decided by what is known of it, and its rows stay on it."""

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
"""Sides 3, 10, 11, and two of 12: of the first of these only the answer."""
ASKED = ("25ff71a9", "c59eb873", "f25fbde4", "0962bcdd")
"""Sides 3, 10 and 10 with the answers, without them 8 and 9, and 12."""


def silently(line: str) -> None:
    pass


def known(task: Task) -> int:
    """Longest side of what is shown when the task's tests are asked."""
    shown = [grid for pair in task.train for grid in pair.grids]
    return max(max(grid.shape) for grid in (*shown, *(pair.input for pair in task.test)))


def complete(task: Task) -> int:
    outputs = [max(pair.output.shape) for pair in task.test if pair.output is not None]
    return max(known(task), *outputs)


def smallest(longest: int, full: int) -> int:
    return next(
        side for side in sorted({11, 16, 21, full}) if full >= side >= min(longest + 1, full)
    )


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """All of ARC-AGI-1 by canvas."""
    folder = tmp_path_factory.mktemp("arc1")
    config = DataConfig(variants=1, on_overlap="drop")
    for canvas in ("full", "bucketed"):
        prepare(replace(config, canvas=canvas), folder / canvas, silently)
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture(scope="module")
def some(tmp_path_factory: pytest.TempPathFactory, arc1: Arc) -> dict[str, Dataset]:
    """A few tasks on canvases of side 12 and, where that is allowed, 11."""
    root = tmp_path_factory.mktemp("some")
    write_tasks(root / "training", [arc1[task] for task in TRAINED])
    write_tasks(root / "evaluation", [arc1[task] for task in ASKED])
    found = {}
    for canvas in ("full", "bucketed"):
        config = config_of(root, data={"max_side": 12, "variants": 8, "canvas": canvas})
        prepare(config.data, root / canvas, silently)
        found[canvas] = Dataset.open(root / canvas)
    return found


@pytest.mark.parametrize("answers", [False, True])
def test_a_canvas_is_the_smallest_that_holds_what_is_known(
    everything: dict[str, Path], arc1: Arc, answers: bool
) -> None:
    """Of tasks that are trained on the tests are known, of those that are asked they are not."""
    dataset = Dataset.open(everything["bucketed"], answers=answers)
    assert len(dataset.sides) == len(dataset.tasks) > 700
    for task, purpose, side in zip(dataset.tasks, dataset.purposes, dataset.sides, strict=True):
        whole = arc1[task.id]
        longest = complete(whole) if purpose == "training" else known(whole)
        assert side == smallest(longest, 30), (task.id, purpose)
    assert set(dataset.sides.tolist()) == {11, 16, 21, 30}


@pytest.mark.parametrize("answers", [False, True])
def test_an_answer_that_is_larger_has_no_part_in_it(
    everything: dict[str, Path], arc1: Arc, answers: bool
) -> None:
    """All tasks of the evaluation set whose answer would want a larger canvas."""
    dataset = Dataset.open(everything["bucketed"], answers=answers)
    sides = {task.id: side for task, side in zip(dataset.tasks, dataset.sides, strict=True)}
    larger = {
        dataset.tasks[task].id
        for task in dataset.evaluated
        if smallest(complete(arc1[dataset.tasks[task].id]), 30)
        > smallest(known(arc1[dataset.tasks[task].id]), 30)
    }
    assert {"833dafe3", "ccd554ac", "ad7e01d0"} <= larger
    assert sides["833dafe3"] == 11 and arc1["833dafe3"].test[0].output.shape == (16, 16)
    assert sides["ccd554ac"] == 21 and max(arc1["ccd554ac"].test[0].output.shape) == 25


def test_garbage_for_answers_changes_no_canvas(
    some: dict[str, Dataset], arc1: Arc, tmp_path: Path
) -> None:
    dataset = some["bucketed"]
    write_tasks(tmp_path / "evaluation", [poison(arc1[task]) for task in ASKED])
    sources = {
        "training": [str(dataset.folder.parent / "training")],
        "evaluation": [str(tmp_path / "evaluation")],
    }
    data = {"max_side": 12, "variants": 8, "canvas": "bucketed"} | sources
    prepare(config_of(tmp_path, data=data).data, tmp_path / "poisoned", silently)
    for answers in (False, True):
        other = Dataset.open(tmp_path / "poisoned", answers=answers)
        assert [task.id for task in other.tasks] == [task.id for task in dataset.tasks]
        assert np.array_equal(other.sides, dataset.sides)


def test_a_full_canvas_is_everybodys(everything: dict[str, Path]) -> None:
    dataset = Dataset.open(everything["full"])
    assert not dataset.bucketed and set(dataset.sides.tolist()) == {30}
    assert len(dataset.sides) == len(dataset.tasks)


@pytest.mark.parametrize(("full", "sides"), [(3, {3}), (11, {11}), (12, {11, 12}), (16, {11, 16})])
def test_there_is_no_canvas_beyond_the_full_one(full: int, sides: set[int], tmp_path: Path) -> None:
    config = DataConfig(
        training=("arc1-training",), evaluation=(), variants=0, max_side=full, canvas="bucketed"
    )
    prepare(config, tmp_path / "data", silently)
    assert set(Dataset.open(tmp_path / "data").sides.tolist()) == sides


def test_a_canvas_is_no_part_of_what_a_dataset_is(everything: dict[str, Path]) -> None:
    """Same fingerprint, same tables: puzzle identifiers mean the same."""
    full, bucketed = (read_meta(everything[canvas]) for canvas in ("full", "bucketed"))
    assert full["fingerprint"] == bucketed["fingerprint"]
    for name in TABLES:
        there, here = (everything[canvas] / name for canvas in ("full", "bucketed"))
        assert there.read_bytes() == here.read_bytes(), name
    assert full["config"] == bucketed["config"] | {"canvas": "full"}
    assert bucketed["config"]["canvas"] == "bucketed"


def test_the_same_folder_on_another_canvas_is_prepared_again(tmp_path: Path) -> None:
    config = DataConfig(training=("arc1-training",), evaluation=(), variants=0, max_side=3)
    for canvas in ("full", "bucketed", "full"):
        prepare(replace(config, canvas=canvas), tmp_path / "data", silently)
        assert Dataset.open(tmp_path / "data").bucketed == (canvas == "bucketed")


def epochs(dataset: Dataset, count: int, seed: int = 3) -> Rows:
    stream = Stream(dataset, seed)
    return stream.rows(np.arange(count * len(stream)))


def task_of(dataset: Dataset, identifier: Any) -> int:
    return int(dataset.task_of[int(identifier) - 1])


def test_every_row_is_its_augmented_pair_on_its_tasks_canvas(some: dict[str, Dataset]) -> None:
    """Found again from the tokens alone; beyond the canvas is nothing."""
    dataset = some["bucketed"]
    rows = epochs(dataset, 4)
    seen: Counter[tuple[int, int]] = Counter()
    assert rows["side"].dtype == np.uint8 and rows["inputs"].shape[1] == 144
    for n, identifier in enumerate(rows["puzzle_identifiers"]):
        task, side = task_of(dataset, identifier), int(rows["side"][n])
        assert side == smallest(
            known(dataset.tasks[task])
            if dataset.purposes[task] == "evaluation"
            else complete(dataset.tasks[task]),
            12,
        )
        inputs, labels = rows["inputs"][n], rows["labels"][n]
        assert (inputs[side**2 :] == PAD).all() and (labels[side**2 :] == PAD).all()
        place = offset(inputs, side)
        assert place == offset(labels, side), "input and output were moved apart"
        view = dataset.augmentation(int(identifier) - 1)
        same = [
            number
            for number, pair in enumerate(dataset.training_pairs(task))
            if all(
                np.array_equal(view.apply(grid), decoded(tokens, side))
                for grid, tokens in zip(pair.grids, (inputs, labels), strict=True)
            )
        ]
        assert len(same) == 1, dataset.tasks[task].id
        seen[task, same[0]] += 1
        expected = tokenize_pair(dataset.training_pairs(task)[same[0]], view, side, place)
        assert np.array_equal(inputs[: side**2], expected[0])
        assert np.array_equal(labels[: side**2], expected[1])
    every = {
        (t, p) for t in range(len(dataset.tasks)) for p in range(len(dataset.training_pairs(t)))
    }
    assert seen == Counter(dict.fromkeys(every, 4))
    assert set(rows["side"].tolist()) == {11, 12}


def offset(tokens: np.ndarray, side: int) -> tuple[int, int]:
    top, left = np.argwhere(tokens[: side**2].reshape(side, side) >= 2).min(axis=0).tolist()
    return top, left


def decoded(tokens: np.ndarray, side: int) -> np.ndarray:
    top, left = offset(tokens, side)
    moved = np.full((side, side), PAD, np.uint8)
    moved[: side - top, : side - left] = tokens[: side**2].reshape(side, side)[top:, left:]
    return tokens_to_grid(moved.ravel())


def test_translations_reach_the_far_corner_of_the_canvas(some: dict[str, Dataset]) -> None:
    """Of each task the last row and the last column; a grid of side 10 has one place more."""
    dataset = some["bucketed"]
    rows = epochs(dataset, 60)
    last: dict[int, set[tuple[str, int]]] = {task: set() for task in range(len(dataset.tasks))}
    places: dict[int, set[tuple[int, int]]] = {task: set() for task in range(len(dataset.tasks))}
    for n, identifier in enumerate(rows["puzzle_identifiers"]):
        task, side = task_of(dataset, identifier), int(rows["side"][n])
        there = np.zeros((side, side), bool)
        for tokens in (rows["inputs"][n], rows["labels"][n]):
            there |= tokens[: side**2].reshape(side, side) >= 2
        bottom, right = np.argwhere(there).max(axis=0).tolist()
        last[task] |= {("row", bottom), ("column", right)}
        places[task].add(offset(rows["inputs"][n], side))
    for task, side in enumerate(dataset.sides.tolist()):
        assert max(place for _, place in last[task]) == side - 1, dataset.tasks[task].id
        assert {("row", side - 1), ("column", side - 1)} <= last[task], dataset.tasks[task].id
    by_id = {dataset.tasks[task].id: found for task, found in places.items()}
    assert by_id["1b60fb0c"] == {(r, c) for r in range(2) for c in range(2)}
    assert {r for r, _ in by_id["25ff71a9"]} == {c for _, c in by_id["25ff71a9"]} == set(range(9))


def test_a_smaller_canvas_changes_places_and_nothing_else(some: dict[str, Dataset]) -> None:
    """Order, variants and pairs are the full canvas'; rows of the largest tasks to the byte."""
    full, bucketed = (epochs(some[canvas], 3) for canvas in ("full", "bucketed"))
    assert np.array_equal(full["puzzle_identifiers"], bucketed["puzzle_identifiers"])
    assert set(full["side"].tolist()) == {12}
    large = bucketed["side"] == 12
    assert 0 < large.sum() < len(large)
    for name in ("inputs", "labels"):
        assert np.array_equal(full[name][large], bucketed[name][large]), name
    for n in np.flatnonzero(~large):
        grids = [decoded(rows["labels"][n], side) for rows, side in ((full, 12), (bucketed, 11))]
        assert np.array_equal(*grids)


def test_original_pairs_stand_in_the_corner_of_their_canvas(some: dict[str, Dataset]) -> None:
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
def test_rows_taken_apart_by_side_are_all_there_once(some: dict[str, Dataset], kind: str) -> None:
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
        for at, n in enumerate(chosen):
            for name, value in rows.items():
                cut = value[n][: side**2] if name in ("inputs", "labels") else value[n]
                assert (part[name][at] == cut).all(), name


def test_rows_of_one_side_are_not_copied(some: dict[str, Dataset]) -> None:
    rows = epochs(some["bucketed"], 1)
    small = {name: value[rows["side"] == 11] for name, value in rows.items()}
    [(chosen, part)] = split_by_canvas(small)
    assert chosen == slice(None) and part["inputs"].shape == (len(small["side"]), 121)
    for name, value in part.items():
        assert np.shares_memory(value, small[name]), name
    assert split_by_canvas({name: value[:0] for name, value in small.items()}) == []


def test_a_dataset_of_before_there_were_canvases_is_a_full_one(
    some: dict[str, Dataset], tmp_path: Path
) -> None:
    """It is of the same FORMAT, so it must be read, or refused as a UserError."""
    for name in TABLES:
        (tmp_path / name).write_bytes((some["full"].folder / name).read_bytes())
    meta = read_meta(some["full"].folder)
    del meta["config"]["canvas"]
    write_meta(tmp_path, meta)
    assert set(Dataset.open(tmp_path).sides.tolist()) == {12}
