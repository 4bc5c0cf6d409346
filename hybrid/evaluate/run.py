"""One evaluation: what is asked, who has been answered already, and the result of it all."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybrid.arc import Task
from hybrid.checkpoint import Checkpoint, newest, read
from hybrid.config import Config, EvaluationConfig
from hybrid.context import compute_device
from hybrid.dataset import Dataset
from hybrid.errors import UserError, make_folder
from hybrid.evaluate.merge import merge
from hybrid.evaluate.report import write_report
from hybrid.evaluate.solve import Prediction, Question, Solver

AFFECTS_ANSWERS = ("variants", "halt", "act_steps", "batch_size")
"""Keys of `evaluation` that predictions depend on; batch_size by rounding alone."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a worker needs to answer questions."""

    checkpoint: Checkpoint
    config: EvaluationConfig
    use_gpu: bool


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Where everything is and what came of it."""

    folder: Path
    results: dict[str, Any]
    resumed: int
    """Tasks whose predictions were on disk already."""


SolveAll = Callable[[Job, Sequence[Question]], Iterator[Prediction]]
"""Answers questions in any order; the tasks it does not answer count as wrong."""


def local_solve_all(job: Job, questions: Sequence[Question]) -> Iterator[Prediction]:
    """One after the other in this process."""
    solver = Solver(job.checkpoint, job.config, compute_device(job.use_gpu))
    for question in questions:
        yield solver.solve(question)


def evaluate(config: Config, solve_all: SolveAll, say: Callable[[str], None] = print) -> Outcome:
    """Ask every evaluation task of the dataset, write each answer as it comes, then score.

    A rerun with the same checkpoint, dataset and settings finds answers on disk, asks the rest.
    """
    dataset = Dataset.open(config.data_folder)
    checkpoint = _checkpoint(config)
    _check(config, checkpoint, dataset)
    asked = dataset.asked[: config.evaluation.limit]
    if not asked:
        raise UserError(f"{dataset.folder}: holds no evaluation tasks (data.evaluation is empty)")
    folder = config.run_folder / "evaluation" / _name(config, checkpoint, dataset)
    make_folder(folder / "predictions")
    same_dataset = checkpoint.state["dataset"]["fingerprint"] == dataset.fingerprint
    questions = [_question(dataset, task, config.evaluation, same_dataset) for task in asked]
    answered = {q.task.id: p for q in questions if (p := _on_disk(folder, q.task))}
    resumed = len(answered)
    open_questions = [q for q in questions if q.task.id not in answered]
    say(f"{folder}: {len(asked)} tasks, {resumed} already answered")
    job = Job(checkpoint=checkpoint, config=config.evaluation, use_gpu=config.cluster.use_gpu)
    for prediction in solve_all(job, open_questions) if open_questions else ():
        answered[prediction["task"]] = prediction
        _write_json(folder / "predictions" / f"{prediction['task']}.json", prediction)
        say(f"{len(answered)}/{len(asked)} {prediction['task']}")
    # Answers are read here and nowhere above.
    answers = Dataset.open(config.data_folder, answers=True)
    tasks = [answers.tasks[task] for task in asked]
    trained_on = json.loads((checkpoint.folder / "trained_on.json").read_text())
    results = merge(config, dataset, checkpoint, tasks, answered, trained_on)
    _write_results(folder, tasks, answered, results)
    return Outcome(folder=folder, results=results, resumed=resumed)


def _checkpoint(config: Config) -> Checkpoint:
    if config.evaluation.checkpoint:
        return read(Path(config.evaluation.checkpoint).expanduser().absolute())
    found = newest(config.run_folder / "checkpoints")
    if not found:
        raise UserError(
            f"{config.run_folder}: holds no checkpoint; train first or give evaluation.checkpoint"
        )
    return found


def _check(config: Config, checkpoint: Checkpoint, dataset: Dataset) -> None:
    trm = checkpoint.state["trm"]
    if trm["seq_len"] != dataset.canvas**2:
        raise UserError(
            f"{checkpoint.folder}: trained on a canvas of {trm['seq_len']} cells,"
            f" the dataset has {dataset.canvas**2} (data.max_side={dataset.canvas})"
        )
    steps = config.evaluation.act_steps
    if steps is not None and steps > trm["halt_max_steps"]:
        raise UserError(
            f"evaluation.act_steps: {steps} is more than the model's {trm['halt_max_steps']}"
        )


def _question(
    dataset: Dataset, task: int, config: EvaluationConfig, same_dataset: bool
) -> Question:
    first, stop = (int(v) for v in dataset.first_variant[task : task + 2])
    if config.variants is not None:
        stop = min(stop, first + config.variants)
    return Question(
        task=dataset.tasks[task],
        views=tuple(dataset.augmentation(variant) for variant in range(first, stop)),
        identifiers=range(first + 1, stop + 1) if same_dataset else range(0),
    )


def _name(config: Config, checkpoint: Checkpoint, dataset: Dataset) -> str:
    """Evaluations that could differ in an answer have different folders."""
    settings = {key: getattr(config.evaluation, key) for key in AFFECTS_ANSWERS}
    key = json.dumps([settings, config.cluster.use_gpu, checkpoint.digest, dataset.fingerprint])
    return f"{checkpoint.folder.name}-{hashlib.sha256(key.encode()).hexdigest()[:8]}"


def _on_disk(folder: Path, task: Task) -> Prediction | None:
    """A task's answer from an earlier run, if it is whole."""
    try:
        found: Prediction = json.loads((folder / "predictions" / f"{task.id}.json").read_text())
        whole = found["task"] == task.id and len(found["tests"]) == len(task.test)
        whole = whole and "spent" in found and all("candidates" in test for test in found["tests"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if whole else None


def _write_results(
    folder: Path, tasks: Sequence[Task], answered: dict[str, Prediction], results: dict[str, Any]
) -> None:
    submission = {task.id: _attempts(task, answered.get(task.id)) for task in tasks}
    _write_json(folder / "submission.json", submission)
    _write_json(folder / "results.json", results)
    write_report(folder / "report.html", tasks, answered, results)


NO_ANSWER = [[0, 0], [0, 0]]
"""Kaggle wants a grid in every place; this is what its sample submission has."""


def _attempts(task: Task, prediction: Prediction | None) -> list[dict[str, list[list[int]]]]:
    """Both attempts for every test input, in order; one candidate is given twice."""
    attempts = []
    for index in range(len(task.test)):
        candidates = prediction["tests"][index]["candidates"][:2] if prediction else []
        grids = [[[int(cell) for cell in row] for row in c["grid"]] for c in candidates]
        grids = (grids or [NO_ANSWER]) * 2
        attempts.append({"attempt_1": grids[0], "attempt_2": grids[1]})
    return attempts


def _write_json(path: Path, value: Any) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(value) + "\n")
    os.replace(temporary, path)
