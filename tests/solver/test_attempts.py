"""The attempt loop: equality with the TRM, early stopping, feedback history, extracted grids."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hybrid.arc import Task, tokenize_grid
from hybrid.solver import Attempt, AttemptResult, Feedback, NoFeedback, attempts, extract_grid
from hybrid.solver.model import read_predictions
from hybrid.trm import Outputs

Cases = Callable[..., Any]


class Scripted:
    """Feedback source: row r stops from attempt `after[r]` on; the text names attempt and row."""

    def __init__(self, *after: int, empty: int = 0) -> None:
        self.after, self.empty = after, empty

    def __call__(self, number: int, results: Sequence[AttemptResult]) -> list[Feedback]:
        return [
            Feedback(
                text="" if number == self.empty else f"Try {number}: row {result.row}",
                stop=number >= self.after[result.row],
            )
            for result in results
        ]


def run(case: Any, source: Any, max_attempts: int, **options: Any) -> list[Attempt]:
    state = case.initial_state(options.pop("rows", None))
    options = {"max_attempts": max_attempts, "history": 1, **options}
    with torch.no_grad():
        return list(attempts(case.model, state, source, **options))


def by_row(made: Sequence[Attempt]) -> dict[tuple[int, int], Tensor]:
    """Return the logits by (row, attempt)."""
    return {
        (row, attempt.number): attempt.outputs.logits[n]
        for attempt in made
        for n, row in enumerate(attempt.state.row_indices.tolist())
    }


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], dict[str, list[Any]]]:
    """Return a function that records the arguments of every call to the reader and the TRM."""

    def watch(case: Any) -> dict[str, list[Any]]:
        calls: dict[str, list[Any]] = {"recurse": [], "read": []}
        recurse, read = case.model.trm.recurse, case.model.reader.read

        def record_recurse(current: Any, z_H: Tensor, z_L: Tensor, **more: Any) -> Any:
            sizes = {len(z_H), len(z_L), *map(len, current.values()), len(more["puzzle_rows"])}
            calls["recurse"].append(sizes)
            return recurse(current, z_H, z_L, **more)

        def record_read(cache: Any, latent: Tensor, histories: Any, recompute: bool) -> Any:
            assert len(cache) == len(latent) == len(histories)
            calls["read"].append(histories)
            return read(cache, latent, histories, recompute)

        monkeypatch.setattr(case.model.trm, "recurse", record_recurse)
        monkeypatch.setattr(case.model.reader, "read", record_read)
        return calls

    return watch


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("inject", ["none", "carry", "input", "both"])
def test_untrained_hybrid_matches_the_trm_bit_for_bit(
    case_of: Cases, inject: str, steps: int, dtype: str
) -> None:
    case = case_of(inject=inject, act_steps=steps, forward_dtype=dtype)
    trm, draw = case.model.trm, torch.Generator().manual_seed(4)
    with torch.no_grad():
        for weight in trm.parameters():  # a trained TRM
            weight.add_(0.05 * torch.randn(weight.shape, generator=draw, dtype=weight.dtype))
    if dtype != "float64":
        case.model.float()
    case.model.eval()
    batch = {"inputs": case.batch["inputs"]}
    carry, alone = trm.initial_carry(batch), []
    with torch.no_grad():
        for _ in range(3 * steps):
            carry, outputs = trm.act_step(carry, batch, puzzle_rows=case.puzzle_rows)
            alone.append(outputs)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            state = case.initial_state()
            made = list(attempts(case.model, state, NoFeedback(), max_attempts=3, history=1))
        assert [attempt.number for attempt in made] == [1, 2, 3]
        for attempt in made:
            expected = alone[attempt.number * steps - 1]
            assert torch.equal(attempt.outputs.logits, expected.logits)
            assert torch.equal(attempt.outputs.q_halt, expected.q_halt)
        assert torch.equal(made[-1].state.z_H, carry.z_H)
        assert torch.equal(made[-1].state.z_L, carry.z_L)


@pytest.mark.parametrize("inject", ["carry", "input", "both"])
def test_trained_hybrid_depends_on_latent_and_feedback(case_of: Cases, inject: str) -> None:
    case = case_of(inject=inject, perturbed=True)
    without_feedback = run(case, NoFeedback(), 2)
    trm_alone = run(case_of(inject="none", perturbed=True), NoFeedback(), 2)
    with_feedback = run(case, Scripted(9, 9, 9), 2)
    gap = [
        [
            float((a.outputs.logits - b.outputs.logits).abs().max())
            for a, b in zip(x, y, strict=True)
        ]
        for x, y in ((without_feedback, trm_alone), (without_feedback, with_feedback))
    ]
    assert min(gap[0]) > 1e-3 and gap[1][0] == 0 and gap[1][1] > 1e-3


def test_stopped_rows_leave_the_batch(case_of: Cases, spy: Any) -> None:
    case = case_of(rows=4, perturbed=True, act_steps=2)
    calls = spy(case)
    made = run(case, Scripted(2, 1, 4, 2), 6)
    assert [attempt.state.row_indices.tolist() for attempt in made] == [
        [0, 1, 2, 3],
        [0, 2, 3],
        [2],
        [2],
    ]
    assert calls["recurse"] == [{4}, {4}, {3}, {3}, {1}, {1}, {1}, {1}]
    assert [len(lines) for lines in calls["read"]] == [4, 3, 1, 1]
    assert [attempt.ended.tolist() for attempt in made] == [
        [False, True, False, False],
        [True, False, True],
        [False],
        [True],
    ]
    assert [attempt.cut for attempt in made] == [False, False, False, True]
    result_rows = [[result.row for result in attempt.results] for attempt in made]
    assert result_rows == [[0, 1, 2, 3], [0, 2, 3], [2], [2]]
    for attempt in made:
        labels = case.batch["labels"][attempt.state.row_indices]
        assert torch.equal(attempt.state.current["labels"], labels)
    tokens = [attempt.reading.llm_tokens for attempt in made]
    assert [len(counts) for counts in tokens] == [4, 3, 1, 1]
    assert all(min(counts) > 0 for counts in tokens) and tokens[2] == tokens[3] == tokens[1][1:2]


@pytest.mark.parametrize("llama", [{}, {"prefix": "problem"}, {"max_new_tokens": 4}])
def test_stopped_rows_do_not_affect_the_others(case_of: Cases, llama: dict[str, Any]) -> None:
    case = case_of(rows=4, perturbed=True, llama=llama)
    stopping = by_row(run(case, Scripted(1, 4, 2, 3), 4))
    complete = by_row(run(case, Scripted(9, 9, 9, 9), 4))
    assert len(stopping) == 10 and len(complete) == 16
    for key, logits in stopping.items():
        torch.testing.assert_close(logits, complete[key], rtol=0, atol=1e-10)


def test_the_order_of_rows_does_not_matter(case_of: Cases) -> None:
    case = case_of(rows=4, perturbed=True)
    after = (1, 4, 2, 3)
    expected, order = by_row(run(case, Scripted(*after), 4)), [2, 0, 3, 1]

    class Permuted(Scripted):
        def __call__(self, number: int, results: Sequence[AttemptResult]) -> list[Feedback]:
            return [
                Feedback(text=f"Try {number}: row {order[r.row]}", stop=number >= self.after[r.row])
                for r in results
            ]

    permuted = by_row(run(case, Permuted(*(after[n] for n in order)), 4, rows=order))
    assert len(expected) == len(permuted) == 10
    for (row, number), logits in permuted.items():
        torch.testing.assert_close(logits, expected[order[row], number], rtol=0, atol=1e-10)


def test_min_attempts_overrides_the_feedback(case_of: Cases) -> None:
    case = case_of()
    made = run(case, Scripted(1, 1, 2), 5, min_attempts=[1, 3, 1])
    assert [attempt.state.row_indices.tolist() for attempt in made] == [[0, 1, 2], [1, 2], [1]]
    assert [attempt.ended.tolist() for attempt in made] == [
        [True, False, False],
        [False, True],
        [True],
    ]
    # Feedback is recorded unchanged.
    assert [[feedback.stop for feedback in attempt.feedbacks] for attempt in made] == [
        [True, True, False],
        [True, True],
        [True],
    ]
    assert len(run(case, Scripted(1, 1, 1), 2, min_attempts=[9, 9, 9])) == 2


@pytest.mark.parametrize("bptt", [None, 1, 2, 3])
def test_graph_is_cut_after_every_window_and_at_the_end(case_of: Cases, bptt: int | None) -> None:
    made = run(case_of(), Scripted(2, 5, 9), 8, bptt=bptt)
    assert [attempt.cut for attempt in made] == [
        bptt is not None and n % bptt == 0 for n in range(1, 8)
    ] + [True]
    early = run(case_of(), Scripted(2, 3, 3), 8, bptt=bptt)
    assert len(early) == 3 and early[-1].cut and early[-1].ended.all()


@pytest.mark.parametrize("history", [0, 1, 2, 9])
def test_feedback_text_contains_the_latest_attempts(case_of: Cases, spy: Any, history: int) -> None:
    case = case_of(rows=2)
    calls = spy(case)
    run(case, Scripted(9, 3, empty=2), 5, history=history)
    lines = ["Try 1", "Try 3", "Try 4"]  # the feedback on attempt 2 is empty
    counts = [0, 1, 1, 2, 3]
    for number, (histories, count) in enumerate(zip(calls["read"], counts, strict=True), 1):
        latest = lines[:count][-history:] if history else []
        expected = [tuple(f"{line}: row {row}" for line in latest) for row in (0, 1)]
        assert list(histories) == (expected if number <= 3 else expected[:1])


def test_inject_none_never_calls_the_reader(case_of: Cases, spy: Any) -> None:
    case = case_of(inject="none")
    calls = spy(case)
    made = run(case, Scripted(1, 2, 2), 3)
    assert calls["read"] == [] and len(calls["recurse"]) == 2
    assert made[0].reading.hidden is None and made[0].reading.delta is None
    assert made[0].reading.llm_tokens == [0] * 3 and made[0].reading.reasoning == [""] * 3


def test_reasoning_is_returned_and_counted(case_of: Cases) -> None:
    cases = [case_of(perturbed=True, llama={"max_new_tokens": n}) for n in (0, 5)]
    [without], [with_] = (run(case, NoFeedback(), 1) for case in cases)
    assert without.reading.reasoning == [""] * 3 and any(with_.reading.reasoning)
    pairs = zip(without.reading.llm_tokens, with_.reading.llm_tokens, strict=True)
    assert all(fewer < more for fewer, more in pairs)


def outputs_of(grids: Sequence[Any], offsets: Sequence[Any], canvas: int) -> Outputs:
    """Return outputs that predict `grids` with equal confidence in all cells."""
    tokens = [tokenize_grid(g, canvas, o) for g, o in zip(grids, offsets, strict=True)]
    logits = 4.0 * torch.nn.functional.one_hot(torch.from_numpy(np.stack(tokens)).long(), 12)
    halt = torch.linspace(-2, 2, len(grids))
    return Outputs(logits=logits, q_halt=halt, q_continue=halt, puzzle_rows=None)


def test_grid_is_extracted_at_the_offset_of_its_input(
    case_of: Cases, arc1: dict[str, Task]
) -> None:
    offsets = [(2, 1), (3, 3), (0, 2), (1, 0)]
    case = case_of(rows=4, canvas=6, offsets=offsets)
    answers = [arc1[t].test[0].output for t in ("0d3d703e", "27a28665", "74dd1130", "66e6c45b")]
    outputs = outputs_of(answers, offsets, 6)
    # Lower the confidence of cells (2, 0) and (1, 2) of the first grid, the former more.
    logits = outputs.logits.view(4, 6, 6, 12)
    logits[0, 4, 1] *= 0.1
    logits[0, 3, 3] *= 0.5
    logits[0, 0, 0] *= 0.01  # outside of the grid
    results = read_predictions(case.initial_state(), outputs)
    for row, (result, answer) in enumerate(zip(results, answers, strict=True)):
        assert result.row == row and np.array_equal(result.grid, answer)
        assert np.array_equal(result.tokens, outputs.logits[row].argmax(-1))
        assert result.confidence == pytest.approx(float(outputs.q_halt[row].sigmoid()))
        assert len(result.least_confident) == min(5, answer.size)
        assert all(answer[r, c] == colour for r, c, colour in result.least_confident)
    assert [(r, c) for r, c, _ in results[0].least_confident[:2]] == [(2, 0), (1, 2)]


def test_black_top_left_cell_counts_as_part_of_the_input() -> None:
    grid = np.array([[0, 3], [4, 0], [0, 0]], np.uint8)
    tokens = tokenize_grid(grid, 5, (1, 2))
    extracted, corner = extract_grid(tokens, tokens)
    assert corner == (1, 2) and np.array_equal(extracted, grid)


def test_prediction_without_a_grid_has_an_empty_grid(case_of: Cases) -> None:
    case = case_of(offsets=[(1, 1), (0, 1), (1, 0)])
    logits = torch.zeros(3, 16, 12)
    logits[0, :, 0] = logits[1, :, 1] = 1  # all PAD, all EOS
    logits[2, :, 0] = 1
    logits[2, 0, 5] = 2  # one colour, above and left of where the grid would be
    halt = torch.zeros(3)
    outputs = Outputs(logits=logits, q_halt=halt, q_continue=halt, puzzle_rows=None)
    for result in read_predictions(case.initial_state(), outputs):
        assert result.grid.shape == (0, 0) and result.least_confident == ()
