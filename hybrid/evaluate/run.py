"""One evaluation: what is asked, who has been answered already, and the result of it all."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybrid import storage
from hybrid.arc import Task
from hybrid.checkpoint import Checkpoint, newest, read
from hybrid.config import Config
from hybrid.dataset import Dataset
from hybrid.device import compute_device
from hybrid.errors import UserError, make_folder
from hybrid.evaluate.hybrid_predictor import HybridPredictor
from hybrid.evaluate.questions import Question, select_questions
from hybrid.evaluate.report import write_report
from hybrid.evaluate.results import questions_key, score_predictions
from hybrid.evaluate.trm_predictor import Prediction, TRMPredictor
from hybrid.llm import check_model

AFFECTS_ANSWERS = ("variants", "halt", "act_steps", "batch_size", "puzzle_ids")
"""Keys of `evaluation` that predictions depend on; batch_size by rounding alone."""
AFFECTS_HYBRID = {
    "evaluation": ("max_attempts", "text", "baseline"),
    "llama": ("dtype", "batch_size", "max_new_tokens"),
    "feedback": ("source", "threshold", "history", "cells"),
}
"""And those that a hybrid's predictions depend on as well."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a worker needs to answer questions."""

    checkpoint: Checkpoint
    config: Config


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Where everything is and what came of it."""

    folder: Path
    results: dict[str, Any]
    resumed: int
    """Tasks whose predictions were on disk already."""


PredictAll = Callable[[Job, Sequence[Question]], Iterator[Prediction]]
"""Answers questions in any order; the tasks it does not answer count as wrong."""


def predict_locally(job: Job, questions: Sequence[Question]) -> Iterator[Prediction]:
    """One after the other in this process."""
    solver = open_predictor(job)
    for question in questions:
        yield solver.solve(question)


def open_predictor(job: Job) -> TRMPredictor | HybridPredictor:
    """What answers questions from the job's checkpoint."""
    device = compute_device(job.config.cluster.use_gpu)
    if job.checkpoint.state["kind"] == "hybrid":
        return HybridPredictor(job.checkpoint, job.config, device)
    compiled = job.config.cluster.compiles
    return TRMPredictor(job.checkpoint, job.config.evaluation, device, compiled=compiled)


def evaluate(
    config: Config, predict_all: PredictAll, say: Callable[[str], None] = print
) -> Outcome:
    """Ask every evaluation task of the dataset, write each answer as it comes, then score.

    A rerun with the same checkpoint, dataset and settings finds answers on disk, asks the rest.
    """
    dataset = Dataset.open(config.data_folder)
    dataset.check_same_recipe(config.data)
    checkpoint = _checkpoint(config)
    _check(config, checkpoint, dataset)
    asked = dataset.evaluated[: config.evaluation.limit]
    if not asked:
        raise UserError(f"{dataset.folder}: holds no evaluation tasks (data.evaluation is empty)")
    questions = select_questions(config, checkpoint, dataset)
    key = questions_key(dataset, [question.task for question in questions])
    compare_to = [_compare_to(config, name, key) for name in config.evaluation.compare_to]
    folder = config.run_folder / "evaluation" / _name(config, checkpoint, dataset)
    make_folder(folder / "predictions")
    # What the store does not list was never sent, or was taken away: a copy of it is nothing.
    there = set(storage.names(folder / "predictions"))
    known = [question.task for question in questions if f"{question.task.id}.json" in there]
    for task in known:
        storage.download(folder / "predictions" / f"{task.id}.json")
    answered = {task.id: found for task in known if (found := _on_disk(folder, task))}
    resumed = len(answered)
    open_questions = [q for q in questions if q.task.id not in answered]
    say(f"{storage.uri(folder)}: {len(asked)} tasks, {resumed} already answered")
    job = Job(checkpoint=checkpoint, config=config)
    started = time.monotonic()
    for prediction in predict_all(job, open_questions) if open_questions else ():
        answered[prediction["task"]] = prediction
        _write_json(folder / "predictions" / f"{prediction['task']}.json", prediction)
        done = len(answered) - resumed
        left = (time.monotonic() - started) / done * (len(asked) - len(answered))
        say(f"{len(answered)}/{len(asked)} {prediction['task']}, {left / 60:.1f} min left")
    # Answers are read here and nowhere above, unless an oracle was asked for.
    answers = Dataset.open(config.data_folder, answers=True)
    tasks = [answers.tasks[task] for task in asked]
    results = score_predictions(config, dataset, checkpoint, tasks, answered)
    results["compare_to"] = compare_to
    _write_results(folder, tasks, answered, results)
    return Outcome(folder=folder, results=results, resumed=resumed)


def _checkpoint(config: Config) -> Checkpoint:
    if config.evaluation.checkpoint:
        return read(storage.folder(config.evaluation.checkpoint).expanduser().absolute())
    found = newest(config.run_folder / "checkpoints")
    if not found:
        raise UserError(
            f"{storage.uri(config.run_folder)}: holds no checkpoint; train first or give"
            " evaluation.checkpoint"
        )
    return found


def _check(config: Config, checkpoint: Checkpoint, dataset: Dataset) -> None:
    trm = checkpoint.state["trm"]
    if trm["seq_len"] != dataset.canvas**2:
        raise UserError(
            f"{checkpoint.folder}: trained on a canvas of {trm['seq_len']} cells,"
            f" the dataset has {dataset.canvas**2} (data.max_side={dataset.canvas})"
        )
    if dataset.bucketed and trm["mlp_t"]:
        raise UserError(
            f"{checkpoint.folder}: trm.mlp_t has a weight for every cell of the full canvas; ask it"
            " on a dataset with data.canvas=full"
        )
    steps = config.evaluation.act_steps
    if steps is not None and steps > trm["halt_max_steps"]:
        raise UserError(
            f"evaluation.act_steps: {steps} is more than the model's {trm['halt_max_steps']}"
        )
    if checkpoint.state["kind"] == "hybrid" and config.evaluation.halt != "published":
        raise UserError(
            f"evaluation.halt={config.evaluation.halt} is for a TRM alone: an attempt of a hybrid"
            " makes as many ACT steps as in training (training.act_steps)"
        )
    if checkpoint.state.get("llama") and config.adapter.inject != "none":
        check_model(config.llama, config.models_folder)


def _name(config: Config, checkpoint: Checkpoint, dataset: Dataset) -> str:
    """Evaluations that could differ in an answer have different folders."""
    settings = {key: getattr(config.evaluation, key) for key in AFFECTS_ANSWERS}
    oracle = ""
    if checkpoint.state["kind"] == "hybrid":
        for section, keys in AFFECTS_HYBRID.items():
            settings |= {f"{section}.{k}": getattr(getattr(config, section), k) for k in keys}
        settings["alone"] = config.adapter.inject == "none"
        oracle = "-oracle" if config.feedback.source == "oracle" else ""
    if dataset.bucketed:
        settings["canvas"] = "bucketed"
    if config.cluster.compiles:
        settings["compiled"] = True
    key = json.dumps([settings, config.cluster.use_gpu, checkpoint.digest, dataset.fingerprint])
    digest = hashlib.sha256(key.encode()).hexdigest()[:8]
    return f"{checkpoint.name}-{digest}{oracle}"


def _compare_to(config: Config, name: str, questions: dict[str, Any]) -> dict[str, Any]:
    """The scores of another run's newest evaluation of the same questions."""
    folder = config.runs_folder / name / "evaluation"
    results = [folder / evaluation / "results.json" for evaluation in storage.names(folder)]
    for path in results:
        storage.download(path)
    there = [path for path in results if path.exists()]
    for path in sorted(there, key=storage.modified, reverse=True):
        other = json.loads(path.read_text())
        if questions.items() <= other["protocol"].items():
            kept = ("title", "oracle", "scores", "spent")
            return {"run": name, **{key: other[key] for key in kept if key in other}}
    raise UserError(
        f"evaluation.compare_to: {storage.uri(folder)} holds no evaluation of the same questions"
    )


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
    if not results["oracle"]:
        submission = {task.id: _attempts(task, answered.get(task.id)) for task in tasks}
        _write_json(folder / "submission.json", submission)
    _write_json(folder / "results.json", results)
    write_report(folder / "report.html", tasks, answered, results)
    storage.upload(folder / "report.html")


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
    storage.upload(path)
