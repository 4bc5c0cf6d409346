"""Run an evaluation: predict the tasks without a stored prediction, then score and report."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from hybrid import storage
from hybrid.arc import Task
from hybrid.checkpoint import Checkpoint, newest, read
from hybrid.config import Config
from hybrid.dataset import Dataset
from hybrid.device import compute_device
from hybrid.errors import UserError, make_folder
from hybrid.evaluate.hybrid_predictor import HybridPredictor
from hybrid.evaluate.questions import Question, select_questions
from hybrid.evaluate.records import (
    Comparison,
    Prediction,
    QuestionsKey,
    Results,
    read_prediction,
    read_results,
    write_json,
    write_prediction,
    write_results,
)
from hybrid.evaluate.report import write_report
from hybrid.evaluate.results import questions_key, score_predictions
from hybrid.evaluate.trm_predictor import TRMPredictor
from hybrid.llm import check_model

SECTIONS = {"trm": ("evaluation",), "hybrid": ("evaluation", "llama", "feedback", "adapter")}
"""Config sections hashed into the evaluation folder's name, by checkpoint kind."""
IGNORED_KEYS = {
    *("evaluation.checkpoint", "evaluation.limit", "evaluation.compare_to"),
    *("llama.model", "llama.revision", "llama.frozen", "llama.lr"),
    *("llama.prefix", "llama.max_prompt_tokens", "llama.prompt_cache"),
    *("adapter.hidden", "adapter.layers", "adapter.prefix_tokens", "adapter.lr"),
}
"""Keys left out of that hash because they cannot change a prediction.

Model and adapter keys are fixed by the checkpoint, whose digest is hashed. The others select tasks
or affect only speed or reporting.
"""
HYBRID_KEYS = {"evaluation.max_attempts", "evaluation.text", "evaluation.baseline"}
"""Keys left out of the hash for a TRM checkpoint as well: only the hybrid uses them."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """Checkpoint and config from which a worker opens a predictor; not a Ray job."""

    checkpoint: Checkpoint
    config: Config


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The folder and the results of an evaluation."""

    folder: Path
    results: Results
    resumed: int
    """Tasks whose predictions an earlier run stored."""


PredictAll = Callable[[Job, Sequence[Question]], Iterator[Prediction]]
"""Yields predictions in any order; a task without one counts as wrong."""


def predict_locally(job: Job, questions: Sequence[Question]) -> Iterator[Prediction]:
    """Predict one question after the other in this process."""
    predictor = open_predictor(job)
    for question in questions:
        yield predictor.predict(question)


def open_predictor(job: Job) -> TRMPredictor | HybridPredictor:
    """Load the predictor for the job's checkpoint onto this process's device."""
    device = compute_device(job.config.cluster.use_gpu)
    if job.checkpoint.state["kind"] == "hybrid":
        return HybridPredictor(job.checkpoint, job.config, device)
    compiled = job.config.cluster.compiles
    return TRMPredictor(job.checkpoint, job.config.evaluation, device, compiled=compiled)


def evaluate(
    config: Config, predict_all: PredictAll, say: Callable[[str], None] = print
) -> Outcome:
    """Predict every evaluation task of the dataset, store each prediction as it comes, then score.

    A rerun with the same checkpoint, dataset and settings predicts only the tasks without a stored
    prediction. `say` receives one line at the start and one per prediction. Raises UserError if
    dataset, checkpoint or language model is missing or damaged, if they do not fit each other or
    the config, if there are no evaluation tasks, or if a run in evaluation.compare_to has no
    evaluation of the same questions.
    """
    dataset = Dataset.open(config.data_folder)
    dataset.check_same_recipe(config.data)
    checkpoint = _checkpoint(config)
    _check_compatible(config, checkpoint, dataset)
    evaluated = dataset.evaluated[: config.evaluation.limit]
    if not evaluated:
        raise UserError(f"{dataset.folder}: holds no evaluation tasks (data.evaluation is empty)")
    questions = select_questions(config, checkpoint, dataset)
    key = questions_key(dataset, [question.task for question in questions])
    compare_to = [_compare_to(config, other, key) for other in config.evaluation.compare_to]
    name = _evaluation_folder_name(config, checkpoint, dataset)
    folder = config.run_folder / "evaluation" / name
    make_folder(folder / "predictions")
    # Ignore cached predictions that the store does not list.
    stored = set(storage.names(folder / "predictions"))
    predictions = {
        question.task.id: prediction
        for question in questions
        if f"{question.task.id}.json" in stored
        and (prediction := read_prediction(folder, question.task))
    }
    resumed = len(predictions)
    remaining = [question for question in questions if question.task.id not in predictions]
    say(f"{storage.uri(folder)}: {len(evaluated)} tasks, {resumed} already predicted")
    job = Job(checkpoint=checkpoint, config=config)
    started = time.monotonic()
    for prediction in predict_all(job, remaining) if remaining else ():
        predictions[prediction["task"]] = prediction
        write_prediction(folder, prediction)
        pace = (time.monotonic() - started) / (len(predictions) - resumed)
        minutes = pace * (len(evaluated) - len(predictions)) / 60
        say(f"{len(predictions)}/{len(evaluated)} {prediction['task']}, {minutes:.1f} min left")
    # Load the true outputs only now, after all predictions (feedback.source=oracle loaded them in
    # select_questions).
    answers = Dataset.open(config.data_folder, answers=True)
    tasks = [answers.tasks[task] for task in evaluated]
    results = score_predictions(config, dataset, checkpoint, tasks, predictions)
    results["compare_to"] = compare_to
    _write_outputs(folder, tasks, predictions, results)
    return Outcome(folder=folder, results=results, resumed=resumed)


def _checkpoint(config: Config) -> Checkpoint:
    if config.evaluation.checkpoint:
        return read(storage.folder(config.evaluation.checkpoint).expanduser().absolute())
    checkpoint = newest(config.run_folder / "checkpoints")
    if not checkpoint:
        raise UserError(
            f"{storage.uri(config.run_folder)}: holds no checkpoint; train first or give"
            " evaluation.checkpoint"
        )
    return checkpoint


def _check_compatible(config: Config, checkpoint: Checkpoint, dataset: Dataset) -> None:
    trm = checkpoint.state["trm"]
    if trm["seq_len"] != dataset.canvas**2:
        raise UserError(
            f"{checkpoint.folder}: trained on a canvas of {trm['seq_len']} cells,"
            f" the dataset has {dataset.canvas**2} (data.max_side={dataset.canvas})"
        )
    if dataset.bucketed and trm["mlp_t"]:
        raise UserError(
            f"{checkpoint.folder}: trm.mlp_t has a weight for every cell of the full canvas;"
            " evaluate it on a dataset with data.canvas=full"
        )
    steps = config.evaluation.act_steps
    if steps is not None and steps > trm["halt_max_steps"]:
        raise UserError(
            f"evaluation.act_steps: {steps} is more than the model's {trm['halt_max_steps']}"
        )
    if checkpoint.state["kind"] == "hybrid" and config.evaluation.halt != "published":
        raise UserError(
            f"evaluation.halt={config.evaluation.halt} applies to a TRM only: an attempt of a"
            " hybrid makes as many ACT steps as in training (training.act_steps)"
        )
    if checkpoint.state.get("llama") and config.adapter.inject != "none":
        check_model(config.llama, config.models_folder)


def _evaluation_folder_name(config: Config, checkpoint: Checkpoint, dataset: Dataset) -> str:
    """Return a folder name that differs between evaluations whose predictions could differ."""
    kind = checkpoint.state["kind"]
    ignored = IGNORED_KEYS if kind == "hybrid" else IGNORED_KEYS | HYBRID_KEYS
    settings = {
        f"{section}.{key}": value
        for section in SECTIONS[kind]
        for key, value in asdict(getattr(config, section)).items()
        if f"{section}.{key}" not in ignored
    }
    if dataset.bucketed:
        settings["canvas"] = "bucketed"
    if config.cluster.compiles:
        settings["compiled"] = True
    key = [settings, config.cluster.use_gpu, checkpoint.digest, dataset.fingerprint]
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:8]
    oracle = "-oracle" if kind == "hybrid" and config.feedback.source == "oracle" else ""
    return f"{checkpoint.name}-{digest}{oracle}"


def _compare_to(config: Config, name: str, questions: QuestionsKey) -> Comparison:
    """Return the scores of another run's newest evaluation of the same questions."""
    folder = config.runs_folder / name / "evaluation"
    found = [(folder / each, read_results(folder / each)) for each in storage.names(folder)]
    there = {path / "results.json": results for path, results in found if results}
    for path in sorted(there, key=storage.modified, reverse=True):
        other: Mapping[str, Any] = there[path]
        if questions.items() <= other["protocol"].items():
            keys = ("title", "oracle", "scores", "spent")
            return cast(Comparison, {"run": name, **{k: other[k] for k in keys if k in other}})
    raise UserError(
        f"evaluation.compare_to: {storage.uri(folder)} holds no evaluation of the same questions"
    )


def _write_outputs(
    folder: Path, tasks: Sequence[Task], predictions: Mapping[str, Prediction], results: Results
) -> None:
    if not results["oracle"]:
        submission = {task.id: _guesses(task, predictions.get(task.id)) for task in tasks}
        write_json(folder / "submission.json", submission)
    write_results(folder, results)
    write_report(folder / "report.html", tasks, predictions, results)


PLACEHOLDER = [[0, 0], [0, 0]]
"""The grid submitted for a missing prediction, as in Kaggle's sample submission."""


def _guesses(task: Task, prediction: Prediction | None) -> list[dict[str, list[list[int]]]]:
    """Return two guesses per test input, under Kaggle's keys attempt_1 and attempt_2.

    A single candidate is repeated.
    """
    guesses = []
    for index in range(len(task.test)):
        candidates = prediction["tests"][index]["candidates"][:2] if prediction else []
        grids = [[[int(cell) for cell in row] for row in c["grid"]] for c in candidates]
        grids = (grids or [PLACEHOLDER]) * 2
        guesses.append({"attempt_1": grids[0], "attempt_2": grids[1]})
    return guesses
