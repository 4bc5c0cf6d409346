"""Inputs of a hybrid: no answers, no held-out demonstrations, and the marks of the oracle."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    EVALUATED,
    assert_close,
    change_weights,
    hybrid_of,
    poison,
    predictions,
    quietly,
    randomize_halt_head,
    recording,
    write_tasks,
)

from hybrid.arc import Task, pair_hash, string_to_grid
from hybrid.config import Config
from hybrid.context import LocalContext
from hybrid.dataset import Dataset, Stream, prepare
from hybrid.errors import UserError
from hybrid.evaluate import Job, Outcome, Question, describe, predict_locally
from hybrid.evaluate.records import Prediction
from hybrid.llm import Prompt, Reader
from hybrid.train import joint

MakeConfig = Callable[..., Config]
Arc = dict[str, Task]
HONEST = ("none", "confidence", "vote", "demos")


@pytest.fixture
def read_tasks(monkeypatch: pytest.MonkeyPatch) -> list[Task]:
    """Record all problems that are formatted as prompts during the test."""
    recorded: list[Task] = []
    prompt = Reader.prompt

    def record(self: Reader, task: Task, test: int = 0) -> Prompt:
        recorded.append(task)
        return prompt(self, task, test)

    monkeypatch.setattr(Reader, "prompt", record)
    return recorded


@pytest.fixture(scope="module")
def train_on(tmp_path_factory: pytest.TempPathFactory, arc1: Arc) -> Callable[..., Config]:
    """train_on(name, tasks): prepare and train a hybrid with these evaluation tasks."""
    root = tmp_path_factory.mktemp("train_on")
    write_tasks(root / "training", [arc1["74dd1130"]])

    def train(name: str, tasks: list[Task]) -> Config:
        write_tasks(root / "evaluation", tasks)
        config = hybrid_of(
            root,
            paths={"data": str(root / name)},
            data={"max_side": 3, "hold_out_demos": 1},
            training={"steps": 2, "lr": 1e-3},
            adapter={"lr": 1e-2},
            feedback={"threshold": 0.4},
            evaluation={"variants": 3},
            logging={"run": name},
        )
        prepare(config.data, config.data_folder, lambda line: None)
        change_weights(
            joint(config, LocalContext(torch.device("cpu"))).checkpoint, randomize_halt_head
        )
        return config

    return train


def with_feedback(config: Config, source: str) -> Config:
    return replace(config, feedback=replace(config.feedback, source=source))


def as_predicted(task: Task, outcome: Outcome) -> Task:
    """Return the task with the winner after attempt 1, before any feedback, as the answer."""
    tests = predictions(outcome.folder)[task.id]["tests"]
    first = [string_to_grid("\n".join(test["curve"][0][0]["grid"])) for test in tests]
    pairs = zip(task.test, first, strict=True)
    return replace(task, test=tuple(replace(pair, output=grid) for pair, grid in pairs))


def test_only_the_oracle_lets_answers_change_predictions(train_on: Any, arc1: Arc) -> None:
    """End to end from preparation, with real, garbage and self-predicted answers."""
    real = [arc1[task] for task in EVALUATED]
    clean = train_on("clean", real)
    outcomes = {source: quietly(with_feedback(clean, source)) for source in (*HONEST, "oracle")}
    variations = {
        "garbage": [poison(task) for task in real],
        "predicted": [as_predicted(task, outcomes["none"]) for task in real],
    }
    step = "checkpoints/step_00000002"
    for name, tasks in variations.items():
        config = train_on(name, tasks)
        assert_close(clean.run_folder / step, config.run_folder / step, 0, 0)
        for source in HONEST:
            outcome = quietly(with_feedback(config, source))
            assert predictions(outcome.folder) == predictions(outcomes[source].folder), source
            files = [
                (o.folder / "submission.json").read_bytes() for o in (outcome, outcomes[source])
            ]
            assert files[0] == files[1], source
        outcome = quietly(with_feedback(config, "oracle"))
        assert predictions(outcome.folder) != predictions(outcomes["oracle"].folder)
    assert outcome.results["spent"]["attempts"] < outcomes["none"].results["spent"]["attempts"]
    attempts = {source: outcomes[source].results["spent"]["attempts"] for source in HONEST}
    assert attempts["confidence"] < attempts["none"], "no row stopped early"


def test_oracle_results_are_marked_and_have_no_submission(
    make_hybrid_config: MakeConfig,
) -> None:
    outcome = quietly(make_hybrid_config(feedback={"source": "oracle"}))
    assert outcome.folder.name.endswith("-oracle")
    written = {path.name for path in outcome.folder.iterdir()}
    assert written == {"predictions", "results.json", "report.html"}
    found = json.loads((outcome.folder / "results.json").read_text())
    assert found["oracle"] is True and "LOOKED AT" in found["protocol"]["feedback"]
    assert all(p["oracle"] is True for p in predictions(outcome.folder).values())
    assert "ORACLE" in describe(outcome.results)
    honest = quietly(make_hybrid_config())
    assert honest.folder != outcome.folder and honest.results["oracle"] is False
    assert (honest.folder / "submission.json").exists()
    assert all(p["oracle"] is False for p in predictions(honest.folder).values())


def test_only_oracle_questions_hold_answers(make_hybrid_config: MakeConfig, arc1: Arc) -> None:
    for source in (*HONEST, "oracle"):
        questions: list[Question] = []
        quietly(make_hybrid_config(feedback={"source": source}), recording(questions))
        assert [question.task.id for question in questions] == sorted(EVALUATED)
        for question in questions:
            assert all(pair.output is None for pair in question.task.test)
            if source == "oracle":
                real = [pair.output for pair in arc1[question.task.id].test]
                assert question.answers is not None
                for answer, output in zip(question.answers, real, strict=True):
                    assert np.array_equal(answer, output)  # type: ignore[arg-type]
            else:
                assert question.answers is None
            assert (question.held_out is not None) == (source == "demos")


def test_oracle_without_known_answers_is_rejected(
    make_hybrid_config: MakeConfig, arc1: Arc, tmp_path: Path
) -> None:
    challenges = tmp_path / "x_challenges.json"
    write_tasks(tmp_path / "unknown", [arc1[task].without_answers() for task in EVALUATED])
    tasks = {p.stem: json.loads(p.read_text()) for p in (tmp_path / "unknown").iterdir()}
    challenges.write_text(json.dumps(tasks))
    data = {"training": [], "evaluation": [str(challenges)]}
    paths = {"data": str(tmp_path / "unknown-data")}
    config = make_hybrid_config(data=data, paths=paths, feedback={"source": "oracle"})
    prepare(config.data, config.data_folder, lambda line: None)
    with pytest.raises(UserError, match="the answers of 25ff71a9 are not known"):
        quietly(config)


def test_held_out_demonstrations_are_in_no_training_row_and_no_prompt(
    hybrid: Config, make_hybrid_config: MakeConfig, read_tasks: list[Task]
) -> None:
    dataset = Dataset.open(hybrid.data_folder)
    held_out = {task: dataset.held_out(task) for task in dataset.evaluated}
    assert {len(pairs) for pairs in held_out.values()} == {1}
    held_out_pairs = {pair_hash(pair) for pairs in held_out.values() for pair in pairs}
    in_variants = {
        pair_hash(replace(pair, input=variant.apply(pair.input), output=variant.apply(pair.output)))
        for task, pairs in held_out.items()
        for variant in map(
            dataset.augmentation, range(*dataset.first_variant[task : task + 2].tolist())
        )
        for pair in pairs
    }
    assert held_out_pairs <= in_variants
    assert not held_out_pairs & {pair_hash(pair) for pair in Stream(dataset, 0).pairs}
    trained = hybrid.run_folder / "checkpoints/step_00000004/trained_on.json"
    assert not held_out_pairs & set(json.loads(trained.read_text()))
    outcome = quietly(make_hybrid_config(feedback={"source": "demos"}))
    read_tasks += [dataset.problem_at(*problem) for problem in dataset.problems(None)]
    rerun = replace(hybrid, logging=replace(hybrid.logging, run="read"))
    joint(rerun, LocalContext(torch.device("cpu")))
    shown = [pair_hash(pair) for task in read_tasks for pair in task.train]
    assert len(shown) > 500 and not in_variants & set(shown)
    assert all(pair.output is None for task in read_tasks for pair in task.test)
    inputs = {name.partition("|")[0] for name in in_variants}
    read_inputs = {pair_hash(task.test[0]).partition("|")[0] for task in read_tasks}
    assert read_inputs & inputs, "no held-out input was evaluated"
    feedback = [
        attempt["feedback"]
        for p in predictions(outcome.folder).values()
        for test in p["tests"]
        for attempt in test["attempts"]
    ]
    assert all("on a held-out example" in line for line in feedback)


def test_demos_feedback_needs_demonstrations_unseen_in_training(
    make_hybrid_config: MakeConfig, hybrid: Config, tmp_path: Path
) -> None:
    """Rejected without held-out demonstrations, and if the checkpoint was trained on them."""
    feedback = {"feedback": {"source": "demos"}}
    paths = {"data": str(tmp_path / "all")}
    no_hold_out = make_hybrid_config(data={"hold_out_demos": 0}, paths=paths, **feedback)
    prepare(no_hold_out.data, no_hold_out.data_folder, lambda line: None)
    with pytest.raises(UserError, match=r"no demonstration was held out.*hold_out_demos=1"):
        quietly(no_hold_out)
    training = replace(no_hold_out.training, steps=1)
    blind = replace(with_feedback(no_hold_out, "none"), training=training)
    trained = joint(blind, LocalContext(torch.device("cpu")))
    late = make_hybrid_config(evaluation={"checkpoint": str(trained.checkpoint)}, **feedback)
    with pytest.raises(UserError, match="trained on the held-out demonstrations of 3 tasks"):
        quietly(late)


def test_vote_feedback_needs_two_variants(make_hybrid_config: MakeConfig) -> None:
    with pytest.raises(UserError, match=r"feedback\.source=vote: .* has one variant"):
        quietly(make_hybrid_config(feedback={"source": "vote"}, evaluation={"variants": 1}))


def test_shuffled_text_is_a_permutation_of_other_tasks(
    make_hybrid_config: MakeConfig, read_tasks: list[Task], hybrid: Config
) -> None:
    """The permutation does not depend on evaluation.limit, so stored predictions stay valid."""
    questions: list[Question] = []
    shuffled = {"text": "shuffled"}
    outcome = quietly(make_hybrid_config(evaluation=shuffled), recording(questions))
    others = [q.read_instead.id for q in questions if q.read_instead]
    assert sorted(others) == sorted(EVALUATED)
    assert all(q.read_instead and q.read_instead.id != q.task.id for q in questions)
    dataset = Dataset.open(hybrid.data_folder)
    for question in questions:
        assert question.read_instead is not None
        row = [task.id for task in dataset.tasks].index(question.read_instead.id)
        assert question.read_instead.train == dataset.demonstrations(row)
    own = quietly(make_hybrid_config("own"))
    assert own.results["protocol"]["text"] == "own"
    assert outcome.results["protocol"]["text"] == "shuffled"
    assert predictions(own.folder) != predictions(outcome.folder)
    read_tasks.clear()
    limited = quietly(make_hybrid_config("limited", evaluation=shuffled | {"limit": 1}))
    assert {task.id.split("|")[0] for task in read_tasks} == {others[0]}
    first = predictions(outcome.folder)[questions[0].task.id]
    assert predictions(limited.folder) == {questions[0].task.id: first}


def test_interrupted_evaluation_resumes_with_the_remaining_tasks(
    make_hybrid_config: MakeConfig,
) -> None:
    class Stop(Exception):
        pass

    def stopping(job: Job, questions: Sequence[Question]) -> Iterator[Prediction]:
        for number, prediction in enumerate(predict_locally(job, questions)):
            if number == 2:
                raise Stop
            yield prediction

    with pytest.raises(Stop):
        quietly(make_hybrid_config(), stopping)
    remaining: list[Question] = []
    outcome = quietly(make_hybrid_config(), recording(remaining))
    assert [question.task.id for question in remaining] == sorted(EVALUATED)[
        2:
    ] and outcome.resumed == 2
    uninterrupted = quietly(make_hybrid_config("uninterrupted"))
    assert predictions(outcome.folder) == predictions(uninterrupted.folder)
    for key in ("scores", "curve", "baseline", "coverage", "protocol"):
        assert outcome.results[key] == uninterrupted.results[key], key
