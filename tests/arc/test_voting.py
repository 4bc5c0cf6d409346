"""Comparison with the votes and metrics of the published evaluator, recorded in D_evaluator."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hybrid.arc import (
    Augmentation,
    Candidate,
    Grid,
    Pair,
    Task,
    grid_hash,
    halt_confidence,
    parse_grid,
    score,
    tokens_to_grid,
    vote,
)

EMPTY = np.zeros((0, 0), np.uint8)
EMPTY_HASH = grid_hash(EMPTY)
Ballots = Mapping[tuple[str, int], tuple[list[Grid], list[float]]]


@pytest.fixture(scope="module")
def recorded(golden: Path) -> dict[str, Any]:
    return {
        **json.loads((golden / "D_evaluator.json").read_text()),
        "arrays": dict(np.load(golden / "D_evaluator.npz")),
    }


@pytest.fixture(scope="module")
def tasks(recorded: dict[str, Any]) -> list[Task]:
    def pairs(values: list[dict[str, Any]]) -> tuple[Pair, ...]:
        return tuple(
            Pair(input=parse_grid(v["input"], "i"), output=parse_grid(v["output"], "o"))
            for v in values
        )

    return [
        Task(id=id_, train=pairs(value["train"]), test=pairs(value["test"]))
        for id_, value in recorded["test_puzzles"].items()
    ]


def ballots(recorded: dict[str, Any], tasks: list[Task], passes: list[str]) -> Ballots:
    """Return predictions in the task's own frame and their confidences, in order, by test input."""
    tests = {
        (task.id, grid_hash(pair.input)): (task.id, i)
        for task in tasks
        for i, pair in enumerate(task.test)
    }
    found: Ballots = defaultdict(lambda: ([], []))
    for name in passes:
        columns = (
            recorded["arrays"][f"{name}.{column}"]
            for column in ("inputs", "preds", "puzzle_identifiers", "q_halt_logits")
        )
        for tokens, predicted, identifier, logit in zip(*columns, strict=True):
            augmentation = Augmentation.parse(recorded["identifiers"][identifier])
            test_input = grid_hash(augmentation.invert(tokens_to_grid(tokens)))
            grids, confidences = found[tests[augmentation.task, test_input]]
            grids.append(augmentation.invert(tokens_to_grid(predicted)))
            confidences.append(float(halt_confidence(logit)))
    return found


def without_empty(ranking: list[list[Any]]) -> list[list[Any]]:
    return [entry for entry in ranking if entry[0] != EMPTY_HASH]


@pytest.mark.parametrize(
    ("result", "passes"),
    [
        ("aggregated=False/pass1", ["pass1"]),
        ("aggregated=False/pass2", ["pass2"]),
        # The published default never clears its votes, so they add up over evaluations.
        # `vote` is stateless, so the test passes the predictions of both.
        ("aggregated=True/pass2", ["pass1", "pass2"]),
    ],
)
def test_votes_and_metrics_match_the_published_ones_without_empty_grids(
    recorded: dict[str, Any], tasks: list[Task], result: str, passes: list[str]
) -> None:
    published = recorded["results"][result]
    found = ballots(recorded, tasks, passes)
    ranked: dict[str, list[list[Grid]]] = {}
    for task in tasks:
        candidates = [vote(*found.get((task.id, i), ([], []))) for i in range(len(task.test))]
        ranked[task.id] = [[c.grid for c in entry] for entry in candidates]
        for entry, reference in zip(candidates, published["ranking"][task.id], strict=True):
            expected = without_empty(reference["ranked"])
            assert [(grid_hash(c.grid), c.votes) for c in entry] == [(h, n) for h, n, _ in expected]
            assert [c.confidence for c in entry] == pytest.approx([q for *_, q in expected])
    for k in recorded["pass_Ks"]:
        ours = score(tasks, ranked, k).task_mean.value
        assert ours == pytest.approx(expected_metric(published, k))
        if not empty_decides(published, k):
            assert ours == pytest.approx(published["metrics"][f"ARC/pass@{k}"])


def expected_metric(published: dict[str, Any], k: int) -> float:
    """Return the published metric recomputed on the ranking without empty grids."""
    fractions = [
        np.mean([t["label_hash"] in [h for h, *_ in without_empty(t["ranked"])[:k]] for t in tests])
        for tests in published["ranking"].values()
    ]
    return float(np.mean(fractions))


def empty_decides(published: dict[str, Any], k: int) -> bool:
    """Return whether an empty grid pushes a correct answer out of the first k."""
    hashes = [
        (t["label_hash"], [h for h, *_ in t["ranked"]])
        for tests in published["ranking"].values()
        for t in tests
    ]
    return any(
        label in ranked and ranked.index(label) == k and EMPTY_HASH in ranked[:k]
        for label, ranked in hashes
    )


def test_recorded_cases_include_empty_grids_and_missing_predictions(
    recorded: dict[str, Any], tasks: list[Task]
) -> None:
    """The test above relies on these cases being present in the recording."""
    first = recorded["results"]["aggregated=False/pass1"]
    [only_empty] = first["ranking"]["f931b4a8"][1]["ranked"]
    assert only_empty[:2] == [EMPTY_HASH, 9], "nine empty grids should have won this vote"
    found = ballots(recorded, tasks, ["pass1"])
    assert vote(*found["f931b4a8", 1]) == []
    # The published code skips a test without predictions and shifts the rest; `score` does not.
    assert first["submission_lengths"]["d35bdbdc"] == 2
    assert ("d35bdbdc", 1) not in found
    [task] = [task for task in tasks if task.id == "d35bdbdc"]
    assert score([task], {}).outputs.denominator == 3
    # With pooled votes an empty grid ranks above a correct answer.
    pooled = recorded["results"]["aggregated=True/pass2"]
    assert empty_decides(pooled, 1)
    assert expected_metric(pooled, 1) > pooled["metrics"]["ARC/pass@1"]


def grid(colour: int) -> Grid:
    return np.full((1, 1), colour, np.uint8)


def result(candidates: list[Candidate]) -> list[tuple[int, int, float]]:
    return [(int(c.grid[0, 0]), c.votes, c.confidence) for c in candidates]


def test_ranking_is_by_votes_then_confidence_then_arrival() -> None:
    grids = [grid(c) for c in (1, 2, 2, 3, 4, 5)]
    assert result(vote(grids, [0.9, 0.1, 0.2, 0.5, 0.95, 0.5])) == [
        (2, 2, pytest.approx(0.15)),
        (4, 1, 0.95),
        (1, 1, 0.9),
        (3, 1, 0.5),
        (5, 1, 0.5),
    ]


def test_empty_grids_never_vote() -> None:
    assert vote([EMPTY, EMPTY], [1.0, 1.0]) == []
    assert result(vote([EMPTY, grid(3), EMPTY], [1.0, 0.1, 1.0])) == [(3, 1, 0.1)]
    assert vote([], []) == []


def test_equal_bytes_in_another_shape_are_a_different_candidate() -> None:
    row = np.zeros((1, 4), np.uint8)
    assert len(vote([row, row.reshape(2, 2), row.T], [0.5] * 3)) == 3


def test_halt_confidence_is_the_sigmoid_without_overflow() -> None:
    logits = np.array([-1000, -5, 0, 0.1, 2, 1000], np.float32)
    expected = [0.0, *(1 / (1 + np.exp(-np.float64(x))) for x in logits[1:5]), 1.0]
    with np.errstate(all="raise", under="ignore"):
        assert halt_confidence(logits) == pytest.approx(expected, abs=1e-15)
    assert halt_confidence(logits).dtype == np.float64
