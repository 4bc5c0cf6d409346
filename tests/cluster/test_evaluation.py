"""Evaluation on real Ray actors."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from hybrid.cluster.evaluator import predict_on_ray
from hybrid.config import Config
from hybrid.evaluate import Job, Question
from hybrid.evaluate import evaluate as run_evaluation
from hybrid.evaluate.records import Prediction
from hybrid.launch import evaluate, pretrain

Experiment = Callable[..., Config]

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def checkpoint(experiment: Experiment) -> Path:
    config = experiment("solver", cluster={"num_workers": 0})
    return pretrain(config).checkpoint


def evaluation(experiment: Experiment, checkpoint: Path, run: str, workers: int) -> Config:
    return experiment(
        run,
        evaluation={"checkpoint": str(checkpoint)},
        cluster={"num_workers": workers},
    )


def answers(folder: Path) -> dict[str, object]:
    """Return the predicted outputs by task, without timings."""
    return {
        path.stem: json.loads(path.read_text())["tests"]
        for path in (folder / "predictions").glob("*.json")
    }


def test_actors_give_the_same_predictions_as_one_process(
    ray_cluster: None, experiment: Experiment, checkpoint: Path
) -> None:
    local = evaluate(evaluation(experiment, checkpoint, "alone", 0))
    on_ray = evaluate(evaluation(experiment, checkpoint, "spread", 2))
    assert len(answers(local.folder)) == 15
    assert answers(on_ray.folder) == answers(local.folder)
    assert on_ray.results["scores"] == local.results["scores"]
    submissions = [(o.folder / "submission.json").read_text() for o in (local, on_ray)]
    assert submissions[0] == submissions[1]


def test_killed_actor_loses_and_repeats_no_task(
    ray_cluster: None, experiment: Experiment, checkpoint: Path
) -> None:
    config = evaluation(experiment, checkpoint, "killed", 2)
    predict = predict_on_ray(config)
    completed: list[str] = []

    def predict_and_kill(job: Job, questions: Sequence[Question]) -> Iterator[Prediction]:
        for prediction in predict(job, questions):
            completed.append(prediction["task"])
            if len(completed) == 4:
                kill_one_actor()
            yield prediction

    outcome = run_evaluation(config, predict_and_kill)
    assert len(completed) == len(set(completed)) == 15
    local = evaluate(evaluation(experiment, checkpoint, "alone", 0))
    assert answers(outcome.folder) == answers(local.folder)


def kill_one_actor() -> None:
    from ray.util.state import list_actors

    alive = list_actors(filters=[("class_name", "=", "Evaluator"), ("state", "=", "ALIVE")])
    os.kill(alive[0].pid, signal.SIGKILL)
