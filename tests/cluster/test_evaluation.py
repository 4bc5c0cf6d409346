"""What only real Ray processes can show of evaluation."""

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
from hybrid.evaluate.trm_predictor import Prediction
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
    """Predictions without what they cost in time."""
    return {
        path.stem: json.loads(path.read_text())["tests"]
        for path in (folder / "predictions").glob("*.json")
    }


def test_actors_answer_as_one_process_does(
    ray_cluster: None, experiment: Experiment, checkpoint: Path
) -> None:
    alone = evaluate(evaluation(experiment, checkpoint, "alone", 0))
    spread = evaluate(evaluation(experiment, checkpoint, "spread", 2))
    assert len(answers(alone.folder)) == 15
    assert answers(spread.folder) == answers(alone.folder)
    assert spread.results["scores"] == alone.results["scores"]
    submissions = [(o.folder / "submission.json").read_text() for o in (alone, spread)]
    assert submissions[0] == submissions[1]


def test_a_killed_actor_loses_no_task_and_repeats_none_on_disk(
    ray_cluster: None, experiment: Experiment, checkpoint: Path
) -> None:
    config = evaluation(experiment, checkpoint, "killed", 2)
    real = predict_on_ray(config)
    came: list[str] = []

    def solve_and_kill(job: Job, questions: Sequence[Question]) -> Iterator[Prediction]:
        for prediction in real(job, questions):
            came.append(prediction["task"])
            if len(came) == 4:
                kill_one_actor()
            yield prediction

    outcome = run_evaluation(config, solve_and_kill)
    assert len(came) == len(set(came)) == 15
    alone = evaluate(evaluation(experiment, checkpoint, "alone", 0))
    assert answers(outcome.folder) == answers(alone.folder)


def kill_one_actor() -> None:
    from ray.util.state import list_actors

    alive = list_actors(filters=[("class_name", "=", "Evaluator"), ("state", "=", "ALIVE")])
    os.kill(alive[0].pid, signal.SIGKILL)
