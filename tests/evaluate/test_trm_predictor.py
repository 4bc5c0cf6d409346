"""From a checkpoint to predictions: each view asked once, undone once, however rows are batched."""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import undecided
from torch import Tensor

from hybrid.arc import grid_to_string, tokenize_grid
from hybrid.checkpoint import Checkpoint, read, write_tensors
from hybrid.config import Config, EvaluationConfig
from hybrid.dataset import Dataset, Stream
from hybrid.evaluate import Question, TRMPredictor, exact_match, predict, predict_rows
from hybrid.evaluate.trm_predictor import Prediction
from hybrid.trm import TRM, Carry

CPU = torch.device("cpu")
CANVAS = 3
Rows = tuple[np.ndarray, Tensor]


@pytest.fixture
def dataset(trained: Config) -> Dataset:
    return Dataset.open(trained.data_folder)


@pytest.fixture
def rows(dataset: Dataset, checkpoint: Checkpoint) -> Rows:
    """Inputs of 23 rows of the training stream and their puzzle rows."""
    found = Stream(dataset, 0).rows(np.arange(23))
    table = checkpoint.tensors("puzzle_table")["puzzle_table"]
    identifiers = torch.from_numpy(np.asarray(found["puzzle_identifiers"])).long()
    return np.asarray(found["inputs"], np.uint8), table[identifiers]


@pytest.fixture
def halting(checkpoint: Checkpoint, rows: Rows) -> TRM:
    """The trained model with a halt head that half of the rows satisfy after two ACT steps."""
    model = TRMPredictor(checkpoint, EvaluationConfig(), CPU).model
    undecided(model.state_dict())
    _, logits, _ = predict(model, *rows, EvaluationConfig(halt="fixed", act_steps=2))
    assert model.q_head.bias is not None
    model.q_head.bias.data -= float(np.median(logits))
    return model


def question(dataset: Dataset, task_id: str, views: int = 6) -> Question:
    [task] = [t for t, task in enumerate(dataset.tasks) if task.id == task_id]
    first = int(dataset.first_variant[task])
    return Question(
        task=dataset.tasks[task].without_answers(),
        side=int(dataset.sides[task]),
        views=tuple(dataset.augmentation(v) for v in range(first, first + views)),
        identifiers=range(first + 1, first + views + 1),
    )


def candidates(prediction: Prediction) -> list[list[tuple[Any, ...]]]:
    return [
        [(tuple(c["grid"]), c["votes"], round(c["confidence"], 6)) for c in test["candidates"]]
        for test in prediction["tests"]
    ]


def test_every_view_is_encoded_with_its_own_puzzle_row_and_undone(
    dataset: Dataset, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In place of the model one that copies: every view must vote for the test input itself."""
    given: list[Rows] = []

    def copy(model: TRM, inputs: np.ndarray, rows: Tensor, config: EvaluationConfig) -> Any:
        given.append((inputs, rows))
        return inputs, np.zeros(len(inputs), np.float32), 0

    monkeypatch.setattr("hybrid.evaluate.trm_predictor.predict", copy)
    asked = question(dataset, "25ff71a9")
    found = TRMPredictor(checkpoint, EvaluationConfig(), CPU).solve(asked)
    assert [test["empty"] for test in found["tests"]] == [0, 0]
    for test, pair in zip(candidates(found), asked.task.test, strict=True):
        assert test == [(tuple(grid_to_string(pair.input).split("\n")), 6, 0.5)]
    [(inputs, rows)] = given
    table = checkpoint.tensors("puzzle_table")["puzzle_table"]
    pairs = [(pair, n) for pair in asked.task.test for n in range(6)]
    for row, (pair, n) in enumerate(pairs):
        assert np.array_equal(inputs[row], tokenize_grid(asked.views[n].apply(pair.input), CANVAS))
        assert torch.equal(rows[row], table[asked.identifiers[n]])
    assert len(torch.unique(rows, dim=0)) > 3, "too few puzzle rows were trained to tell"


def test_weights_are_the_average_and_the_table_stays_on_disk(checkpoint: Checkpoint) -> None:
    model = TRMPredictor(checkpoint, EvaluationConfig(), CPU).model
    average, last = checkpoint.tensors("ema"), checkpoint.tensors("model")
    for name, weight in model.named_parameters():
        assert torch.equal(weight, average[name]) and not torch.equal(weight, last[name]), name
    assert torch.equal(model.H_init, last["H_init"]) and torch.equal(model.L_init, last["L_init"])
    assert len(model.puzzle_table) == 1 and not model.training


def test_an_unknown_puzzle_has_the_blank_row(
    dataset: Dataset, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """It is answered alike whatever the other rows of the table hold."""
    asked = question(dataset, "25ff71a9")
    solver = TRMPredictor(checkpoint, EvaluationConfig(), CPU)
    blank = solver.solve(replace(asked, identifiers=range(0)))
    assert candidates(blank) != candidates(solver.solve(asked))
    copy = tmp_path / "step_00000040"
    shutil.copytree(checkpoint.folder, copy)
    table = torch.ones(37, 32).index_fill(0, torch.tensor([0]), 0)
    write_tensors(copy, "puzzle_table", {"puzzle_table": table})
    other = TRMPredictor(replace(checkpoint, folder=copy), EvaluationConfig(), CPU)
    assert candidates(blank) == candidates(other.solve(replace(asked, identifiers=range(0))))


def test_views_that_look_the_same_are_asked_once_where_they_have_no_puzzle(
    dataset: Dataset, checkpoint: Checkpoint
) -> None:
    """Colours that the input does not have may be anything: the answer comes from its view."""
    solver = TRMPredictor(checkpoint, EvaluationConfig(), CPU)
    asked = question(dataset, "25ff71a9")
    given = [{view.apply(pair.input).tobytes() for view in asked.views} for pair in asked.task.test]
    different = len(set.union(*given))
    assert different < 12, "no two views look the same"
    blank = solver.solve(replace(asked, identifiers=range(0)))
    assert blank["spent"]["rows"] == different and blank["spent"]["act_steps"] == 4 * different
    assert solver.solve(asked)["spent"]["rows"] == 12
    for n, (test, pair) in enumerate(zip(candidates(blank), asked.task.test, strict=True)):
        votes = [
            candidates(
                solver.solve(
                    replace(
                        asked,
                        task=replace(asked.task, test=(pair,)),
                        views=(view,),
                        identifiers=range(0),
                    )
                )
            )[0]
            for view in asked.views
        ]
        assert blank["tests"][n]["variants"] == 6
        counted = Counter(vote[0][0] for vote in votes if vote)
        assert {grid: count for grid, count, _ in test} == counted


def test_batches_and_other_tests_do_not_change_an_answer(
    dataset: Dataset, checkpoint: Checkpoint
) -> None:
    asked = question(dataset, "44f52bb0")
    whole = candidates(TRMPredictor(checkpoint, EvaluationConfig(), CPU).solve(asked))
    assert any(whole), "no answer to compare"
    for size in (1, 5, 7):
        solver = TRMPredictor(checkpoint, EvaluationConfig(batch_size=size), CPU)
        assert candidates(solver.solve(asked)) == whole, size
    for n, pair in enumerate(asked.task.test):
        alone = replace(asked, task=replace(asked.task, test=(pair,)))
        assert candidates(solver.solve(alone)) == whole[n : n + 1]


def test_one_view_is_one_row_a_test(dataset: Dataset, checkpoint: Checkpoint) -> None:
    solver = TRMPredictor(checkpoint, EvaluationConfig(), CPU)
    found = solver.solve(question(dataset, "25ff71a9", views=1))
    assert [test["variants"] for test in found["tests"]] == [1, 1]
    assert found["spent"]["rows"] == 2 and found["spent"]["act_steps"] == 8


@pytest.mark.parametrize("count", [0, 1, 2, 8, 9])
def test_any_number_of_rows_can_be_asked(halting: TRM, rows: Rows, count: int) -> None:
    """One row alone in its batch too, and a last batch of one."""
    inputs, puzzle_rows = rows[0][:count], rows[1][:count]
    tokens, logits, spent = predict(halting, inputs, puzzle_rows, EvaluationConfig(batch_size=8))
    assert tokens.shape == (count, 9) and logits.shape == (count,) and spent == 4 * count


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_fixed_halting_is_that_many_act_steps(halting: TRM, rows: Rows, steps: int) -> None:
    inputs, puzzle_rows = rows
    batch = {"inputs": torch.from_numpy(inputs).int()}
    with torch.inference_mode():
        carry = halting.initial_carry(batch)
        for _ in range(steps):
            carry, outputs = halting.act_step(carry, batch, puzzle_rows=puzzle_rows)
    config = EvaluationConfig(halt="fixed", act_steps=steps, batch_size=8)
    tokens, logits, spent = predict(halting, inputs, puzzle_rows, config)
    assert np.array_equal(tokens, outputs.logits.argmax(-1).numpy())
    np.testing.assert_allclose(logits, outputs.q_halt.numpy(), rtol=1e-5, atol=1e-5)
    assert spent == 23 * steps
    if steps == 4:
        published = predict(halting, inputs, puzzle_rows, EvaluationConfig(batch_size=8))
        assert np.array_equal(published[0], tokens) and published[2] == spent


def test_confident_rows_leave_and_change_nothing_for_the_others(halting: TRM, rows: Rows) -> None:
    """Each row as when it runs alone until its halt logit first is above 0, or to the end."""
    inputs, puzzle_rows = rows
    config = EvaluationConfig(halt="confident", batch_size=9)
    tokens, logits, spent = predict(halting, inputs, puzzle_rows, config)
    lived = []
    for row in range(len(inputs)):
        one, rows_of_one = inputs[row : row + 1], puzzle_rows[row : row + 1]
        for steps in range(1, 5):
            fixed = EvaluationConfig(halt="fixed", act_steps=steps)
            alone, logit, _ = predict(halting, one, rows_of_one, fixed)
            if logit[0] > 0:
                break
        lived.append(steps)
        assert np.array_equal(tokens[row], alone[0]), f"row {row} after {steps} steps"
        np.testing.assert_allclose(logits[row], logit[0], rtol=1e-5, atol=1e-5)
    assert spent == sum(lived)
    assert len(set(lived)) > 1, "all rows halted together: nothing was compacted"


def test_a_slot_takes_the_next_row_at_once(
    halting: TRM, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches are full until no row is left, and then hold what still runs."""
    sizes = []
    act_step = halting.act_step

    def counted(carry: Carry, *args: Any, **keys: Any) -> Any:
        sizes.append(len(carry.steps))
        return act_step(carry, *args, **keys)

    monkeypatch.setattr(halting, "act_step", counted)
    config = EvaluationConfig(halt="confident", batch_size=4)
    _, _, spent = predict(halting, *rows, config)
    assert sum(sizes) == spent and sorted(sizes, reverse=True) == sizes
    # Once the last row is taken, none lives longer than four steps.
    assert sum(size < 4 for size in sizes) < 4


def test_a_row_is_exact_when_it_is_right_in_every_label(trained: Config, dataset: Dataset) -> None:
    rows = Stream(dataset, 0).rows(np.arange(20))
    checkpoint = read(trained.run_folder / "checkpoints" / "step_00000040")
    model = TRMPredictor(checkpoint, EvaluationConfig(), CPU).model
    model.puzzle_table = checkpoint.tensors("puzzle_table")["puzzle_table"]
    puzzle_rows = model.puzzle_table[
        torch.from_numpy(np.asarray(rows["puzzle_identifiers"])).long()
    ]
    inputs = np.asarray(rows["inputs"], np.uint8)
    said, _, _ = predict(model, inputs, puzzle_rows, EvaluationConfig())
    labels = said.copy()
    model.train()
    assert exact_match(predict_rows(model, rows, batch_size=7), labels).mean() == 1
    labels[:5, 0] = 0  # a position that is not scored
    assert exact_match(predict_rows(model, rows, batch_size=7), labels).mean() == 1
    labels[3:7, 4] = labels[3:7, 4] % 11 + 1
    assert exact_match(predict_rows(model, rows, batch_size=7), labels).mean() == pytest.approx(0.8)
    assert model.training, "it must leave the mode as it was"
