"""With data.canvas=bucketed a task is evaluated on a small canvas, for any training canvas."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    change_weights,
    config_of,
    hybrid_of,
    poison,
    predictions,
    quietly,
    randomize_halt_head,
    randomize_puzzle_table,
    recording,
    write_tasks,
)
from torch import Tensor

from hybrid.arc import Task, grid_to_string, string_to_grid, tokenize_grid
from hybrid.checkpoint import newest
from hybrid.config import Config, EvaluationConfig
from hybrid.context import LocalContext
from hybrid.dataset import Dataset, prepare
from hybrid.errors import UserError
from hybrid.evaluate import Question, TRMPredictor, describe
from hybrid.evaluate.hybrid_predictor import HybridPredictor
from hybrid.evaluate.questions import select_questions
from hybrid.train import joint, pretrain
from hybrid.trm import TRM

CPU = LocalContext(torch.device("cpu"))
TRAINED = ("0d3d703e", "74dd1130", "29c11459")
SIDES = {"25ff71a9": 11, "10fcaaa3": 11, "0962bcdd": 12}
"""Canvas sides of evaluation tasks; the second one's answer is 12 high and cannot be predicted."""
CANVASES = ("full", "bucketed")


def config_on(
    root: Path, canvas: str, make: Callable[..., Config] = config_of, **sections: dict[str, Any]
) -> Config:
    defaults: dict[str, dict[str, Any]] = {
        "data": {"max_side": 12, "variants": 2, "canvas": canvas},
        "paths": {"data": str(root / canvas)},
        "trm": {"forward_dtype": "float64"},
        "training": {"steps": 2},
    }
    keys = {s: defaults.get(s, {}) | sections.get(s, {}) for s in defaults | sections}
    return make(root, **keys)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, arc1: dict[str, Task]) -> Path:
    """Both datasets, and a TRM trained on the full canvas that predicts grids."""
    root = tmp_path_factory.mktemp("canvases")
    write_tasks(root / "training", [arc1[task] for task in TRAINED])
    write_tasks(root / "evaluation", [arc1[task] for task in SIDES])
    for canvas in CANVASES:
        prepare(config_on(root, canvas).data, root / canvas, lambda line: None)
    checkpoint = pretrain(config_on(root, "full"), CPU).checkpoint
    change_weights(checkpoint, grid_predicting)
    change_weights(checkpoint, randomize_puzzle_table, ["puzzle_table"])
    return root


def grid_predicting(tensors: dict[str, Tensor]) -> None:
    tensors["lm_head.weight"].normal_(generator=torch.Generator().manual_seed(2))
    tensors["lm_head.weight"][:2] = 0


def questions_of(root: Path, canvas: str) -> list[Question]:
    config = config_on(root, canvas)
    checkpoint = newest(config.run_folder / "checkpoints")
    assert checkpoint
    return select_questions(config, checkpoint, Dataset.open(root / canvas))


def test_questions_of_both_canvases_differ_in_side_only(root: Path) -> None:
    """The fingerprint is the same, so both use the trained puzzle identifiers."""
    full, bucketed = (questions_of(root, canvas) for canvas in CANVASES)
    assert {question.task.id: question.side for question in bucketed} == SIDES
    assert {question.side for question in full} == {12}
    for one, other in zip(full, bucketed, strict=True):
        assert one.task == other.task and one.variants == other.variants
        assert one.identifiers == other.identifiers and len(one.identifiers) == 3


def test_variants_are_predicted_on_the_small_canvas_and_inverted(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a model that copies its input, every variant must vote for the test input itself."""
    inputs_given: list[np.ndarray] = []

    def copy(model: TRM, inputs: np.ndarray, rows: Tensor, config: EvaluationConfig) -> Any:
        inputs_given.append(inputs)
        return inputs, np.zeros(len(inputs), np.float32), 0

    monkeypatch.setattr("hybrid.evaluate.trm_predictor.predict_tokens", copy)
    checkpoint = newest(config_on(root, "full").run_folder / "checkpoints")
    assert checkpoint
    predictor = TRMPredictor(checkpoint, EvaluationConfig(), CPU.device)
    for question in questions_of(root, "bucketed"):
        side = SIDES[question.task.id]
        prediction = predictor.predict(question)
        pairs = [(pair, variant) for pair in question.task.test for variant in question.variants]
        assert inputs_given[-1].shape == (len(pairs), side**2)
        for row, (pair, variant) in zip(inputs_given[-1], pairs, strict=True):
            assert np.array_equal(row, tokenize_grid(variant.apply(pair.input), side))
        for test, pair in zip(prediction["tests"], question.task.test, strict=True):
            [candidate] = test["candidates"]
            assert candidate["grid"] == grid_to_string(pair.input).splitlines()
            assert candidate["votes"] == len(question.variants)


@pytest.mark.parametrize("halt", ["published", "confident"])
def test_batch_size_does_not_change_predictions_on_small_canvases(root: Path, halt: Any) -> None:
    checkpoint = newest(config_on(root, "full").run_folder / "checkpoints")
    assert checkpoint
    found = []
    for size in (1, 4, 512):
        config = EvaluationConfig(halt=halt, batch_size=size)
        predictor = TRMPredictor(checkpoint, config, CPU.device)
        randomize_halt_head(predictor.model.state_dict())
        made = [predictor.predict(question) for question in questions_of(root, "bucketed")]
        spent = [prediction["spent"]["act_steps"] for prediction in made]
        grids = [[c["grid"] for t in p["tests"] for c in t["candidates"]] for p in made]
        found.append((spent, grids))
    assert found[0] == found[1] == found[2] and any(found[0][1])


def test_model_trained_on_the_full_canvas_is_evaluated_on_smaller_ones(root: Path) -> None:
    """The evaluation has its own folder, and the protocol names its canvases."""
    questions: dict[str, list[Question]] = {canvas: [] for canvas in CANVASES}
    outcomes = {
        canvas: quietly(config_on(root, canvas), recording(questions[canvas]))
        for canvas in CANVASES
    }
    full, bucketed = (outcomes[canvas] for canvas in CANVASES)
    assert full.folder != bucketed.folder and full.folder.parent == bucketed.folder.parent
    assert full.resumed == bucketed.resumed == 0
    for canvas, expected in (("full", "12 x 12"), ("bucketed", "smallest of sides 11, 12")):
        protocol = outcomes[canvas].results["protocol"]
        assert expected in protocol["canvas"] and protocol["puzzle ids"] == "as trained"
        assert f"canvas: {protocol['canvas']}" in describe(outcomes[canvas].results)
        assert len(questions[canvas]) == 3 and all(q.identifiers for q in questions[canvas])
    for key in ("dataset fingerprint", "evaluated", "test outputs evaluated", "training data"):
        assert full.results["protocol"][key] == bucketed.results["protocol"][key]
    on_full, on_bucketed = (predictions(outcomes[canvas].folder) for canvas in CANVASES)
    assert on_full["0962bcdd"] == on_bucketed["0962bcdd"], "both use the full canvas"
    assert on_full["25ff71a9"] != on_bucketed["25ff71a9"]
    for task, side in SIDES.items():
        for test in on_bucketed[task]["tests"]:
            grids = [string_to_grid("\n".join(c["grid"])) for c in test["candidates"]]
            assert grids and all(max(grid.shape) <= side for grid in grids)
    again = quietly(config_on(root, "bucketed"))
    assert again.folder == bucketed.folder and again.resumed == 3


def test_answers_change_neither_questions_nor_predictions(
    root: Path, arc1: dict[str, Task], tmp_path: Path
) -> None:
    """Garbage answers of any size: same questions, same predictions, same submission.

    The fingerprint includes the task folder's name, so both runs use the blank puzzle identifier.
    """
    write_tasks(tmp_path / "evaluation", [poison(arc1[task]) for task in SIDES])
    checkpoint = newest(config_on(root, "full").run_folder / "checkpoints")
    assert checkpoint
    sources = {
        "training": [str(root / "training")],
        "evaluation": [str(tmp_path / "evaluation")],
    }
    clean = config_on(root, "bucketed", paths={"runs": str(tmp_path / "runs")})
    clean = replace(
        clean,
        evaluation=replace(clean.evaluation, checkpoint=str(checkpoint.folder), puzzle_ids="blank"),
    )
    poisoned = config_on(root, "bucketed", paths={"data": str(tmp_path / "poisoned")}, data=sources)
    prepare(poisoned.data, poisoned.data_folder, lambda line: None)
    poisoned = replace(
        clean,
        data=poisoned.data,
        paths=replace(clean.paths, data=poisoned.paths.data, runs=str(tmp_path / "other")),
    )
    questions: list[list[Question]] = [[], []]
    outcomes = [
        quietly(config, recording(recorded))
        for config, recorded in zip((clean, poisoned), questions, strict=True)
    ]
    assert [(q.task, q.side, q.variants) for q in questions[0]] == [
        (q.task, q.side, q.variants) for q in questions[1]
    ]
    assert {q.task.id: q.side for q in questions[1]} == SIDES
    assert predictions(outcomes[0].folder) == predictions(outcomes[1].folder)
    submissions = [json.loads((o.folder / "submission.json").read_text()) for o in outcomes]
    assert submissions[0] == submissions[1]


def test_mlp_t_on_a_smaller_canvas_is_rejected(root: Path) -> None:
    """trm.mlp_t has a weight per cell of the full canvas, on which it was trained."""
    sections = {
        "trm": {"mlp_t": True, "pos_encodings": "none"},
        "training": {"steps": 1},
        "logging": {"run": "mixing"},
    }
    pretrain(config_on(root, "full", **sections), CPU)
    with pytest.raises(UserError, match=r"mlp_t"):
        quietly(config_on(root, "bucketed", **sections))


def test_protocol_names_only_the_canvases_of_evaluated_tasks(root: Path) -> None:
    """The only evaluated task has a canvas of side 12."""
    outcome = quietly(config_on(root, "bucketed", evaluation={"limit": 1}))
    assert outcome.results["protocol"]["evaluated"].startswith("a subset: 1 of 3")
    assert "11" not in outcome.results["protocol"]["canvas"]


@pytest.fixture(scope="module")
def hybrid_config(root: Path) -> Callable[..., Config]:
    """hybrid_config(source): evaluates a hybrid, one demonstration per task held out."""
    sections: dict[str, dict[str, Any]] = {
        "data": {"max_side": 12, "variants": 2, "canvas": "bucketed", "hold_out_demos": 1},
        "paths": {"data": str(root / "held-out")},
        "llama": {"dtype": "float64", "max_prompt_tokens": 400},
        "training": {"steps": 1, "max_attempts": 2, "train_accuracy_pairs": 0},
        "evaluation": {"variants": 2},
        "logging": {"run": "hybrid"},
    }
    config = config_on(root, "bucketed", hybrid_of, **sections)
    prepare(config.data, config.data_folder, lambda line: None)
    change_weights(joint(config, CPU).checkpoint, randomize_halt_head)
    return lambda source: config_on(
        root, "bucketed", hybrid_of, **sections, feedback={"source": source}
    )


@pytest.mark.parametrize("source", ["confidence", "vote", "demos", "oracle"])
def test_all_rows_of_a_hybrid_use_the_small_canvas(
    hybrid_config: Callable[..., Config], source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of tests, of held-out demonstrations and of the baseline's spare variants."""
    cells: dict[str, set[int]] = {}
    run_attempts = HybridPredictor._run_attempts

    def spy(self: HybridPredictor, question: Question, *rest: Any) -> Any:
        records = run_attempts(self, question, *rest)
        cells.setdefault(question.task.id, set()).update(
            len(record.tokens) for row in records.values() for record in row
        )
        return records

    monkeypatch.setattr(HybridPredictor, "_run_attempts", spy)
    outcome = quietly(hybrid_config(source))
    assert cells == {task: {side**2} for task, side in SIDES.items()}
    assert outcome.results["notes"] == []
    assert "11, 12" in outcome.results["protocol"]["canvas"]
