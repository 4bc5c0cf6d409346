from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hybrid.arc import Pair, Task, grid_hash, pair_hash, parse_grid
from hybrid.errors import UserError


def test_hashes_match_the_published_code(golden: Path) -> None:
    recorded = json.loads((golden / "E_augment.json").read_text())
    for item in recorded["items"]:
        assert grid_hash(parse_grid(item["grid"], "grid")) == item["grid_hash"]
        assert grid_hash(parse_grid(item["transformed"], "grid")) == item["transformed_hash"]
    for task_id, entry in recorded["puzzles"].items():
        train, test = (
            tuple(
                Pair(input=parse_grid(p["input"], "i"), output=parse_grid(p["output"], "o"))
                for p in entry["puzzle"][split]
            )
            for split in ("train", "test")
        )
        task = Task(id=task_id, train=train, test=test)
        assert task.content_hash == entry["puzzle_hash"]
        assert [grid_hash(pair.input) for pair in train] == entry["train_input_hashes"]


def test_content_hash_depends_only_on_the_multiset_of_pairs(toy: Task) -> None:
    shuffled = Task(id="other", train=toy.test[::-1], test=toy.train)
    assert shuffled.content_hash == toy.content_hash
    swapped = replace(
        toy,
        train=(
            Pair(input=toy.train[0].input, output=toy.train[1].output),
            Pair(input=toy.train[1].input, output=toy.train[0].output),
        ),
    )
    assert swapped.content_hash != toy.content_hash, "swapping outputs did not change the hash"
    assert toy.without_answers().content_hash != toy.content_hash
    other_test = replace(toy, test=(replace(toy.test[0], input=toy.test[1].input), toy.test[1]))
    assert other_test.without_answers().content_hash != toy.without_answers().content_hash


def test_pair_hash_distinguishes_input_from_output() -> None:
    wide, tall = np.zeros((1, 2), np.uint8), np.zeros((2, 1), np.uint8)
    hashes = {
        pair_hash(Pair(input=wide, output=tall)),
        pair_hash(Pair(input=tall, output=wide)),
        pair_hash(Pair(input=wide, output=None)),
    }
    assert len(hashes) == 3


def test_tasks_are_equal_by_value_and_survive_pickling(toy: Task) -> None:
    copy = pickle.loads(pickle.dumps(toy))
    assert copy == toy and hash(copy) == hash(toy)
    assert toy.without_answers() != toy
    assert Pair(input=toy.train[0].input, output=None) != toy.train[0]
    # The same bytes in another shape are a different grid.
    flat = Pair(input=np.zeros((1, 4), np.uint8), output=None)
    assert flat != Pair(input=np.zeros((2, 2), np.uint8), output=None)


def test_without_answers_removes_only_the_test_outputs(toy: Task) -> None:
    blind = toy.without_answers()
    assert blind.train == toy.train
    assert [pair.output for pair in blind.test] == [None, None]
    assert [grid_hash(p.input) for p in blind.test] == [grid_hash(p.input) for p in toy.test]


def test_grids_are_read_only_copies() -> None:
    source = np.ones((2, 2), np.uint8)
    pair = Pair(input=source, output=source)
    source[0, 0] = 7
    assert pair.input[0, 0] == 1, "a change of the source array changed the task"
    for grid in pair.grids:
        with pytest.raises(ValueError, match="read-only"):
            grid[0, 0] = 5


def test_max_side_covers_every_grid(toy: Task) -> None:
    assert toy.max_side == 3
    long = Pair(input=np.zeros((1, 1), np.uint8), output=np.zeros((17, 2), np.uint8))
    assert replace(toy, train=(*toy.train, long)).max_side == 17


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (None, "non-empty list of rows, got None"),
        ([], "non-empty list of rows, got []"),
        ("012", "non-empty list of rows, got '012'"),
        ([1, 2], "row 0 must be a non-empty list of colours, got 1"),
        ([[]], "row 0 must be a non-empty list of colours, got []"),
        ([[1, 2], [3]], "ragged grid: row 1 has 1 cells, row 0 has 2"),
        ([[1], [2], []], "row 2 must be a non-empty list"),
        ([[0]] * 31, "31 rows, at most 30"),
        ([[0] * 31], "row 0 has 31 cells, at most 30"),
        ([[0, 10]], "row 0, column 1: expected an int in 0..9, got 10"),
        ([[0], [-1]], "row 1, column 0: expected an int in 0..9, got -1"),
        ([[1.0]], "got 1.0"),
        ([[True]], "got True"),
        ([["1"]], "got '1'"),
        ([[None]], "got None"),
        ([[[1]]], "got [1]"),
        ([["a\nb"]], r"got 'a\nb'"),
        ([[10**40]], "expected an int in 0..9"),
    ],
)
def test_parse_grid_reports_malformed_grids_in_one_line(value: object, problem: str) -> None:
    with pytest.raises(UserError) as error:
        parse_grid(value, "here")
    assert str(error.value).startswith("here: ") and problem in str(error.value)
    assert "\n" not in str(error.value)


def test_parse_grid_accepts_the_largest_and_smallest_grid() -> None:
    assert parse_grid([[9]], "x").tolist() == [[9]]
    assert parse_grid([[0] * 30] * 30, "x").shape == (30, 30)
