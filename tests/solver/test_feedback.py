"""What each source says, when it stops, and that none but the oracle knows an answer."""

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


def seen(row: int, what: Grid, confidence: float = 0.5, least_confident: Any = ()) -> AttemptResult:
    return AttemptResult(
        row=row,
        tokens=np.zeros(900, np.uint8),
        grid=what,
        confidence=confidence,
        least_confident=least_confident,
    )


def config(**changes: Any) -> FeedbackConfig:
    return FeedbackConfig(**changes)


sides = st.integers(1, 6)
small = st.tuples(sides, sides, st.integers(0, 2**32 - 1)).map(
    lambda drawn: np.random.default_rng(drawn[2]).integers(0, 10, drawn[:2], dtype=np.uint8)
)
views = st.builds(
    lambda dihedral, colours: Augmentation(task="t", dihedral=dihedral, colours=(0, *colours)),
    st.integers(0, 7),
    st.permutations(range(1, 10)),
)


@given(small, st.integers(0, 20), st.data())
def test_feedback_names_wrong_cells_and_five_at_most(
    answer: Grid, most: int, data: st.DataObject
) -> None:
    predicted = answer.copy()
    for flat in data.draw(st.sets(st.integers(0, answer.size - 1))):
        predicted.flat[flat] = (predicted.flat[flat] + 1 + flat % 9) % 10
    wrong = int((predicted != answer).sum())
    text = describe_errors(predicted, answer, most)
    if not wrong:
        assert text == "right"
        return
    assert text.startswith(f"{wrong} wrong") and not text.endswith((" ", ":"))
    named = re.findall(r"r(\d+)c(\d+)=(\d) should be (\d)", text)
    assert len(named) == min(wrong, most, 5) == text.count("should")
    assert len(set(named)) == len(named)
    for r, c, was, should in (map(int, cell) for cell in named):
        assert predicted[r, c] == was != should == answer[r, c]


@given(small, small)
def test_of_a_wrong_size_only_the_size_is_said(predicted: Grid, answer: Grid) -> None:
    text = describe_errors(predicted, answer)
    if predicted.shape != answer.shape:
        (h, w), (a, b) = predicted.shape, answer.shape
        assert text == f"size {h}x{w} should be {a}x{b}"
    assert (text == "right") == np.array_equal(predicted, answer)


def test_of_no_grid_nothing_is_told() -> None:
    assert describe_errors(EMPTY, grid([1, 2])) == "no grid"


def test_nothing_says_nothing_and_never_stops() -> None:
    for number in range(1, 17):
        for feedback in NoFeedback()(number, [seen(0, grid([1]), 1.0), seen(1, EMPTY)]):
            assert feedback.text == "" and not feedback.stop


@given(st.floats(0, 1), st.floats(0, 1), small)
def test_confidence_goes_by_the_halt_head_alone(sure: float, threshold: float, what: Grid) -> None:
    judge = Confidence(config(threshold=threshold, cells=0))
    feedbacks = judge(3, [seen(0, what, sure), seen(7, EMPTY, sure)])
    assert [v.stop for v in feedbacks] == [sure > threshold] * 2
    assert {v.text for v in feedbacks} == {f"Try 3: {sure:.0%} sure"}


@pytest.mark.parametrize("cells", [0, 1, 5])
def test_confidence_names_the_least_sure_cells(cells: int) -> None:
    least_confident = ((0, 1, 4), (2, 0, 7), (1, 1, 0), (0, 0, 9), (2, 2, 3))
    [feedback] = Confidence(config(cells=cells))(1, [seen(0, grid([1]), 0.25, least_confident)])
    named = "".join(f" r{r}c{c}={colour}" for r, c, colour in least_confident[:cells])
    assert feedback.text == "Try 1: 25% sure" + (f", least{named}" if cells else "")


def same_or_other(rng: np.random.Generator, base: Grid) -> Grid:
    """The grid, the grid with some cells changed, one of another size, none."""
    kind = rng.integers(4)
    if kind == 0:
        changed = base.copy()
        changed.flat[rng.integers(base.size, size=2)] = rng.integers(10)
        return changed
    return (base, base, rng.integers(0, 10, (2, 7), dtype=np.uint8), EMPTY)[kind]


@given(small, st.lists(views, min_size=2, max_size=5), st.integers(0, 2**32 - 1))
def test_a_vote_compares_in_the_tasks_frame_and_speaks_in_the_rows(
    base: Grid, frames: list[Augmentation], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    mine = [same_or_other(rng, base) for _ in frames]
    judge = Vote(config(threshold=0.5, cells=5), [0] * len(frames), frames)
    rows = [seen(n, view.apply(g)) for n, (view, g) in enumerate(zip(frames, mine, strict=True))]
    for one, feedback, view in zip(rows, judge(2, rows), frames, strict=True):
        plain = mine[one.row]
        agree = sum(np.array_equal(plain, other) for other in mine)
        assert feedback.text.startswith(f"Try 2: {agree} of {len(mine)} views agree")
        assert feedback.stop == (plain.size > 0 and agree / len(mine) > 0.5)
        differ = sum(((plain != o).astype(int) for o in mine if o.shape == plain.shape), 0)
        named = [tuple(map(int, cell)) for cell in CELL.findall(feedback.text)]
        # Where each cell of the row's frame is in the task's.
        origin = DIHEDRAL[view.dihedral](np.arange(plain.size).reshape(plain.shape))
        assert all(one.grid[r, c] == colour for r, c, colour in named)
        counts = [int(differ.flat[origin[r, c]]) for r, c, _ in named]
        ranked = sorted((int(n) for n in np.ravel(differ) if n > 0), reverse=True)
        assert counts == ranked[:5]


def test_stopped_rows_still_vote() -> None:
    frame = Augmentation(task="t")
    judge = Vote(config(threshold=0.6), [0, 0, 0], [frame] * 3)
    a, b = grid([1, 2]), grid([1, 3])
    judge(1, [seen(0, a), seen(1, a), seen(2, b)])
    [late] = judge(2, [seen(2, b)])
    assert late.text == "Try 2: 1 of 3 views agree, differ r0c1=3" and not late.stop
    [late] = judge(3, [seen(2, a)])
    assert late.text == "Try 3: 3 of 3 views agree" and late.stop


def test_only_views_of_the_same_test_vote() -> None:
    frame = Augmentation(task="t")
    judge = Vote(config(threshold=0.6), [0, 1, 0, 1, 2], [frame] * 5)
    a, b = grid([1, 2]), grid([9])
    feedbacks = judge(1, [seen(n, g) for n, g in enumerate((a, b, a, a, b))])
    assert [v.stop for v in feedbacks] == [True, False, True, False, False]
    assert [v.text.split(": ")[1].split(" views")[0] for v in feedbacks] == [
        "2 of 2",
        "1 of 2",
        "2 of 2",
        "1 of 2",
        "1 of 1",
    ]


def test_views_that_all_draw_nothing_do_not_agree_to_stop() -> None:
    judge = Vote(config(threshold=0), [0, 0], [Augmentation(task="t", dihedral=d) for d in (1, 6)])
    assert not any(v.stop for v in judge(1, [seen(0, EMPTY), seen(1, EMPTY)]))


def test_demos_looks_at_the_held_out_row_alone() -> None:
    """Rows 0, 2 ask; rows 1, 3 try the rule on the held-out pair, each in its own view."""
    outputs = {1: grid([1, 2]), 3: grid([2], [1])}
    judge = Demos(config(cells=2), [1, 1, 3, 3], outputs)
    anything = [grid([7]), EMPTY]
    for what in anything:
        feedbacks = judge(
            1, [seen(0, what), seen(1, grid([1, 2])), seen(2, what), seen(3, grid([2], [5]))]
        )
        assert [v.stop for v in feedbacks] == [True, True, False, False]
        assert {v.text for v in feedbacks[:2]} == {"Try 1: on a held-out example right"}
        wrong = "Try 1: on a held-out example 1 wrong: r1c0=5 should be 1"
        assert {v.text for v in feedbacks[2:]} == {wrong}
    [_, hopeless] = judge(2, [seen(2, grid([7])), seen(3, EMPTY)])
    assert hopeless.text == "Try 2: on a held-out example no grid" and not hopeless.stop


def test_the_oracle_stops_when_it_is_right_and_names_five_cells_at_most() -> None:
    answers = [np.zeros((3, 4), np.uint8)] * 2
    asked = config(cells=5)
    object.__setattr__(asked, "cells", 12)  # no config can ask for more
    judge = Oracle(asked, answers)
    right, wrong = judge(4, [seen(1, answers[1]), seen(0, answers[0] + np.uint8(1))])
    assert right.text == "Try 4: right" and right.stop
    assert wrong.text.startswith("Try 4: 12 wrong: ") and not wrong.stop
    assert wrong.text.count("should be") == 5
    with pytest.raises(ValueError, match="cells must be at most 5"):
        config(cells=6)


def test_no_source_but_the_oracle_can_be_given_an_answer() -> None:
    takes = {
        kind.__name__: list(inspect.signature(kind).parameters)
        for kind in (NoFeedback, Confidence, Vote, Demos, Oracle)
    }
    assert takes == {
        "NoFeedback": [],
        "Confidence": ["config"],
        "Vote": ["config", "tests", "views"],
        "Demos": ["config", "partner", "outputs"],  # of rows that ask a demonstration
        "Oracle": ["config", "answers"],
    }
    assert set(AttemptResult.__dataclass_fields__) == {
        "row",
        "tokens",
        "grid",
        "confidence",
        "least_confident",
    }


def judge_of(source: str, drawn: Sequence[Grid], sure: float = 0.5) -> Any:
    frames = [Augmentation(task="t", dihedral=n) for n in range(4)]
    return {
        "none": lambda: NoFeedback(),
        "confidence": lambda: Confidence(config(threshold=sure)),
        "vote": lambda: Vote(config(threshold=0.4), [0, 0, 1, 1], frames),
        "demos": lambda: Demos(config(), [1, 1, 3, 3], {1: drawn[1], 3: grid([1])}),
    }[source]()


@pytest.mark.parametrize("source", ["none", "confidence", "vote", "demos"])
def test_labels_reach_no_verdict(case_of: Cases, source: str) -> None:
    case = case_of(rows=4, shaken=True)
    with torch.no_grad():
        [first] = attempts(case.solver, case.begin(), NoFeedback(), most=1, history=1)
    drawn = [one.grid for one in first.seen]
    sure = float(np.median([one.confidence for one in first.seen]))
    found = []
    for seed in (None, 0, 1):
        if seed is not None:
            draw = torch.Generator().manual_seed(seed)
            garbage = torch.randint(-100, 12, (4, 16), generator=draw, dtype=torch.int32)
            case.batch["labels"] = garbage
        with torch.no_grad():
            rows, judge = case.begin(), judge_of(source, drawn, sure)
            found.append(list(attempts(case.solver, rows, judge, most=4, history=2)))
    if source in ("confidence", "demos"):
        counts = {len(one.seen) for one in found[0]}
        assert len(counts) > 1, "all rows stop at once: this shows little"
    for other in found[1:]:
        assert len(other) == len(found[0])
        for a, b in zip(found[0], other, strict=True):
            assert a.feedbacks == b.feedbacks and a.rows.histories == b.rows.histories
            assert torch.equal(a.outputs.logits, b.outputs.logits)
            assert torch.equal(a.rows.numbers, b.rows.numbers)


@pytest.mark.parametrize("number", [1, 16])
def test_a_row_without_a_grid_breaks_no_source(number: int) -> None:
    rows = [seen(n, EMPTY) for n in range(4)]
    for judge in (
        *(judge_of(source, [grid([1])] * 4) for source in ("none", "confidence", "vote", "demos")),
        Oracle(config(), [grid([1])] * 4),
    ):
        feedbacks = judge(number, rows)
        assert len(feedbacks) == 4 and not any(v.stop for v in feedbacks)
