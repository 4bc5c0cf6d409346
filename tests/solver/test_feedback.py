"""Feedback sources: text, stopping, and that only the oracle depends on answers."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hybrid.arc import DIHEDRAL, Augmentation, Grid
from hybrid.solver import (
    AttemptResult,
    Confidence,
    Demos,
    FeedbackConfig,
    NoFeedback,
    Oracle,
    Vote,
    attempts,
    describe_errors,
)

Cases = Callable[..., Any]
EMPTY = np.zeros((0, 0), np.uint8)
CELL = re.compile(r"r(\d+)c(\d+)=(\d)")


def grid(*rows: list[int]) -> Grid:
    return np.array(rows, np.uint8)


def result(
    row: int, predicted: Grid, confidence: float = 0.5, least_confident: Any = ()
) -> AttemptResult:
    return AttemptResult(
        row=row,
        tokens=np.zeros(900, np.uint8),
        grid=predicted,
        confidence=confidence,
        least_confident=least_confident,
    )


def config(**changes: Any) -> FeedbackConfig:
    return FeedbackConfig(**changes)


sides = st.integers(1, 6)
small = st.tuples(sides, sides, st.integers(0, 2**32 - 1)).map(
    lambda drawn: np.random.default_rng(drawn[2]).integers(0, 10, drawn[:2], dtype=np.uint8)
)
variants = st.builds(
    lambda dihedral, colours: Augmentation(task="t", dihedral=dihedral, colours=(0, *colours)),
    st.integers(0, 7),
    st.permutations(range(1, 10)),
)


@given(small, st.integers(0, 20), st.data())
def test_describe_errors_lists_wrong_cells_and_five_at_most(
    answer: Grid, max_cells: int, data: st.DataObject
) -> None:
    predicted = answer.copy()
    for flat in data.draw(st.sets(st.integers(0, answer.size - 1))):
        predicted.flat[flat] = (predicted.flat[flat] + 1 + flat % 9) % 10
    wrong = int((predicted != answer).sum())
    text = describe_errors(predicted, answer, max_cells)
    if not wrong:
        assert text == "right"
        return
    assert text.startswith(f"{wrong} wrong") and not text.endswith((" ", ":"))
    listed = re.findall(r"r(\d+)c(\d+)=(\d) should be (\d)", text)
    assert len(listed) == min(wrong, max_cells, 5) == text.count("should")
    assert len(set(listed)) == len(listed)
    for r, c, was, should in (map(int, cell) for cell in listed):
        assert predicted[r, c] == was != should == answer[r, c]


@given(small, small)
def test_describe_errors_reports_only_the_size_if_it_is_wrong(
    predicted: Grid, answer: Grid
) -> None:
    text = describe_errors(predicted, answer)
    if predicted.shape != answer.shape:
        (h, w), (a, b) = predicted.shape, answer.shape
        assert text == f"size {h}x{w} should be {a}x{b}"
    assert (text == "right") == np.array_equal(predicted, answer)


def test_describe_errors_reports_a_missing_grid() -> None:
    assert describe_errors(EMPTY, grid([1, 2])) == "no grid"


def test_no_feedback_is_empty_and_never_stops() -> None:
    for number in range(1, 17):
        for feedback in NoFeedback()(number, [result(0, grid([1]), 1.0), result(1, EMPTY)]):
            assert feedback.text == "" and not feedback.stop


@given(st.floats(0, 1), st.floats(0, 1), small)
def test_confidence_depends_only_on_the_halt_head(
    sure: float, threshold: float, predicted: Grid
) -> None:
    source = Confidence(config(threshold=threshold, cells=0))
    feedbacks = source(3, [result(0, predicted, sure), result(7, EMPTY, sure)])
    assert [f.stop for f in feedbacks] == [sure > threshold] * 2
    assert {f.text for f in feedbacks} == {f"Try 3: {sure:.0%} sure"}


@pytest.mark.parametrize("cells", [0, 1, 5])
def test_confidence_lists_the_least_confident_cells(cells: int) -> None:
    least_confident = ((0, 1, 4), (2, 0, 7), (1, 1, 0), (0, 0, 9), (2, 2, 3))
    [feedback] = Confidence(config(cells=cells))(1, [result(0, grid([1]), 0.25, least_confident)])
    listed = "".join(f" r{r}c{c}={colour}" for r, c, colour in least_confident[:cells])
    assert feedback.text == "Try 1: 25% sure" + (f", least{listed}" if cells else "")


def same_or_other(rng: np.random.Generator, base: Grid) -> Grid:
    """Return the grid, a copy with changed cells, a grid of another size, or an empty one."""
    kind = rng.integers(4)
    if kind == 0:
        changed = base.copy()
        changed.flat[rng.integers(base.size, size=2)] = rng.integers(10)
        return changed
    return (base, base, rng.integers(0, 10, (2, 7), dtype=np.uint8), EMPTY)[kind]


@given(small, st.lists(variants, min_size=2, max_size=5), st.integers(0, 2**32 - 1))
def test_vote_compares_in_the_task_frame_and_reports_in_the_row_frame(
    base: Grid, frames: list[Augmentation], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    grids = [same_or_other(rng, base) for _ in frames]
    source = Vote(config(threshold=0.5, cells=5), [0] * len(frames), frames)
    applied = (frame.apply(g) for frame, g in zip(frames, grids, strict=True))
    results = [result(n, g) for n, g in enumerate(applied)]
    for one, feedback, frame in zip(results, source(2, results), frames, strict=True):
        own = grids[one.row]
        agree = sum(np.array_equal(own, other) for other in grids)
        assert feedback.text.startswith(f"Try 2: {agree} of {len(grids)} views agree")
        assert feedback.stop == (own.size > 0 and agree / len(grids) > 0.5)
        differ = sum(((own != o).astype(int) for o in grids if o.shape == own.shape), 0)
        listed = [tuple(map(int, cell)) for cell in CELL.findall(feedback.text)]
        # Index in the task's frame of each cell of the row's frame.
        origin = DIHEDRAL[frame.dihedral](np.arange(own.size).reshape(own.shape))
        assert all(one.grid[r, c] == colour for r, c, colour in listed)
        counts = [int(differ.flat[origin[r, c]]) for r, c, _ in listed]
        ranked = sorted((int(n) for n in np.ravel(differ) if n > 0), reverse=True)
        assert counts == ranked[:5]


def test_stopped_rows_still_vote() -> None:
    frame = Augmentation(task="t")
    source = Vote(config(threshold=0.6), [0, 0, 0], [frame] * 3)
    a, b = grid([1, 2]), grid([1, 3])
    source(1, [result(0, a), result(1, a), result(2, b)])
    [late] = source(2, [result(2, b)])
    assert late.text == "Try 2: 1 of 3 views agree, differ r0c1=3" and not late.stop
    [late] = source(3, [result(2, a)])
    assert late.text == "Try 3: 3 of 3 views agree" and late.stop


def test_only_variants_of_the_same_test_vote() -> None:
    frame = Augmentation(task="t")
    source = Vote(config(threshold=0.6), [0, 1, 0, 1, 2], [frame] * 5)
    a, b = grid([1, 2]), grid([9])
    feedbacks = source(1, [result(n, g) for n, g in enumerate((a, b, a, a, b))])
    assert [f.stop for f in feedbacks] == [True, False, True, False, False]
    assert [f.text.split(": ")[1].split(" views")[0] for f in feedbacks] == [
        "2 of 2",
        "1 of 2",
        "2 of 2",
        "1 of 2",
        "1 of 1",
    ]


def test_empty_grids_do_not_agree_to_stop() -> None:
    source = Vote(config(threshold=0), [0, 0], [Augmentation(task="t", dihedral=d) for d in (1, 6)])
    assert not any(f.stop for f in source(1, [result(0, EMPTY), result(1, EMPTY)]))


def test_demos_depends_only_on_the_held_out_row() -> None:
    """Rows 0 and 2 are tests; rows 1 and 3 are the held-out demonstration in two variants."""
    outputs = {1: grid([1, 2]), 3: grid([2], [1])}
    source = Demos(config(cells=2), [1, 1, 3, 3], outputs)
    for any_grid in (grid([7]), EMPTY):
        predicted = (any_grid, grid([1, 2]), any_grid, grid([2], [5]))
        feedbacks = source(1, [result(n, g) for n, g in enumerate(predicted)])
        assert [f.stop for f in feedbacks] == [True, True, False, False]
        assert {f.text for f in feedbacks[:2]} == {"Try 1: on a held-out example right"}
        wrong = "Try 1: on a held-out example 1 wrong: r1c0=5 should be 1"
        assert {f.text for f in feedbacks[2:]} == {wrong}
    [_, empty] = source(2, [result(2, grid([7])), result(3, EMPTY)])
    assert empty.text == "Try 2: on a held-out example no grid" and not empty.stop


def test_oracle_stops_if_right_and_lists_five_cells_at_most() -> None:
    answers = [np.zeros((3, 4), np.uint8)] * 2
    invalid = config(cells=5)
    object.__setattr__(invalid, "cells", 12)  # the constructor would raise
    source = Oracle(invalid, answers)
    right, wrong = source(4, [result(1, answers[1]), result(0, answers[0] + np.uint8(1))])
    assert right.text == "Try 4: right" and right.stop
    assert wrong.text.startswith("Try 4: 12 wrong: ") and not wrong.stop
    assert wrong.text.count("should be") == 5
    with pytest.raises(ValueError, match="cells must be at most 5"):
        config(cells=6)


def test_only_the_oracle_takes_answers() -> None:
    parameters = {
        kind.__name__: list(inspect.signature(kind).parameters)
        for kind in (NoFeedback, Confidence, Vote, Demos, Oracle)
    }
    assert parameters == {
        "NoFeedback": [],
        "Confidence": ["config"],
        "Vote": ["config", "tests", "variants"],
        "Demos": ["config", "partner", "outputs"],  # of held-out demonstrations
        "Oracle": ["config", "answers"],
    }
    assert set(AttemptResult.__dataclass_fields__) == {
        "row",
        "tokens",
        "grid",
        "confidence",
        "least_confident",
    }


def source_of(kind: str, drawn: Sequence[Grid], sure: float = 0.5) -> Any:
    frames = [Augmentation(task="t", dihedral=n) for n in range(4)]
    return {
        "none": lambda: NoFeedback(),
        "confidence": lambda: Confidence(config(threshold=sure)),
        "vote": lambda: Vote(config(threshold=0.4), [0, 0, 1, 1], frames),
        "demos": lambda: Demos(config(), [1, 1, 3, 3], {1: drawn[1], 3: grid([1])}),
    }[kind]()


@pytest.mark.parametrize("kind", ["none", "confidence", "vote", "demos"])
def test_feedback_does_not_depend_on_labels(case_of: Cases, kind: str) -> None:
    case = case_of(rows=4, perturbed=True)
    with torch.no_grad():
        [first] = attempts(
            case.model, case.initial_state(), NoFeedback(), max_attempts=1, history=1
        )
    drawn = [one.grid for one in first.results]
    sure = float(np.median([one.confidence for one in first.results]))
    runs = []
    for seed in (None, 0, 1):
        if seed is not None:
            draw = torch.Generator().manual_seed(seed)
            garbage = torch.randint(-100, 12, (4, 16), generator=draw, dtype=torch.int32)
            case.batch["labels"] = garbage
        with torch.no_grad():
            state, source = case.initial_state(), source_of(kind, drawn, sure)
            runs.append(list(attempts(case.model, state, source, max_attempts=4, history=2)))
    if kind in ("confidence", "demos"):
        counts = {len(attempt.results) for attempt in runs[0]}
        assert len(counts) > 1, "all rows stop at the same attempt: the test is too weak"
    for other in runs[1:]:
        assert len(other) == len(runs[0])
        for a, b in zip(runs[0], other, strict=True):
            assert a.feedbacks == b.feedbacks and a.state.histories == b.state.histories
            assert torch.equal(a.outputs.logits, b.outputs.logits)
            assert torch.equal(a.state.row_indices, b.state.row_indices)


@pytest.mark.parametrize("number", [1, 16])
def test_every_source_accepts_rows_without_a_grid(number: int) -> None:
    results = [result(n, EMPTY) for n in range(4)]
    for source in (
        *(source_of(kind, [grid([1])] * 4) for kind in ("none", "confidence", "vote", "demos")),
        Oracle(config(), [grid([1])] * 4),
    ):
        feedbacks = source(number, results)
        assert len(feedbacks) == 4 and not any(f.stop for f in feedbacks)
