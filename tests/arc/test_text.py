from __future__ import annotations

import numpy as np
import pytest

from hybrid.arc import Task, compare_grids, grid_to_string, string_to_grid
from hybrid.errors import UserError


def test_grid_to_string_writes_rows_of_digits() -> None:
    assert grid_to_string(np.array([[0, 1, 2], [9, 8, 7]], np.uint8)) == "012\n987"


def test_real_grids_round_trip_through_text(sets: dict[str, list[Task]]) -> None:
    for task in sets["arc2-evaluation"]:
        for grid in (grid for pair in task.pairs for grid in pair.grids):
            back = string_to_grid(grid_to_string(grid))
            assert back.dtype == np.uint8 and np.array_equal(back, grid)


@pytest.mark.parametrize("text", ["01\n23", "\n 01  \n\t23\r\n\n", "0 1\n2 3", "01\r\n23"])
def test_whitespace_is_ignored(text: str) -> None:
    assert string_to_grid(text).tolist() == [[0, 1], [2, 3]]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "non-empty list of rows"),
        ("  \n ", "non-empty list of rows"),
        ("01\n2", "ragged grid: row 1 has 1 cells"),
        ("01\nab", "line 1 is not a row of digits: 'ab'"),
        ("01\n\n23", "line 1 is not a row of digits: ''"),
        ("The grid is 12", "line 0 is not a row of digits"),
        ("-1", "line 0 is not a row of digits"),
        ("1²", "line 0 is not a row of digits"),
        ("٣", "line 0 is not a row of digits"),
        ("0" * 31, "at most 30"),
        ("0\n" * 31, "at most 30"),
    ],
)
def test_malformed_text_is_reported_in_one_line(text: str, problem: str) -> None:
    with pytest.raises(UserError) as error:
        string_to_grid(text)
    assert problem in str(error.value) and "\n" not in str(error.value)


def test_comparison_lists_exactly_the_wrong_cells() -> None:
    answer = np.array([[1, 2], [3, 4]], np.uint8)
    predicted = np.array([[1, 0], [9, 4]], np.uint8)
    comparison = compare_grids(predicted, answer)
    assert comparison.wrong == ((0, 1, 0, 2), (1, 0, 9, 3))
    assert (comparison.same_shape, comparison.right, comparison.accuracy) == (True, False, 0.5)
    equal = compare_grids(answer, answer)
    assert (equal.wrong, equal.right, equal.accuracy) == ((), True, 1.0)


@pytest.mark.parametrize("shape", [(0, 0), (1, 4), (2, 1), (3, 2)])
def test_a_grid_of_another_shape_is_wrong(shape: tuple[int, int]) -> None:
    comparison = compare_grids(np.ones(shape, np.uint8), np.ones((2, 2), np.uint8))
    assert not comparison.same_shape and not comparison.right
    assert comparison.accuracy == 0 and comparison.wrong == ()
