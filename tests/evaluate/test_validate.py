"""Checkpoints are validated on held-out training tasks only."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import assert_close, config_of, hybrid_of, metrics, poison, quietly, write_tasks

from hybrid.arc import Task, load_tasks, pair_hash
from hybrid.config import Config
from hybrid.context import LocalContext
from hybrid.dataset import Dataset, prepare
from hybrid.errors import UserError
from hybrid.evaluate import Validation, validate
from hybrid.train import Joint, Pretraining, check, joint, parse_metrics, pretrain, validated

CPU = LocalContext(torch.device("cpu"))
HELD = 5


def validations(config: Config) -> dict[int, Any]:
    """Return the validations recorded in metrics.jsonl, by step."""
    return validated(parse_metrics((config.run_folder / "metrics.jsonl").read_bytes()))


def silent(line: str) -> None:
    pass


def experiment(root: Path, make: Callable[..., Config] = config_of, **sections: Any) -> Config:
    data = {"training": ["arc1-training"], "evaluation": [], "max_side": 3, "on_overlap": "drop"}
    data |= {"variants": 3}
    sections["data"] = data | {"hold_out_tasks": HELD} | sections.get("data", {})
    training = {"lr": 1e-2, "puzzle_lr": 0.1, "lr_warmup_steps": 0, "train_accuracy_pairs": 0}
    sections["training"] = training | sections.get("training", {})
    return make(root, **sections)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The 15 ARC-1 training tasks that fit a 3 x 3 canvas, 5 of them held out."""
    root = tmp_path_factory.mktemp("validated")
    config = experiment(root)
    prepare(config.data, config.data_folder, silent)
    return root


@pytest.fixture(scope="module")
def trm(root: Path) -> Config:
    config = experiment(root, logging={"run": "trm"}, training={"steps": 40, "save_every": 10})
    pretrain(config, CPU)
    return config


@pytest.fixture(scope="module")
def hybrid(root: Path) -> Config:
    training = {"steps": 12, "save_every": 6}
    config = experiment(root, hybrid_of, logging={"run": "hybrid"}, training=training)
    joint(config, CPU)
    return config


def last(config: Config) -> Path:
    return max((config.run_folder / "checkpoints").glob("step_*"))


@pytest.mark.parametrize("side", [3, 6])
def test_tests_of_held_out_tasks_are_not_trained_on(side: int, tmp_path: Path) -> None:
    data = {"max_side": side, "hold_out_tasks": 7}
    config = experiment(tmp_path, data=data, training={"steps": 1, "save_every": 1})
    meta = prepare(config.data, config.data_folder, silent)
    dataset = Dataset.open(config.data_folder, answers=True)
    fit = {task.id: task for task in load_tasks("arc1-training") if task.max_side <= side}
    here = {task.id for task in dataset.tasks}
    assert here | set(meta["excluded"]["leaking"]) == fit.keys()
    assert len(dataset.evaluated) == 7 == meta["counts"]["evaluation_tasks"]
    held = [fit[dataset.tasks[row].id] for row in dataset.evaluated]
    trained = {pair_hash(p) for t in range(len(here)) for p in dataset.training_pairs(t)}
    for task in held:
        assert all(pair_hash(pair) not in trained for pair in task.test)
        assert all(pair_hash(pair) in trained for pair in task.train)
    checkpoint = pretrain(config, CPU).checkpoint
    assert set(json.loads((checkpoint / "trained_on.json").read_text())) == trained


def test_seed_selects_the_held_out_tasks(tmp_path: Path) -> None:
    def held_out(name: str, seed: int, held: int = 5) -> set[str]:
        data = {"seed": seed, "hold_out_tasks": held}
        config = experiment(tmp_path, data=data, paths={"data": str(tmp_path / name)})
        prepare(config.data, config.data_folder, silent)
        dataset = Dataset.open(config.data_folder)
        return {dataset.tasks[row].id for row in dataset.evaluated}

    assert held_out("a", 0) == held_out("b", 0) != held_out("c", 1)
    assert len({frozenset(held_out(f"s{seed}", seed)) for seed in range(3)}) > 1


def test_training_task_with_a_held_out_test_is_rejected_or_dropped(
    tmp_path: Path, arc1: dict[str, Task]
) -> None:
    """Every task has a copy under another id, so each held-out task leaks through its copy."""
    tasks = [task for task in arc1.values() if task.max_side <= 3][:6]
    copies = [replace(task, id=f"copy{n}", train=task.train[::-1]) for n, task in enumerate(tasks)]
    write_tasks(tmp_path / "tasks", [*tasks, *copies])
    data = {"training": [str(tmp_path / "tasks")], "hold_out_tasks": 2}
    config = experiment(tmp_path, data=data | {"on_overlap": "refuse"})
    with pytest.raises(UserError, match=r"contain a test of an evaluation task"):
        prepare(config.data, config.data_folder, silent)
    config = experiment(tmp_path, data=data)
    meta = prepare(config.data, config.data_folder, silent)
    dropped = meta["excluded"]["leaking"]
    dataset = Dataset.open(config.data_folder, answers=True)
    assert dropped and not {task.id for task in dataset.tasks} & set(dropped)
    trained = {pair_hash(p) for t in range(len(dataset.tasks)) for p in dataset.training_pairs(t)}
    tests = {pair_hash(p) for row in dataset.evaluated for p in dataset.tasks[row].test}
    assert not trained & tests


@pytest.mark.parametrize("count", [15, 400])
def test_holding_out_all_tasks_or_more_is_rejected(count: int, tmp_path: Path) -> None:
    config = experiment(tmp_path, data={"hold_out_tasks": count})
    with pytest.raises(UserError, match=rf"data\.hold_out_tasks={count}: must be less than the 15"):
        prepare(config.data, config.data_folder, silent)
    assert not config.data_folder.exists()


def test_held_out_tasks_with_an_evaluation_set_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"requires evaluation=\[\]"):
        experiment(tmp_path, data={"evaluation": ["arc1-evaluation"]})


@pytest.mark.parametrize("kind", ["trm", "hybrid"])
def test_validation_equals_pass_at_2_of_an_evaluation(
    kind: str, request: pytest.FixtureRequest
) -> None:
    config: Config = request.getfixturevalue(kind)
    found = validate(config, last(config), CPU.device)
    outcome = quietly(replace(config, evaluation=replace(config.evaluation, baseline=False)))
    scores = outcome.results["scores"]["pass@2"]
    assert scores["outputs"]["numerator"] == found.right
    assert scores["outputs"]["denominator"] == found.evaluated
    assert found.evaluated > 1 and found.objective == (found.right + found.cells) / (
        found.evaluated + 1
    )
    assert validations(config)[40 if kind == "trm" else 12] == found


def test_every_planned_checkpoint_is_validated(trm: Config, hybrid: Config) -> None:
    assert list(validations(trm)) == [10, 20, 30, 40]
    assert list(validations(hybrid)) == [6, 12]


@pytest.mark.parametrize("kind", ["trm", "hybrid"])
def test_validation_does_not_change_training(
    kind: str, root: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    validating: Config = request.getfixturevalue(kind)
    unseen = Validation(right=0, evaluated=1, cells=0.0)
    for module in (Pretraining, Joint):
        monkeypatch.setattr(module, "validate", lambda self, checkpoint: unseen)
    config = replace(validating, logging=replace(validating.logging, run=f"{kind}-unvalidated"))
    (pretrain if kind == "trm" else joint)(config, CPU)
    assert_close(last(config), last(validating), 0, 0)


def test_answers_do_not_change_the_attempts_of_a_validation(
    hybrid: Config, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Poisoned answers change the score and no attempt, even with feedback.source=oracle."""
    from hybrid.evaluate.hybrid_predictor import HybridPredictor

    made: list[dict[str, Any]] = []
    predict = HybridPredictor.predict

    def record(self: HybridPredictor, question: Any) -> Any:
        assert question.answers is None
        assert all(pair.output is None for pair in question.task.test)
        prediction = predict(self, question)
        made.append({k: v for k, v in prediction.items() if k != "spent"})
        return prediction

    monkeypatch.setattr(HybridPredictor, "predict", record)
    oracle = replace(hybrid, feedback=replace(hybrid.feedback, source="oracle"))
    honest = validate(oracle, last(hybrid), CPU.device)
    seen, made = made, []
    opened = Dataset.open

    def poisoned(folder: Path, *, answers: bool = False) -> Dataset:
        dataset = opened(folder, answers=answers)
        return replace(dataset, tasks=tuple(map(poison, dataset.tasks))) if answers else dataset

    monkeypatch.setattr(Dataset, "open", staticmethod(poisoned))
    garbage = validate(oracle, last(hybrid), CPU.device)
    assert seen == made and len(seen) == HELD
    assert garbage.evaluated == honest.evaluated and garbage.cells != honest.cells, (
        "the poisoned answers were not scored"
    )


def test_validation_of_oracle_training_uses_no_feedback(root: Path) -> None:
    sections = {"feedback": {"source": "oracle"}, "training": {"steps": 2}}
    oracle = experiment(root, hybrid_of, logging={"run": "oracle"}, **sections)
    found = joint(oracle, CPU).validation
    none = replace(oracle, feedback=replace(oracle.feedback, source="none"))
    assert found == validate(none, last(oracle), CPU.device)


def test_init_from_a_model_trained_on_held_out_tests_is_rejected(root: Path) -> None:
    data = {"hold_out_tasks": 0}
    paths = {"data": str(root / "everything")}
    contaminated = experiment(root, data=data, paths=paths, logging={"run": "contaminated"})
    prepare(contaminated.data, contaminated.data_folder, silent)
    pretrain(contaminated, CPU)
    config = experiment(root, hybrid_of, trm={"init_from": "contaminated"}, logging={"run": "new"})
    with pytest.raises(UserError, match=rf"trained on the tests of {HELD} of the {HELD} held-out"):
        check(config, Joint.kind, Joint.sections)


def test_init_from_a_model_of_the_same_dataset_is_accepted(root: Path, trm: Config) -> None:
    config = experiment(root, hybrid_of, trm={"init_from": "trm"}, logging={"run": "started"})
    check(config, Joint.kind, Joint.sections)
    assert joint(config, CPU).validation is not None


@pytest.mark.parametrize("kind", ["trm", "hybrid"])
def test_checkpoint_saved_before_a_kill_is_validated_after_the_restart(
    kind: str, root: Path, request: pytest.FixtureRequest
) -> None:
    whole: Config = request.getfixturevalue(kind)
    config = replace(whole, logging=replace(whole.logging, run=f"{kind}-killed"))
    shutil.copytree(whole.run_folder, config.run_folder)
    path = config.run_folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    assert "validation/right" in lines[-1]
    path.write_text("".join(lines[:-1]))
    result = (pretrain if kind == "trm" else joint)(config, CPU)
    assert metrics(config.run_folder) == metrics(whole.run_folder)
    assert result.validation == validations(whole)[result.step]


@pytest.mark.parametrize(
    ("grid", "answer", "share"),
    [
        ([[1, 2], [3, 4]], [[1, 2], [3, 4]], 1.0),
        ([[1, 2], [3, 4]], [[1, 2], [3, 0]], 0.75),
        ([[1, 2, 3]], [[1, 2]], 2 / 3),
        ([[1], [1]], [[1, 1]], 1 / 3),
        ([[5]], [[4]], 0.0),
    ],
)
def test_cell_share_counts_cells_present_in_both_grids(
    grid: list[list[int]], answer: list[list[int]], share: float
) -> None:
    from hybrid.evaluate.validate import cell_share

    one, other = (np.array(g, np.uint8) for g in (grid, answer))
    assert cell_share(one, other) == cell_share(other, one) == pytest.approx(share)
    assert cell_share(np.zeros((0, 0), np.uint8), other) == 0.0


def test_objective_ranks_outputs_before_cells() -> None:
    fewer = Validation(right=2, evaluated=9, cells=1.0)
    more = Validation(right=3, evaluated=9, cells=0.0)
    assert fewer.objective <= more.objective
    assert Validation(right=9, evaluated=9, cells=1.0).objective == 1.0
    assert (
        Validation(right=2, evaluated=9, cells=0.4).objective
        < Validation(right=2, evaluated=9, cells=0.5).objective
    )
