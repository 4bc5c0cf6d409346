"""Predictions of a TRM: each variant is predicted and inverted once, for any batch size."""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import randomize_halt_head
from torch import Tensor

from hybrid.arc import grid_to_string, tokenize_grid
from hybrid.checkpoint import Checkpoint, read, write_tensors
from hybrid.config import Config, EvaluationConfig
from hybrid.dataset import Dataset, Stream
from hybrid.evaluate import Question, TRMPredictor, exact_match, predict_rows, predict_tokens
from hybrid.evaluate.records import Prediction
from hybrid.trm import TRM, Carry

CPU = torch.device("cpu")
CANVAS = 3
Rows = tuple[np.ndarray, Tensor]


@pytest.fixture
def dataset(trained: Config) -> Dataset:
    return Dataset.open(trained.data_folder)


@pytest.fixture
def rows(dataset: Dataset, checkpoint: Checkpoint) -> Rows:
    """Inputs of the first 23 training rows, and their puzzle rows."""
    found = Stream(dataset, 0).rows(np.arange(23))
    table = checkpoint.tensors("puzzle_table")["puzzle_table"]
    identifiers = torch.from_numpy(np.asarray(found["puzzle_identifiers"])).long()
    return np.asarray(found["inputs"], np.uint8), table[identifiers]


@pytest.fixture
def halting(checkpoint: Checkpoint, rows: Rows) -> TRM:
    """The trained model with a halt head that stops half of the rows after two ACT steps."""
    model = TRMPredictor(checkpoint, EvaluationConfig(), CPU).model
    randomize_halt_head(model.state_dict())
    _, logits, _ = predict_tokens(model, *rows, EvaluationConfig(halt="fixed", act_steps=2))
    assert model.q_head.bias is not None
    model.q_head.bias.data -= float(np.median(logits))
    return model


def make_question(dataset: Dataset, task_id: str, variants: int = 6) -> Question:
    [task] = [t for t, task in enumerate(dataset.tasks) if task.id == task_id]
    first = int(dataset.first_variant[task])
    return Question(
        task=dataset.tasks[task].without_answers(),
        side=int(dataset.sides[task]),
        variants=tuple(dataset.augmentation(v) for v in range(first, first + variants)),
        identifiers=range(first + 1, first + variants + 1),
    )


def candidates(prediction: Prediction) -> list[list[tuple[Any, ...]]]:
    return [
        [(tuple(c["grid"]), c["votes"], round(c["confidence"], 6)) for c in test["candidates"]]
        for test in prediction["tests"]
    ]


def test_every_variant_uses_its_puzzle_row_and_is_inverted(
    dataset: Dataset, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a model that copies its input, every variant must vote for the test input itself."""
    given: list[Rows] = []

    def copy(model: TRM, inputs: np.ndarray, rows: Tensor, config: EvaluationConfig) -> Any:
        given.append((inputs, rows))
        return inputs, np.zeros(len(inputs), np.float32), 0

    monkeypatch.setattr("hybrid.evaluate.trm_predictor.predict_tokens", copy)
    question = make_question(dataset, "25ff71a9")
    found = TRMPredictor(checkpoint, EvaluationConfig(), CPU).predict(question)
    assert [test["empty"] for test in found["tests"]] == [0, 0]
    for test, pair in zip(candidates(found), question.task.test, strict=True):
        assert test == [(tuple(grid_to_string(pair.input).split("\n")), 6, 0.5)]
    [(inputs, rows)] = given
    table = checkpoint.tensors("puzzle_table")["puzzle_table"]
    pairs = [(pair, n) for pair in question.task.test for n in range(6)]
    for row, (pair, n) in enumerate(pairs):
        assert np.array_equal(
            inputs[row], tokenize_grid(question.variants[n].apply(pair.input), CANVAS)
        )
        assert torch.equal(rows[row], table[question.identifiers[n]])
    assert len(torch.unique(rows, dim=0)) > 3, "too few distinct puzzle rows for this test"


def test_weights_are_the_ema_and_the_table_stays_on_disk(checkpoint: Checkpoint) -> None:
    model = TRMPredictor(checkpoint, EvaluationConfig(), CPU).model
    ema, last = checkpoint.tensors("ema"), checkpoint.tensors("model")
    for name, weight in model.named_parameters():
        assert torch.equal(weight, ema[name]) and not torch.equal(weight, last[name]), name
    assert torch.equal(model.H_init, last["H_init"]) and torch.equal(model.L_init, last["L_init"])
    assert len(model.puzzle_table) == 1 and not model.training


def test_unknown_puzzle_uses_the_blank_row(
    dataset: Dataset, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """Its prediction does not depend on the other rows of the table."""
    question = make_question(dataset, "25ff71a9")
    predictor = TRMPredictor(checkpoint, EvaluationConfig(), CPU)
    blank = predictor.predict(replace(question, identifiers=range(0)))
    assert candidates(blank) != candidates(predictor.predict(question))
    copy = tmp_path / "step_00000040"
    shutil.copytree(checkpoint.folder, copy)
    table = torch.ones(37, 32).index_fill(0, torch.tensor([0]), 0)
    write_tensors(copy, "puzzle_table", {"puzzle_table": table})
    other = TRMPredictor(replace(checkpoint, folder=copy), EvaluationConfig(), CPU)
    assert candidates(blank) == candidates(other.predict(replace(question, identifiers=range(0))))


def test_equal_inputs_are_predicted_once_with_the_blank_puzzle(
    dataset: Dataset, checkpoint: Checkpoint
) -> None:
    """Variants that differ in absent colours only share a prediction, but invert it differently."""
    predictor = TRMPredictor(checkpoint, EvaluationConfig(), CPU)
    question = make_question(dataset, "25ff71a9")
    given = [
        {variant.apply(pair.input).tobytes() for variant in question.variants}
        for pair in question.task.test
    ]
    different = len(set.union(*given))
    assert different < 12, "no two variants have equal inputs"
    blank = predictor.predict(replace(question, identifiers=range(0)))
    assert blank["spent"]["rows"] == different and blank["spent"]["act_steps"] == 4 * different
    assert predictor.predict(question)["spent"]["rows"] == 12
    for n, (test, pair) in enumerate(zip(candidates(blank), question.task.test, strict=True)):
        votes = [
            candidates(
                predictor.predict(
                    replace(
                        question,
                        task=replace(question.task, test=(pair,)),
                        variants=(variant,),
                        identifiers=range(0),
                    )
                )
            )[0]
            for variant in question.variants
        ]
        assert blank["tests"][n]["variants"] == 6
        counted = Counter(vote[0][0] for vote in votes if vote)
        assert {grid: count for grid, count, _ in test} == counted


def test_batch_size_and_other_tests_do_not_change_predictions(
    dataset: Dataset, checkpoint: Checkpoint
) -> None:
    question = make_question(dataset, "44f52bb0")
    expected = candidates(TRMPredictor(checkpoint, EvaluationConfig(), CPU).predict(question))
    assert any(expected), "no candidates to compare"
    for size in (1, 5, 7):
        predictor = TRMPredictor(checkpoint, EvaluationConfig(batch_size=size), CPU)
        assert candidates(predictor.predict(question)) == expected, size
    for n, pair in enumerate(question.task.test):
        alone = replace(question, task=replace(question.task, test=(pair,)))
        assert candidates(predictor.predict(alone)) == expected[n : n + 1]


def test_one_variant_is_one_row_per_test(dataset: Dataset, checkpoint: Checkpoint) -> None:
    predictor = TRMPredictor(checkpoint, EvaluationConfig(), CPU)
    found = predictor.predict(make_question(dataset, "25ff71a9", variants=1))
    assert [test["variants"] for test in found["tests"]] == [1, 1]
    assert found["spent"]["rows"] == 2 and found["spent"]["act_steps"] == 8


@pytest.mark.parametrize("count", [0, 1, 2, 8, 9])
def test_any_number_of_rows_is_predicted(halting: TRM, rows: Rows, count: int) -> None:
    """Includes no rows, a single row, and one more row than a batch."""
    inputs, puzzle_rows = rows[0][:count], rows[1][:count]
    tokens, logits, spent = predict_tokens(
        halting, inputs, puzzle_rows, EvaluationConfig(batch_size=8)
    )
    assert tokens.shape == (count, 9) and logits.shape == (count,) and spent == 4 * count


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_fixed_halting_makes_that_many_act_steps(halting: TRM, rows: Rows, steps: int) -> None:
    inputs, puzzle_rows = rows
    batch = {"inputs": torch.from_numpy(inputs).int()}
    with torch.inference_mode():
        carry = halting.initial_carry(batch)
        for _ in range(steps):
            carry, outputs = halting.act_step(carry, batch, puzzle_rows=puzzle_rows)
    config = EvaluationConfig(halt="fixed", act_steps=steps, batch_size=8)
    tokens, logits, spent = predict_tokens(halting, inputs, puzzle_rows, config)
    assert np.array_equal(tokens, outputs.logits.argmax(-1).numpy())
    np.testing.assert_allclose(logits, outputs.q_halt.numpy(), rtol=1e-5, atol=1e-5)
    assert spent == 23 * steps
    if steps == 4:
        published = predict_tokens(halting, inputs, puzzle_rows, EvaluationConfig(batch_size=8))
        assert np.array_equal(published[0], tokens) and published[2] == spent


def test_confident_rows_leave_without_changing_the_others(halting: TRM, rows: Rows) -> None:
    """Each row equals a run of its own until its halt logit is above 0 or steps run out."""
    inputs, puzzle_rows = rows
    config = EvaluationConfig(halt="confident", batch_size=9)
    tokens, logits, spent = predict_tokens(halting, inputs, puzzle_rows, config)
    steps_made = []
    for row in range(len(inputs)):
        one, rows_of_one = inputs[row : row + 1], puzzle_rows[row : row + 1]
        for steps in range(1, 5):
            fixed = EvaluationConfig(halt="fixed", act_steps=steps)
            alone, logit, _ = predict_tokens(halting, one, rows_of_one, fixed)
            if logit[0] > 0:
                break
        steps_made.append(steps)
        assert np.array_equal(tokens[row], alone[0]), f"row {row} after {steps} steps"
        np.testing.assert_allclose(logits[row], logit[0], rtol=1e-5, atol=1e-5)
    assert spent == sum(steps_made)
    assert len(set(steps_made)) > 1, "all rows halted at the same step: no slot was refilled"


def test_freed_slot_takes_the_next_row_at_once(
    halting: TRM, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches are full until no row is left, and then shrink to the active rows."""
    sizes = []
    act_step = halting.act_step

    def counted(carry: Carry, *args: Any, **keys: Any) -> Any:
        sizes.append(len(carry.steps))
        return act_step(carry, *args, **keys)

    monkeypatch.setattr(halting, "act_step", counted)
    config = EvaluationConfig(halt="confident", batch_size=4)
    _, _, spent = predict_tokens(halting, *rows, config)
    assert sum(sizes) == spent and sorted(sizes, reverse=True) == sizes
    # After the last row is assigned, no row runs for more than four steps.
    assert sum(size < 4 for size in sizes) < 4


def test_exact_match_requires_every_scored_label(trained: Config, dataset: Dataset) -> None:
    rows = Stream(dataset, 0).rows(np.arange(20))
    checkpoint = read(trained.run_folder / "checkpoints" / "step_00000040")
    model = TRMPredictor(checkpoint, EvaluationConfig(), CPU).model
    model.puzzle_table = checkpoint.tensors("puzzle_table")["puzzle_table"]
    puzzle_rows = model.puzzle_table[
        torch.from_numpy(np.asarray(rows["puzzle_identifiers"])).long()
    ]
    inputs = np.asarray(rows["inputs"], np.uint8)
    tokens, _, _ = predict_tokens(model, inputs, puzzle_rows, EvaluationConfig())
    labels = tokens.copy()
    model.train()
    assert exact_match(predict_rows(model, rows, batch_size=7), labels).mean() == 1
    labels[:5, 0] = 0  # PAD: not scored
    assert exact_match(predict_rows(model, rows, batch_size=7), labels).mean() == 1
    labels[3:7, 4] = labels[3:7, 4] % 11 + 1
    assert exact_match(predict_rows(model, rows, batch_size=7), labels).mean() == pytest.approx(0.8)
    assert model.training, "predict_rows must restore the training mode"
