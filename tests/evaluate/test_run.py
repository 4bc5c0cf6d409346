"""What an evaluation asks, keeps, resumes and reports."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    ASKED,
    StuckAt,
    change_weights,
    config_of,
    poison,
    predictions,
    recording,
    undecided,
    write_tasks,
)
from helpers import quietly as evaluate
from safetensors.torch import load_file

from hybrid.arc import Pair, Task, grid_to_string, string_to_grid
from hybrid.checkpoint import Checkpoint
from hybrid.config import Config
from hybrid.context import LocalContext
from hybrid.dataset import Dataset, prepare
from hybrid.errors import UserError
from hybrid.evaluate import Job, Outcome, Question, describe, predict_locally
from hybrid.evaluate import evaluate as evaluate_loudly
from hybrid.evaluate.run import PredictAll
from hybrid.evaluate.trm_predictor import Prediction
from hybrid.train import pretrain

Ask = Callable[..., Config]
Arc = dict[str, Task]
PLACEHOLDER = {"attempt_1": [[0, 0], [0, 0]], "attempt_2": [[0, 0], [0, 0]]}


def submission(outcome: Outcome) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((outcome.folder / "submission.json").read_text())
    return found


def results(outcome: Outcome) -> dict[str, Any]:
    """Without what names the run, and the seconds."""
    found = {key: value for key, value in outcome.results.items() if key != "title"}
    return found | {"spent": {k: v for k, v in found["spent"].items() if k != "seconds"}}


def answering(answers: dict[str, list[list[list[str]]]]) -> PredictAll:
    """Gives these candidates, by task and test; to tasks that are not among them, no answer."""

    def predict_all(job: Job, questions: Sequence[Question]) -> Iterator[Prediction]:
        for question in questions:
            if question.task.id in answers:
                tests = [
                    {
                        "candidates": [{"grid": g, "votes": 1, "confidence": 0.5} for g in grids],
                        "variants": 1,
                        "empty": 0,
                    }
                    for grids in answers[question.task.id]
                ]
                spent = {"rows": 1, "act_steps": 1, "seconds": 0.0}
                yield {"task": question.task.id, "tests": tests, "spent": spent}

    return predict_all


def right(task: Task) -> list[list[list[str]]]:
    """The answers as candidates that are exactly right."""
    return [
        [grid_to_string(pair.output).split("\n")] for pair in task.test if pair.output is not None
    ]


def test_no_answer_reaches_a_prediction(tmp_path: Path, arc1: Arc) -> None:
    """End to end, from preparing to the submission, on real answers, garbage and flattery."""
    write_tasks(tmp_path / "training", [arc1["74dd1130"]])
    real = [arc1[task] for task in ASKED]

    def everything(name: str, tasks: list[Task]) -> tuple[Path, Outcome]:
        write_tasks(tmp_path / "evaluation", tasks)
        config = config_of(
            tmp_path,
            paths={"data": str(tmp_path / name)},
            data={"max_side": 3},
            logging={"run": name},
        )
        prepare(config.data, config.data_folder, lambda line: None)
        folder = pretrain(config, LocalContext(torch.device("cpu"))).checkpoint
        return folder, evaluate(config)

    clean = everything("clean", real)
    garbage = everything("garbage", [poison(task) for task in real])
    flattery = everything("flattery", [as_predicted(task, clean[1]) for task in real])
    assert any(p["tests"][0]["candidates"] for p in predictions(clean[1].folder).values())
    for folder, outcome in (garbage, flattery):
        for path in clean[0].glob("*.safetensors"):
            a, b = load_file(path), load_file(folder / path.name)
            assert all(torch.equal(a[key], b[key]) for key in a), path.name
        assert predictions(outcome.folder) == predictions(clean[1].folder)
        assert submission(outcome) == submission(clean[1])
    scores = [o.results["scores"]["pass@1"]["outputs"] for _, o in (clean, garbage, flattery)]
    assert scores[1]["numerator"] == 0 < scores[2]["numerator"]
    assert {score["denominator"] for score in scores} == {5}


def as_predicted(task: Task, outcome: Outcome) -> Task:
    """The task with the model's first candidates for answers, where it has any."""
    tests = predictions(outcome.folder)[task.id]["tests"]

    def answer(pair: Pair, test: dict[str, Any]) -> Pair:
        if not test["candidates"]:
            return pair
        return replace(pair, output=string_to_grid("\n".join(test["candidates"][0]["grid"])))

    return replace(task, test=tuple(map(answer, task.test, tests)))


def test_a_question_with_an_answer_is_refused(arc1: Arc) -> None:
    task = arc1[ASKED[0]]
    Question(task=task.without_answers(), side=5, views=(), identifiers=range(0))
    half = replace(task, test=(task.test[0], *task.without_answers().test[1:]))
    for leaking in (task, half):
        with pytest.raises(AssertionError, match="an answer in a question"):
            Question(task=leaking, side=5, views=(), identifiers=range(0))


def test_every_task_is_asked_without_answers_in_all_its_views(select_questions: Ask) -> None:
    asked: list[Question] = []
    config = select_questions()
    evaluate(config, recording(asked))
    dataset = Dataset.open(config.data_folder)
    assert [question.task.id for question in asked] == sorted(ASKED)
    for question, task in zip(asked, dataset.evaluated, strict=True):
        assert question.task == dataset.tasks[task].without_answers()
        named = [dataset.augmentation(n - 1) for n in question.identifiers]
        assert list(question.views) == named and len(named) == 6
    only: list[Question] = []
    evaluate(select_questions(variants=2), recording(only))
    assert [question.views for question in only] == [question.views[:2] for question in asked]
    assert [question.identifiers for question in only] == [q.identifiers[:2] for q in asked]


def test_the_order_of_answers_does_not_matter(select_questions: Ask) -> None:
    def backwards(job: Job, questions: Sequence[Question]) -> Iterator[Prediction]:
        yield from reversed(list(predict_locally(job, questions)))

    one, other = (
        evaluate(select_questions(run="one")),
        evaluate(select_questions(run="other"), backwards),
    )
    assert results(one) == results(other)
    names = "submission.json", "predictions"
    assert (one.folder / names[0]).read_bytes() == (other.folder / names[0]).read_bytes()
    assert predictions(one.folder) == predictions(other.folder)


def test_what_did_not_come_back_is_wrong_and_counted(select_questions: Ask, arc1: Arc) -> None:
    solved, missing = "44f52bb0", [task for task in sorted(ASKED) if task != "44f52bb0"]
    outcome = evaluate(select_questions(), answering({solved: right(arc1[solved])}))
    for k in ("pass@1", "pass@2"):
        scores = outcome.results["scores"][k]
        parts = {name: (rate["numerator"], rate["denominator"]) for name, rate in scores.items()}
        assert parts == {"outputs": (2, 5), "task_mean": (1, 3), "tasks": (1, 3)}
    assert outcome.results["coverage"]["1000"]["denominator"] == 5
    assert [task["solved"] for task in outcome.results["tasks"]] == [
        task == solved for task in sorted(ASKED)
    ]
    assert outcome.results["notes"] == [
        f"no answer came back for {', '.join(missing)}: counted as wrong"
    ]
    assert submission(outcome).keys() == set(ASKED)
    assert submission(outcome)[missing[0]] == [PLACEHOLDER] * len(arc1[missing[0]].test)
    rest: list[Question] = []
    again = evaluate(select_questions(), recording(rest))
    assert [question.task.id for question in rest] == missing and again.resumed == 1


def test_a_submission_has_every_test_in_order_and_both_attempts(select_questions: Ask) -> None:
    """One test with three candidates, one with one; none for a task of two tests."""
    answers = {"25ff71a9": [[["12", "34"], ["5"], ["6"]], [["789"]]], "44f52bb0": [[], []]}
    outcome = evaluate(select_questions(), answering(answers))
    assert submission(outcome) == {
        "25ff71a9": [
            {"attempt_1": [[1, 2], [3, 4]], "attempt_2": [[5]]},
            {"attempt_1": [[7, 8, 9]], "attempt_2": [[7, 8, 9]]},
        ],
        "44f52bb0": [PLACEHOLDER, PLACEHOLDER],
        "d037b0a7": [PLACEHOLDER],
    }


@pytest.mark.parametrize("candidates", [[], [["00", "00"]]])
def test_the_placeholder_is_no_answer_even_where_it_would_be_right(
    select_questions: Ask, arc1: Arc, candidates: list[list[str]]
) -> None:
    zeros = Pair(input=arc1["d037b0a7"].test[0].input, output=np.zeros((2, 2), np.uint8))
    task = replace(arc1["d037b0a7"], test=(zeros,))
    outcome = evaluate(select_questions([task]), answering({"d037b0a7": [candidates]}))
    assert submission(outcome) == {"d037b0a7": [PLACEHOLDER]}
    answered = bool(candidates)
    [output] = outcome.results["tasks"][0]["outputs"]
    assert (output["right@1"], output["right@2"]) == (answered, answered)
    assert outcome.results["scores"]["pass@2"]["outputs"]["numerator"] == answered


def test_the_second_attempt_counts_and_the_third_does_not(select_questions: Ask, arc1: Arc) -> None:
    wrong = ["9"]
    answers = {
        task: [[wrong] * n + grids for grids in right(arc1[task])]
        for n, task in enumerate(sorted(ASKED))
    }
    outcome = evaluate(select_questions(), answering(answers))
    counts = [len(arc1[task].test) for task in sorted(ASKED)]
    numerators = {k: rate["numerator"] for k, rate in outcome.results["coverage"].items()}
    assert numerators["1"] == outcome.results["scores"]["pass@1"]["outputs"]["numerator"]
    assert numerators["2"] == outcome.results["scores"]["pass@2"]["outputs"]["numerator"]
    assert [numerators[k] for k in ("1", "2", "5")] == [counts[0], sum(counts[:2]), sum(counts)]
    first = [task["outputs"][0] for task in outcome.results["tasks"]]
    assert [(o["right_rank"], o["right@1"], o["right@2"]) for o in first] == [
        (1, True, True),
        (2, False, True),
        (3, False, False),
    ]
    assert [task["solved"] for task in outcome.results["tasks"]] == [True, True, False]


def test_a_subset_is_called_one(select_questions: Ask, arc1: Arc) -> None:
    whole = evaluate(select_questions(run="whole"), answering({}))
    assert whole.results["protocol"]["evaluated"] == "3 of 3 tasks"
    limited = evaluate(select_questions(run="limited", limit=1), answering({}))
    assert limited.results["protocol"]["evaluated"].startswith("a subset: 1 of 3 tasks")
    assert limited.results["scores"]["pass@2"]["tasks"]["denominator"] == 1
    assert len(submission(limited)) == 1
    small = evaluate(
        select_questions([arc1[task] for task in (*ASKED, "49d1d64f")], run="small"), answering({})
    )
    assert small.results["protocol"]["evaluated"] == "a subset: 3 of 4 tasks (canvas of side 3)"


def test_a_longer_limit_goes_on_where_the_shorter_one_ended(select_questions: Ask) -> None:
    asked: list[Question] = []
    evaluate(select_questions(limit=1))
    outcome = evaluate(select_questions(), recording(asked))
    assert outcome.resumed == 1 and len(asked) == 2
    assert predictions(outcome.folder) == predictions(evaluate(select_questions(run="new")).folder)


def test_votes_do_not_leak_into_the_next_evaluation(select_questions: Ask, trained: Config) -> None:
    half = str(trained.run_folder / "checkpoints" / "step_00000020")
    before = evaluate(select_questions(checkpoint=half))
    after = evaluate(select_questions())
    alone = evaluate(select_questions(run="alone"))
    assert before.folder != after.folder
    assert predictions(before.folder) != predictions(after.folder)
    assert predictions(after.folder) == predictions(alone.folder)
    assert results(after) == results(alone)
    views = [test["variants"] for p in predictions(after.folder).values() for test in p["tests"]]
    votes = [
        test["empty"] + sum(candidate["votes"] for candidate in test["candidates"])
        for p in predictions(after.folder).values()
        for test in p["tests"]
    ]
    assert votes == views == [6] * 5


def test_what_changes_answers_has_a_folder_of_its_own(
    select_questions: Ask, arc1: Arc, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    other = tmp_path / checkpoint.folder.name
    shutil.copytree(checkpoint.folder, other)
    change_weights(other, undecided)
    configs = [
        select_questions(),
        select_questions(variants=2),
        select_questions(halt="confident"),
        select_questions(halt="fixed", act_steps=1),
        select_questions(halt="fixed", act_steps=2),
        select_questions([arc1[task] for task in ASKED]),
        select_questions(checkpoint=str(other)),
    ]
    assert len({evaluate(config, answering({})).folder.name for config in configs}) == 7


def test_killed_half_way_it_asks_only_the_rest(
    select_questions: Ask, start: Callable[..., BaseProcess]
) -> None:
    reached = multiprocessing.get_context("forkserver").Event()
    process = start(evaluate_loudly, select_questions(), predict_locally, StuckAt("2/3", reached))
    assert reached.wait(60)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    asked: list[Question] = []
    outcome = evaluate(select_questions(), recording(asked))
    assert [question.task.id for question in asked] == sorted(ASKED)[2:]
    whole = evaluate(select_questions(run="whole"))
    assert predictions(outcome.folder) == predictions(whole.folder)
    assert results(outcome) == results(whole) and submission(outcome) == submission(whole)


@pytest.mark.parametrize("damage", ["torn", "of another task", "a test short", "no object"])
def test_a_prediction_that_is_not_whole_is_asked_again(select_questions: Ask, damage: str) -> None:
    first = evaluate(select_questions())
    path = first.folder / "predictions" / "44f52bb0.json"
    whole = path.read_text()
    other = json.loads(whole)
    del other["tests"][1]
    path.write_text(
        {
            "torn": whole[: len(whole) // 2],
            "of another task": (path.parent / "25ff71a9.json").read_text(),
            "a test short": json.dumps(other),
            "no object": "[]",
        }[damage]
    )
    asked: list[Question] = []
    again = evaluate(select_questions(), recording(asked))
    assert [question.task.id for question in asked] == ["44f52bb0"]
    assert results(again) == results(first)


def test_the_verdict_is_what_was_trained_on(select_questions: Ask, arc1: Arc) -> None:
    def contamination_statement(run: str, tasks: list[str] | None = None) -> str:
        chosen = None if tasks is None else [arc1[task] for task in tasks]
        outcome = evaluate(select_questions(chosen, run=run), answering({}))
        return str(outcome.results["protocol"]["training data"])

    assert (
        contamination_statement("a")
        == "transductive: demonstrations of 3 of 3 tasks were trained on"
    )
    mixed = contamination_statement("b", [ASKED[0], "a85d4709"])
    assert mixed == "transductive: demonstrations of 1 of 2 tasks were trained on"
    assert (
        contamination_statement("c", ["a85d4709"])
        == "inductive: no pair of these tasks was trained on"
    )
    leaked = contamination_statement("d", ["0d3d703e", "74dd1130", *ASKED])
    assert leaked.startswith("CONTAMINATED: 2 tasks have a test among the training pairs")
    assert leaked.endswith("(0d3d703e, 74dd1130)")


def test_on_another_dataset_puzzle_ids_are_blank(select_questions: Ask, arc1: Arc) -> None:
    asked: list[Question] = []
    outcome = evaluate(select_questions([arc1["a85d4709"]]), recording(asked))
    assert asked[0].identifiers == range(0) and len(asked[0].views) == 6
    assert outcome.results["protocol"]["puzzle ids"].startswith("blank")
    assert (
        evaluate(select_questions(run="same"), answering({})).results["protocol"]["puzzle ids"]
        == "as trained"
    )


def test_without_solutions_everything_but_scores_is_written(
    select_questions: Ask, arc1: Arc, tmp_path: Path
) -> None:
    config = select_questions([arc1[task].without_answers() for task in ASKED])
    challenges = tmp_path / "arc_challenges.json"
    folder = Path(config.data.evaluation[0])
    tasks = {path.stem: json.loads(path.read_text()) for path in folder.iterdir()}
    challenges.write_text(json.dumps(tasks))
    config = replace(config, data=replace(config.data, evaluation=(str(challenges),)))
    prepare(config.data, config.data_folder, lambda line: None)
    outcome = evaluate(config)
    found = results(outcome)
    assert "scores" not in found and "coverage" not in found
    assert found["notes"] == ["the answers are not known: nothing is scored"]
    # A dataset that was not trained on: of 5 tests' 6 views 4 look like another one.
    assert found["spent"]["rows"] == 5 * 6 - 4
    assert [task["solved"] for task in found["tasks"]] == [None] * 3
    assert {task: len(tests) for task, tests in submission(outcome).items()} == {
        task: len(arc1[task].test) for task in ASKED
    }
    assert (outcome.folder / "report.html").stat().st_size > 1000
    assert "nothing is scored" in describe(outcome.results)


def test_no_oracle_and_everything_spent_is_said(select_questions: Ask) -> None:
    outcome = evaluate(select_questions())
    found = results(outcome)
    assert json.loads((outcome.folder / "results.json").read_text()) == outcome.results
    assert found["oracle"] is False
    assert found["spent"] == {"rows": 30, "act_steps": 120, "llm_tokens": 0}
    fixed = results(evaluate(select_questions(halt="fixed", act_steps=3)))
    assert fixed["spent"] == {"rows": 30, "act_steps": 90, "llm_tokens": 0}
    assert fixed["protocol"]["halting"] == "3 ACT steps"


def test_what_does_not_go_together_is_refused(
    select_questions: Ask, trained: Config, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"evaluation\.act_steps: 5 is more than the model's 4"):
        evaluate(select_questions(halt="fixed", act_steps=5))
    data = {"max_side": 6}
    paths = {"data": str(tmp_path / "six"), "runs": str(tmp_path)}
    evaluation = {"checkpoint": str(checkpoint.folder)}
    other = config_of(Path(trained.paths.root), data=data, paths=paths, evaluation=evaluation)
    prepare(other.data, other.data_folder, lambda line: None)
    with pytest.raises(UserError, match="a canvas of 9 cells, the dataset has 36"):
        evaluate(other)
    nothing = replace(other, evaluation=replace(other.evaluation, checkpoint=None))
    with pytest.raises(UserError, match="run: holds no checkpoint; train first"):
        evaluate(nothing)
