"""The loop: an untrained hybrid is the TRM, rows leave and nobody notices, grids are read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hybrid.arc import Task, tokenize_grid
from hybrid.solver import Attempt, AttemptResult, Feedback, NoFeedback, attempts, read_out
from hybrid.solver.model import read_predictions
from hybrid.trm import Outputs

Cases = Callable[..., Any]


class Script:
    """Row r stops from attempt `after[r]` on; every line says whose it is."""

    def __init__(self, *after: int, silent: int = 0) -> None:
        self.after, self.silent = after, silent

    def __call__(self, number: int, seen: Sequence[AttemptResult]) -> list[Feedback]:
        return [
            Feedback(
                text="" if number == self.silent else f"Try {number}: row {one.row}",
                stop=number >= self.after[one.row],
            )
            for one in seen
        ]


def run(case: Any, judge: Any, most: int, **how: Any) -> list[Attempt]:
    kept = how.pop("kept", None)
    with torch.no_grad():
        made = attempts(case.solver, case.begin(kept), judge, most=most, **{"history": 1, **how})
        return list(made)


def by_row(made: Sequence[Attempt]) -> dict[tuple[int, int], Tensor]:
    """Logits by (row, attempt)."""
    return {
        (row, one.number): one.outputs.logits[n]
        for one in made
        for n, row in enumerate(one.rows.numbers.tolist())
    }


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], dict[str, list[Any]]]:
    """What reader and TRM are given, call by call."""

    def watch(case: Any) -> dict[str, list[Any]]:
        calls: dict[str, list[Any]] = {"recurse": [], "read": []}
        recurse, read = case.solver.trm.recurse, case.solver.reader.read

        def thinking(current: Any, z_H: Tensor, z_L: Tensor, **more: Any) -> Any:
            sizes = {len(z_H), len(z_L), *map(len, current.values()), len(more["puzzle_rows"])}
            calls["recurse"].append(sizes)
            return recurse(current, z_H, z_L, **more)

        def reading(encoding: Any, latent: Tensor, histories: Any, recompute: bool) -> Any:
            assert len(encoding) == len(latent) == len(histories)
            calls["read"].append(histories)
            return read(encoding, latent, histories, recompute)

        monkeypatch.setattr(case.solver.trm, "recurse", thinking)
        monkeypatch.setattr(case.solver.reader, "read", reading)
        return calls

    return watch


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("inject", ["none", "carry", "input", "both"])
def test_an_untrained_hybrid_is_the_trm_bit_for_bit(
    case_of: Cases, inject: str, steps: int, dtype: str
) -> None:
    case = case_of(inject=inject, act_steps=steps, forward_dtype=dtype)
    trm, draw = case.solver.trm, torch.Generator().manual_seed(4)
    with torch.no_grad():
        for weight in trm.parameters():  # a trained TRM
            weight.add_(0.05 * torch.randn(weight.shape, generator=draw, dtype=weight.dtype))
    if dtype != "float64":
        case.solver.float()
    case.solver.eval()
    batch = {"inputs": case.batch["inputs"]}
    carry, alone = trm.initial_carry(batch), []
    with torch.no_grad():
        for _ in range(3 * steps):
            carry, outputs = trm.act_step(carry, batch, puzzle_rows=case.puzzle_rows)
            alone.append(outputs)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            made = list(attempts(case.solver, case.begin(), NoFeedback(), most=3, history=1))
        assert [one.number for one in made] == [1, 2, 3]
        for one in made:
            wanted = alone[one.number * steps - 1]
            assert torch.equal(one.outputs.logits, wanted.logits)
            assert torch.equal(one.outputs.q_halt, wanted.q_halt)
        assert torch.equal(made[-1].rows.z_H, carry.z_H)
        assert torch.equal(made[-1].rows.z_L, carry.z_L)


@pytest.mark.parametrize("inject", ["carry", "input", "both"])
def test_a_trained_one_is_not(case_of: Cases, inject: str) -> None:
    """Each attempt hears of the one before it: its latent, and what was said of it."""
    case = case_of(inject=inject, shaken=True)
    silent = run(case, NoFeedback(), 2)
    alone = run(case_of(inject="none", shaken=True), NoFeedback(), 2)
    told = run(case, Script(9, 9, 9), 2)
    gap = [
        [
            float((a.outputs.logits - b.outputs.logits).abs().max())
            for a, b in zip(x, y, strict=True)
        ]
        for x, y in ((silent, alone), (silent, told))
    ]
    assert min(gap[0]) > 1e-3 and gap[1][0] == 0 and gap[1][1] > 1e-3


def test_rows_that_stop_cost_nothing_more(case_of: Cases, spy: Any) -> None:
    case = case_of(rows=4, shaken=True, act_steps=2)
    calls = spy(case)
    made = run(case, Script(2, 1, 4, 2), 6)
    assert [one.rows.numbers.tolist() for one in made] == [[0, 1, 2, 3], [0, 2, 3], [2], [2]]
    assert calls["recurse"] == [{4}, {4}, {3}, {3}, {1}, {1}, {1}, {1}]
    assert [len(lines) for lines in calls["read"]] == [4, 3, 1, 1]
    assert [one.ended.tolist() for one in made] == [
        [False, True, False, False],
        [True, False, True],
        [False],
        [True],
    ]
    assert [one.cut for one in made] == [False, False, False, True]
    assert [[s.row for s in one.seen] for one in made] == [[0, 1, 2, 3], [0, 2, 3], [2], [2]]
    for one in made:
        labels = case.batch["labels"][one.rows.numbers]
        assert torch.equal(one.rows.current["labels"], labels)
    tokens = [one.reading.llm_tokens for one in made]
    assert [len(spent) for spent in tokens] == [4, 3, 1, 1]
    assert all(min(spent) > 0 for spent in tokens) and tokens[2] == tokens[3] == tokens[1][1:2]


@pytest.mark.parametrize("llama", [{}, {"prefix": "problem"}, {"max_new_tokens": 4}])
def test_the_others_do_not_notice(case_of: Cases, llama: dict[str, Any]) -> None:
    case = case_of(rows=4, shaken=True, llama=llama)
    left = by_row(run(case, Script(1, 4, 2, 3), 4))
    stayed = by_row(run(case, Script(9, 9, 9, 9), 4))
    assert len(left) == 10 and len(stayed) == 16
    for key, logits in left.items():
        torch.testing.assert_close(logits, stayed[key], rtol=0, atol=1e-10)


def test_the_order_of_rows_does_not_matter(case_of: Cases) -> None:
    case = case_of(rows=4, shaken=True)
    after = (1, 4, 2, 3)
    here, order = by_row(run(case, Script(*after), 4)), [2, 0, 3, 1]

    class Elsewhere(Script):
        def __call__(self, number: int, seen: Sequence[AttemptResult]) -> list[Feedback]:
            return [
                Feedback(text=f"Try {number}: row {order[s.row]}", stop=number >= self.after[s.row])
                for s in seen
            ]

    there = by_row(run(case, Elsewhere(*(after[n] for n in order)), 4, kept=order))
    assert len(here) == len(there) == 10
    for (row, number), logits in there.items():
        torch.testing.assert_close(logits, here[order[row], number], rtol=0, atol=1e-10)


def test_least_keeps_a_row_going(case_of: Cases) -> None:
    case = case_of()
    made = run(case, Script(1, 1, 2), 5, least=[1, 3, 1])
    assert [one.rows.numbers.tolist() for one in made] == [[0, 1, 2], [1, 2], [1]]
    assert [one.ended.tolist() for one in made] == [[True, False, False], [False, True], [True]]
    # The judge's word is written down as it was.
    assert [[v.stop for v in one.feedbacks] for one in made] == [
        [True, True, False],
        [True, True],
        [True],
    ]
    assert len(run(case, Script(1, 1, 1), 2, least=[9, 9, 9])) == 2


@pytest.mark.parametrize("bptt", [None, 1, 2, 3])
def test_the_graph_is_cut_after_every_window_and_at_the_end(
    case_of: Cases, bptt: int | None
) -> None:
    made = run(case_of(), Script(2, 5, 9), 8, bptt=bptt)
    assert [one.cut for one in made] == [
        bptt is not None and n % bptt == 0 for n in range(1, 8)
    ] + [True]
    early = run(case_of(), Script(2, 3, 3), 8, bptt=bptt)
    assert len(early) == 3 and early[-1].cut and early[-1].ended.all()


@pytest.mark.parametrize("history", [0, 1, 2, 9])
def test_the_text_speaks_of_the_newest_attempts(case_of: Cases, spy: Any, history: int) -> None:
    case = case_of(rows=2)
    calls = spy(case)
    run(case, Script(9, 3, silent=2), 5, history=history)
    lines = ["Try 1", "Try 3", "Try 4"]  # of attempt 2 nothing was said
    spoken = [0, 1, 1, 2, 3]
    for number, (heard, said) in enumerate(zip(calls["read"], spoken, strict=True), 1):
        kept = lines[:said][-history:] if history else []
        wanted = [tuple(f"{line}: row {row}" for line in kept) for row in (0, 1)]
        assert list(heard) == (wanted if number <= 3 else wanted[:1])


def test_nobody_reads_for_a_trm_alone(case_of: Cases, spy: Any) -> None:
    case = case_of(inject="none")
    calls = spy(case)
    made = run(case, Script(1, 2, 2), 3)
    assert calls["read"] == [] and len(calls["recurse"]) == 2
    assert made[0].reading.hidden is None and made[0].reading.latent is None
    assert made[0].reading.llm_tokens == [0] * 3 and made[0].reading.reasoning == [""] * 3


def test_reasoning_is_counted_and_kept(case_of: Cases) -> None:
    plain, wordy = (case_of(shaken=True, llama={"max_new_tokens": n}) for n in (0, 5))
    [without], [with_] = (run(case, NoFeedback(), 1) for case in (plain, wordy))
    assert without.reading.reasoning == [""] * 3 and any(with_.reading.reasoning)
    pairs = zip(without.reading.llm_tokens, with_.reading.llm_tokens, strict=True)
    assert all(few < many for few, many in pairs)


def said(case: Any, grids: Sequence[Any], offsets: Sequence[Any], canvas: int) -> Outputs:
    """Outputs that draw these grids, all cells equally sure."""
    tokens = [tokenize_grid(g, canvas, o) for g, o in zip(grids, offsets, strict=True)]
    logits = 4.0 * torch.nn.functional.one_hot(torch.from_numpy(np.stack(tokens)).long(), 12)
    halt = torch.linspace(-2, 2, len(grids))
    return Outputs(logits=logits, q_halt=halt, q_continue=halt, puzzle_rows=None)


def test_a_moved_row_is_read_where_its_input_stands(case_of: Cases, arc1: dict[str, Task]) -> None:
    offsets = [(2, 1), (3, 3), (0, 2), (1, 0)]
    case = case_of(rows=4, canvas=6, offsets=offsets)
    answers = [arc1[t].test[0].output for t in ("0d3d703e", "27a28665", "74dd1130", "66e6c45b")]
    outputs = said(case, answers, offsets, 6)
    # Cells (2, 0) and (1, 2) of the first grid are in doubt, the first one more.
    view = outputs.logits.view(4, 6, 6, 12)
    view[0, 4, 1] *= 0.1
    view[0, 3, 3] *= 0.5
    view[0, 0, 0] *= 0.01  # outside of the grid
    seen = read_predictions(case.begin(), outputs)
    for number, (one, answer) in enumerate(zip(seen, answers, strict=True)):
        assert one.row == number and np.array_equal(one.grid, answer)
        assert np.array_equal(one.tokens, outputs.logits[number].argmax(-1))
        assert one.confidence == pytest.approx(float(outputs.q_halt[number].sigmoid()))
        assert len(one.least_confident) == min(5, answer.size)
        assert all(answer[r, c] == colour for r, c, colour in one.least_confident)
    assert [(r, c) for r, c, _ in seen[0].least_confident[:2]] == [(2, 0), (1, 2)]


def test_an_input_that_begins_with_black_has_its_corner_there() -> None:
    grid = np.array([[0, 3], [4, 0], [0, 0]], np.uint8)
    tokens = tokenize_grid(grid, 5, (1, 2))
    found, corner = read_out(tokens, tokens)
    assert corner == (1, 2) and np.array_equal(found, grid)


def test_a_prediction_without_a_grid_is_empty(case_of: Cases) -> None:
    case = case_of(offsets=[(1, 1), (0, 1), (1, 0)])
    logits = torch.zeros(3, 16, 12)
    logits[0, :, 0] = logits[1, :, 1] = 1  # all PAD, all EOS
    logits[2, :, 0] = 1
    logits[2, 0, 5] = 2  # one colour, above and left of where the grid would be
    halt = torch.zeros(3)
    outputs = Outputs(logits=logits, q_halt=halt, q_continue=halt, puzzle_rows=None)
    for one in read_predictions(case.begin(), outputs):
        assert one.grid.shape == (0, 0) and one.least_confident == ()
