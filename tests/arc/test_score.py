from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from hybrid.arc import Grid, Rate, Task, score, wilson
from hybrid.errors import UserError

WRONG = np.full((2, 2), 9, np.uint8)
EMPTY = np.zeros((0, 0), np.uint8)


def answers(task: Task) -> list[Grid]:
    return [pair.grids[1] for pair in task.test]


@pytest.fixture
def three(toy: Task) -> list[Task]:
    """Tasks a and b with two tests each, and c with one."""
    return [replace(toy, id=i, test=toy.test[:n]) for i, n in (("a", 2), ("b", 2), ("c", 1))]


def test_wilson_matches_published_intervals() -> None:
    # Newcombe (1998), table I: 81 of 263 and 15 of 148, method 3 (Wilson without correction).
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson(0, 0) == (0.0, 1.0)
    for n in (1, 7, 120, 10_000):
        for numerator in (0, n / 3, n):
            low, high = wilson(numerator, n)
            assert 0 <= low <= numerator / n <= high <= 1


def test_a_rate_prints_its_denominator_and_interval() -> None:
    assert str(Rate(numerator=3, denominator=167)) == "3/167 = 1.8% [0.6, 5.1]"
    assert str(Rate(numerator=1.5, denominator=120)).startswith("1.50/120 = 1.2%")
    assert math.isnan(Rate(numerator=0, denominator=0).value)


def test_three_metrics_match_values_computed_by_hand(three: list[Task]) -> None:
    first, second = answers(three[0])
    ranked = {"a": [[first], [WRONG, second]], "b": [[first], [WRONG, WRONG]], "c": [[WRONG]]}
    scores = score(three, ranked, k=2)
    assert scores.outputs == Rate(numerator=3, denominator=5)
    assert scores.task_mean == Rate(numerator=1.5, denominator=3)
    assert scores.tasks == Rate(numerator=1, denominator=3)
    best = score(three, ranked, k=1)
    assert (best.outputs.numerator, best.task_mean.numerator, best.tasks.numerator) == (2, 1, 0)


def test_a_large_k_measures_coverage(three: list[Task]) -> None:
    ranked = {"c": [[WRONG] * 99 + answers(three[2])]}
    assert score(three, ranked, k=99).outputs.numerator == 0
    assert score(three, ranked, k=100).outputs.numerator == 1


def test_missing_predictions_stay_in_the_denominator(three: list[Task]) -> None:
    first, _ = answers(three[0])
    for ranked in ({}, {"a": []}, {"a": [[], []], "b": [[EMPTY], [EMPTY, EMPTY]]}):
        scores = score(three, ranked)
        assert scores.outputs == Rate(numerator=0, denominator=5)
        assert scores.task_mean.denominator == scores.tasks.denominator == 3
    # Only the first test has predictions: the second counts as wrong and is not skipped.
    partial = score(three, {"a": [[first]]})
    assert partial.outputs == Rate(numerator=1, denominator=5)
    assert partial.tasks.numerator == 0


def test_an_empty_grid_counts_as_one_of_the_k(three: list[Task]) -> None:
    [answer] = answers(three[2])
    assert score(three, {"c": [[EMPTY, answer]]}, k=1).outputs.numerator == 0
    assert score(three, {"c": [[EMPTY, answer]]}, k=2).outputs.numerator == 1


def test_a_grid_of_another_shape_is_wrong(three: list[Task]) -> None:
    [answer] = answers(three[2])
    assert score(three, {"c": [[answer.T, answer[:, :1]]]}).outputs.numerator == 0


def test_unexpected_predictions_raise_a_user_error(three: list[Task]) -> None:
    with pytest.raises(UserError, match="task 'z': predicted, but not one of the 3 evaluated"):
        score(three, {"z": [[WRONG]]})
    with pytest.raises(UserError, match="task 'c': predictions for 2 tests, but it has 1"):
        score(three, {"c": [[WRONG], [WRONG]]})


def test_an_unknown_answer_raises_a_user_error_even_without_predictions(three: list[Task]) -> None:
    partly = replace(three[1], test=(three[1].test[0], replace(three[1].test[1], output=None)))
    with pytest.raises(UserError, match=r"task 'b', test\[1\]: no answer to score against"):
        score([three[0], partly], {})
