"""A task is asked on the canvas of what is known of it, whatever the model was trained on."""

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
    recording,
    scattered,
    undecided,
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
"""Of tasks that are asked; the answer of the second is 12 high, and cannot be given."""
CANVASES = ("full", "bucketed")


def config_on(
    root: Path, canvas: str, make: Callable[..., Config] = config_of, **sections: dict[str, Any]
) -> Config:
    fixed: dict[str, dict[str, Any]] = {
        "data": {"max_side": 12, "variants": 2, "canvas": canvas},
        "paths": {"data": str(root / canvas)},
        "trm": {"forward_dtype": "float64"},
        "training": {"steps": 2},
    }
    return make(root, **{s: fixed.get(s, {}) | sections.get(s, {}) for s in fixed | sections})


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, arc1: dict[str, Task]) -> Path:
    """Both datasets, and a TRM trained on the full canvas that says grids."""
    root = tmp_path_factory.mktemp("asked")
    write_tasks(root / "training", [arc1[task] for task in TRAINED])
    write_tasks(root / "evaluation", [arc1[task] for task in SIDES])
    for canvas in CANVASES:
        prepare(config_on(root, canvas).data, root / canvas, lambda line: None)
    checkpoint = pretrain(config_on(root, "full"), CPU).checkpoint
    change_weights(checkpoint, talkative)
    change_weights(checkpoint, scattered, ["puzzle_table"])
    return root


def talkative(tensors: dict[str, Tensor]) -> None:
    tensors["lm_head.weight"].normal_(generator=torch.Generator().manual_seed(2))
    tensors["lm_head.weight"][:2] = 0


def questions_of(root: Path, canvas: str) -> list[Question]:
    config = config_on(root, canvas)
    checkpoint = newest(config.run_folder / "checkpoints")
    assert checkpoint
    return select_questions(config, checkpoint, Dataset.open(root / canvas))


def test_questions_differ_in_their_canvas_alone(root: Path) -> None:
    """Trained puzzle identifiers too: the datasets are the same."""
    full, bucketed = (questions_of(root, canvas) for canvas in CANVASES)
    assert {question.task.id: question.side for question in bucketed} == SIDES
    assert {question.side for question in full} == {12}
    for one, other in zip(full, bucketed, strict=True):
        assert one.task == other.task and one.views == other.views
        assert one.identifiers == other.identifiers and len(one.identifiers) == 3


def test_views_are_asked_on_the_small_canvas_and_undone(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In place of the model one that copies: every view must vote for the test input itself."""
    given: list[np.ndarray] = []

    def copy(model: TRM, inputs: np.ndarray, rows: Tensor, config: EvaluationConfig) -> Any:
        given.append(inputs)
        return inputs, np.zeros(len(inputs), np.float32), 0

    monkeypatch.setattr("hybrid.evaluate.trm_predictor.predict", copy)
    checkpoint = newest(config_on(root, "full").run_folder / "checkpoints")
    assert checkpoint
    solver = TRMPredictor(checkpoint, EvaluationConfig(), CPU.device)
    for question in questions_of(root, "bucketed"):
        side = SIDES[question.task.id]
        found = solver.solve(question)
        pairs = [(pair, view) for pair in question.task.test for view in question.views]
        assert given[-1].shape == (len(pairs), side**2)
        for row, (pair, view) in zip(given[-1], pairs, strict=True):
            assert np.array_equal(row, tokenize_grid(view.apply(pair.input), side))
        for test, pair in zip(found["tests"], question.task.test, strict=True):
            [candidate] = test["candidates"]
            assert candidate["grid"] == grid_to_string(pair.input).splitlines()
            assert candidate["votes"] == len(question.views)


@pytest.mark.parametrize("halt", ["published", "confident"])
def test_a_row_leaves_its_batch_on_a_small_canvas(root: Path, halt: Any) -> None:
    """Answers do not depend on batches there either."""
    checkpoint = newest(config_on(root, "full").run_folder / "checkpoints")
    assert checkpoint
    found = []
    for size in (1, 4, 512):
        config = EvaluationConfig(halt=halt, batch_size=size)
        solver = TRMPredictor(checkpoint, config, CPU.device)
        undecided(solver.model.state_dict())
        answers = [solver.solve(question) for question in questions_of(root, "bucketed")]
        spent = [answer.pop("spent")["act_steps"] for answer in answers]
        grids = [[c["grid"] for t in a["tests"] for c in t["candidates"]] for a in answers]
        found.append((spent, grids))
    assert found[0] == found[1] == found[2] and any(found[0][1])


def test_what_was_trained_on_the_full_canvas_is_evaluated_on_smaller_ones(root: Path) -> None:
    """Beside the other evaluation, not in it; the protocol says on which canvas."""
    asked: dict[str, list[Question]] = {canvas: [] for canvas in CANVASES}
    outcomes = {
        canvas: quietly(config_on(root, canvas), recording(asked[canvas])) for canvas in CANVASES
    }
    full, bucketed = (outcomes[canvas] for canvas in CANVASES)
    assert full.folder != bucketed.folder and full.folder.parent == bucketed.folder.parent
    assert full.resumed == bucketed.resumed == 0
    for canvas, says in (("full", "12 x 12"), ("bucketed", "smallest of sides 11, 12")):
        protocol = outcomes[canvas].results["protocol"]
        assert says in protocol["canvas"] and protocol["puzzle ids"] == "as trained"
        assert f"canvas: {protocol['canvas']}" in describe(outcomes[canvas].results)
        assert len(asked[canvas]) == 3 and all(q.identifiers for q in asked[canvas])
    same = ("dataset fingerprint", "evaluated", "test outputs evaluated", "training data")
    for key in same:
        assert full.results["protocol"][key] == bucketed.results["protocol"][key]
    answers = [predictions(outcomes[canvas].folder) for canvas in CANVASES]
    assert answers[0]["0962bcdd"] == answers[1]["0962bcdd"], "its canvas is full in both"
    assert answers[0]["25ff71a9"] != answers[1]["25ff71a9"]
    for task, side in SIDES.items():
        for test in answers[1][task]["tests"]:
            grids = [string_to_grid("\n".join(c["grid"])) for c in test["candidates"]]
            assert grids and all(max(grid.shape) <= side for grid in grids)
    again = quietly(config_on(root, "bucketed"))
    assert again.folder == bucketed.folder and again.resumed == 3


def test_answers_have_no_part_in_what_is_asked_or_said(
    root: Path, arc1: dict[str, Task], tmp_path: Path
) -> None:
    """Garbage of any size for answers: same questions, same predictions, same submission.

    The fingerprint names the folder of the tasks, so puzzle identifiers are blank in both.
    """
    write_tasks(tmp_path / "evaluation", [poison(arc1[task]) for task in SIDES])
    checkpoint = newest(config_on(root, "full").run_folder / "checkpoints")
    assert checkpoint
    sources = {
        "training": [str(root / "training")],
        "evaluation": [str(tmp_path / "evaluation")],
    }
    ours = config_on(root, "bucketed", paths={"runs": str(tmp_path / "runs")})
    ours = replace(
        ours,
        evaluation=replace(ours.evaluation, checkpoint=str(checkpoint.folder), puzzle_ids="blank"),
    )
    theirs = config_on(root, "bucketed", paths={"data": str(tmp_path / "poisoned")}, data=sources)
    prepare(theirs.data, theirs.data_folder, lambda line: None)
    theirs = replace(
        ours,
        data=theirs.data,
        paths=replace(ours.paths, data=theirs.paths.data, runs=str(tmp_path / "other")),
    )
    told: list[list[Question]] = [[], []]
    outcomes = [
        quietly(config, recording(asked))
        for config, asked in zip((ours, theirs), told, strict=True)
    ]
    assert [(q.task, q.side, q.views) for q in told[0]] == [
        (q.task, q.side, q.views) for q in told[1]
    ]
    assert {q.task.id: q.side for q in told[1]} == SIDES
    assert predictions(outcomes[0].folder) == predictions(outcomes[1].folder)
    submissions = [json.loads((o.folder / "submission.json").read_text()) for o in outcomes]
    assert submissions[0] == submissions[1]


def test_a_weight_for_every_cell_is_not_asked_on_a_smaller_canvas(root: Path) -> None:
    """Trained on the full canvas, as it must be; then it must be evaluated there, or refused."""
    sections = {
        "trm": {"mlp_t": True, "pos_encodings": "none"},
        "training": {"steps": 1},
        "logging": {"run": "mixing"},
    }
    pretrain(config_on(root, "full", **sections), CPU)
    with pytest.raises(UserError, match=r"mlp_t"):
        quietly(config_on(root, "bucketed", **sections))


def test_the_canvas_in_a_protocol_is_that_of_the_tasks_that_were_asked(root: Path) -> None:
    """The first in order has 12 cells a side: of the others nothing was asked."""
    outcome = quietly(config_on(root, "bucketed", evaluation={"limit": 1}))
    assert outcome.results["protocol"]["evaluated"].startswith("a subset: 1 of 3")
    assert "11" not in outcome.results["protocol"]["canvas"]


@pytest.fixture(scope="module")
def hybrid_asked(root: Path) -> Callable[..., Config]:
    """hybrid_asked(feedback) -> the config to ask a hybrid, a demonstration a task held out."""
    fixed: dict[str, dict[str, Any]] = {
        "data": {"max_side": 12, "variants": 2, "canvas": "bucketed", "hold_out_demos": 1},
        "paths": {"data": str(root / "held-out")},
        "llama": {"dtype": "float64", "max_prompt_tokens": 400},
        "training": {"steps": 1, "max_attempts": 2, "train_accuracy_pairs": 0},
        "evaluation": {"variants": 2},
        "logging": {"run": "hybrid"},
    }
    config = config_on(root, "bucketed", hybrid_of, **fixed)
    prepare(config.data, config.data_folder, lambda line: None)
    change_weights(joint(config, CPU).checkpoint, undecided)
    return lambda source: config_on(
        root, "bucketed", hybrid_of, **fixed, feedback={"source": source}
    )


@pytest.mark.parametrize("source", ["confidence", "vote", "demos", "oracle"])
def test_a_hybrid_is_asked_on_the_small_canvas(
    hybrid_asked: Callable[..., Config], source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All its rows: of tests, of a held-out demonstration, of the baseline's further views."""
    cells: dict[str, set[int]] = {}
    run_attempts = HybridPredictor._run_attempts

    def spy(self: HybridPredictor, question: Question, *rest: Any) -> Any:
        turns = run_attempts(self, question, *rest)
        cells.setdefault(question.task.id, set()).update(
            len(turn.tokens) for made in turns.values() for turn in made
        )
        return turns

    monkeypatch.setattr(HybridPredictor, "_run_attempts", spy)
    outcome = quietly(hybrid_asked(source))
    assert cells == {task: {side**2} for task, side in SIDES.items()}
    assert outcome.results["notes"] == []
    assert "11, 12" in outcome.results["protocol"]["canvas"]
