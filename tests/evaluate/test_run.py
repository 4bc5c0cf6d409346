"""Questions, stored predictions, resuming, scores and submission of an evaluation."""

from __future__ import annotations

import copy
import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    EVALUATED,
    StuckAt,
    change_weights,
    config_of,
    poison,
    predictions,
    randomize_halt_head,
    recording,
    write_tasks,
)
from helpers import quietly as evaluate
from safetensors.torch import load_file

from hybrid.arc import Pair, Task, grid_to_string, string_to_grid
from hybrid.checkpoint import Checkpoint, newest
from hybrid.config import Config
from hybrid.context import LocalContext
from hybrid.dataset import Dataset, prepare
from hybrid.errors import UserError
from hybrid.evaluate import Job, Outcome, Question, describe, predict_locally
from hybrid.evaluate import evaluate as evaluate_loudly
from hybrid.evaluate.records import Prediction
from hybrid.evaluate.run import (
    HYBRID_KEYS,
    IGNORED_KEYS,
    SECTIONS,
    PredictAll,
    _evaluation_folder_name,
)
from hybrid.train import pretrain

MakeConfig = Callable[..., Config]
Arc = dict[str, Task]
CONFIG = {f.name: type(getattr(Config(), f.name)) for f in fields(Config)}
"""The class of every config section."""
PLACEHOLDER = {"attempt_1": [[0, 0], [0, 0]], "attempt_2": [[0, 0], [0, 0]]}


def submission(outcome: Outcome) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((outcome.folder / "submission.json").read_text())
    return found


def results(outcome: Outcome) -> dict[str, Any]:
    """Return the results without the title and the seconds."""
    found = {key: value for key, value in outcome.results.items() if key != "title"}
    return found | {"spent": {k: v for k, v in found["spent"].items() if k != "seconds"}}


def answering(answers: dict[str, list[list[list[str]]]]) -> PredictAll:
    """Predict these candidates by task and test; tasks not listed get no prediction."""

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


def correct(task: Task) -> list[list[list[str]]]:
    """Return the correct answers as candidates."""
    return [
        [grid_to_string(pair.output).split("\n")] for pair in task.test if pair.output is not None
    ]


def test_answers_do_not_change_predictions(tmp_path: Path, arc1: Arc) -> None:
    """End to end, preparation to submission, with real, garbage and self-predicted answers."""
    write_tasks(tmp_path / "training", [arc1["74dd1130"]])
    real = [arc1[task] for task in EVALUATED]

    def run_all(name: str, tasks: list[Task]) -> tuple[Path, Outcome]:
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

    clean = run_all("clean", real)
    garbage = run_all("garbage", [poison(task) for task in real])
    predicted = run_all("predicted", [as_predicted(task, clean[1]) for task in real])
    assert any(p["tests"][0]["candidates"] for p in predictions(clean[1].folder).values())
    for folder, outcome in (garbage, predicted):
        for path in clean[0].glob("*.safetensors"):
            a, b = load_file(path), load_file(folder / path.name)
            assert all(torch.equal(a[key], b[key]) for key in a), path.name
        assert predictions(outcome.folder) == predictions(clean[1].folder)
        assert submission(outcome) == submission(clean[1])
    scores = [o.results["scores"]["pass@1"]["outputs"] for _, o in (clean, garbage, predicted)]
    assert scores[1]["numerator"] == 0 < scores[2]["numerator"]
    assert {score["denominator"] for score in scores} == {5}


def as_predicted(task: Task, outcome: Outcome) -> Task:
    """Return the task with the model's first candidates as answers, where it has any."""
    tests = predictions(outcome.folder)[task.id]["tests"]

    def answer(pair: Pair, test: dict[str, Any]) -> Pair:
        if not test["candidates"]:
            return pair
        return replace(pair, output=string_to_grid("\n".join(test["candidates"][0]["grid"])))

    return replace(task, test=tuple(map(answer, task.test, tests)))


def test_question_with_an_answer_is_rejected(arc1: Arc) -> None:
    task = arc1[EVALUATED[0]]
    Question(task=task.without_answers(), side=5, variants=(), identifiers=range(0))
    half = replace(task, test=(task.test[0], *task.without_answers().test[1:]))
    for leaking in (task, half):
        with pytest.raises(AssertionError, match="an answer in a question"):
            Question(task=leaking, side=5, variants=(), identifiers=range(0))


def test_every_task_is_evaluated_without_answers_in_all_variants(make_config: MakeConfig) -> None:
    questions: list[Question] = []
    config = make_config()
    evaluate(config, recording(questions))
    dataset = Dataset.open(config.data_folder)
    assert [question.task.id for question in questions] == sorted(EVALUATED)
    for question, task in zip(questions, dataset.evaluated, strict=True):
        assert question.task == dataset.tasks[task].without_answers()
        expected = [dataset.augmentation(n - 1) for n in question.identifiers]
        assert list(question.variants) == expected and len(expected) == 6
    limited: list[Question] = []
    evaluate(make_config(variants=2), recording(limited))
    assert [question.variants for question in limited] == [
        question.variants[:2] for question in questions
    ]
    assert [question.identifiers for question in limited] == [q.identifiers[:2] for q in questions]


def test_order_of_predictions_does_not_change_results(make_config: MakeConfig) -> None:
    def backwards(job: Job, questions: Sequence[Question]) -> Iterator[Prediction]:
        yield from reversed(list(predict_locally(job, questions)))

    one, other = (
        evaluate(make_config(run="one")),
        evaluate(make_config(run="other"), backwards),
    )
    assert results(one) == results(other)
    names = "submission.json", "predictions"
    assert (one.folder / names[0]).read_bytes() == (other.folder / names[0]).read_bytes()
    assert predictions(one.folder) == predictions(other.folder)


def test_missing_predictions_count_as_wrong(make_config: MakeConfig, arc1: Arc) -> None:
    solved, missing = "44f52bb0", [task for task in sorted(EVALUATED) if task != "44f52bb0"]
    outcome = evaluate(make_config(), answering({solved: correct(arc1[solved])}))
    for k in ("pass@1", "pass@2"):
        scores = outcome.results["scores"][k]
        parts = {name: (rate["numerator"], rate["denominator"]) for name, rate in scores.items()}
        assert parts == {"outputs": (2, 5), "task_mean": (1, 3), "tasks": (1, 3)}
    assert outcome.results["coverage"]["1000"]["denominator"] == 5
    assert [task["solved"] for task in outcome.results["tasks"]] == [
        task == solved for task in sorted(EVALUATED)
    ]
    assert outcome.results["notes"] == [f"no prediction for {', '.join(missing)}: counted as wrong"]
    assert submission(outcome).keys() == set(EVALUATED)
    assert submission(outcome)[missing[0]] == [PLACEHOLDER] * len(arc1[missing[0]].test)
    remaining: list[Question] = []
    again = evaluate(make_config(), recording(remaining))
    assert [question.task.id for question in remaining] == missing and again.resumed == 1


def test_submission_has_both_attempts_for_every_test_in_order(make_config: MakeConfig) -> None:
    """Tests with three candidates, with one, and tasks without any."""
    answers = {"25ff71a9": [[["12", "34"], ["5"], ["6"]], [["789"]]], "44f52bb0": [[], []]}
    outcome = evaluate(make_config(), answering(answers))
    assert submission(outcome) == {
        "25ff71a9": [
            {"attempt_1": [[1, 2], [3, 4]], "attempt_2": [[5]]},
            {"attempt_1": [[7, 8, 9]], "attempt_2": [[7, 8, 9]]},
        ],
        "44f52bb0": [PLACEHOLDER, PLACEHOLDER],
        "d037b0a7": [PLACEHOLDER],
    }


@pytest.mark.parametrize("candidates", [[], [["00", "00"]]])
def test_placeholder_never_scores_even_if_the_answer_is_all_zeros(
    make_config: MakeConfig, arc1: Arc, candidates: list[list[str]]
) -> None:
    zeros = Pair(input=arc1["d037b0a7"].test[0].input, output=np.zeros((2, 2), np.uint8))
    task = replace(arc1["d037b0a7"], test=(zeros,))
    outcome = evaluate(make_config([task]), answering({"d037b0a7": [candidates]}))
    assert submission(outcome) == {"d037b0a7": [PLACEHOLDER]}
    expected = bool(candidates)
    [output] = outcome.results["tasks"][0]["outputs"]
    assert (output["right@1"], output["right@2"]) == (expected, expected)
    assert outcome.results["scores"]["pass@2"]["outputs"]["numerator"] == expected


def test_second_attempt_scores_and_third_does_not(make_config: MakeConfig, arc1: Arc) -> None:
    wrong = ["9"]
    answers = {
        task: [[wrong] * n + grids for grids in correct(arc1[task])]
        for n, task in enumerate(sorted(EVALUATED))
    }
    outcome = evaluate(make_config(), answering(answers))
    counts = [len(arc1[task].test) for task in sorted(EVALUATED)]
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


def test_protocol_marks_a_subset(make_config: MakeConfig, arc1: Arc) -> None:
    complete = evaluate(make_config(run="complete"), answering({}))
    assert complete.results["protocol"]["evaluated"] == "3 of 3 tasks"
    limited = evaluate(make_config(run="limited", limit=1), answering({}))
    assert limited.results["protocol"]["evaluated"].startswith("a subset: 1 of 3 tasks")
    assert limited.results["scores"]["pass@2"]["tasks"]["denominator"] == 1
    assert len(submission(limited)) == 1
    small = evaluate(
        make_config([arc1[task] for task in (*EVALUATED, "49d1d64f")], run="small"), answering({})
    )
    assert small.results["protocol"]["evaluated"] == "a subset: 3 of 4 tasks (canvas of side 3)"


def test_longer_limit_reuses_predictions_of_a_shorter_one(make_config: MakeConfig) -> None:
    questions: list[Question] = []
    evaluate(make_config(limit=1))
    outcome = evaluate(make_config(), recording(questions))
    assert outcome.resumed == 1 and len(questions) == 2
    assert predictions(outcome.folder) == predictions(evaluate(make_config(run="new")).folder)


def test_evaluations_do_not_share_votes(make_config: MakeConfig, trained: Config) -> None:
    half = str(trained.run_folder / "checkpoints" / "step_00000020")
    before = evaluate(make_config(checkpoint=half))
    after = evaluate(make_config())
    alone = evaluate(make_config(run="alone"))
    assert before.folder != after.folder
    assert predictions(before.folder) != predictions(after.folder)
    assert predictions(after.folder) == predictions(alone.folder)
    assert results(after) == results(alone)
    counts = [test["variants"] for p in predictions(after.folder).values() for test in p["tests"]]
    votes = [
        test["empty"] + sum(candidate["votes"] for candidate in test["candidates"])
        for p in predictions(after.folder).values()
        for test in p["tests"]
    ]
    assert votes == counts == [6] * 5


def test_settings_that_change_predictions_get_separate_folders(
    make_config: MakeConfig, arc1: Arc, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    other = tmp_path / checkpoint.folder.name
    shutil.copytree(checkpoint.folder, other)
    change_weights(other, randomize_halt_head)
    configs = [
        make_config(),
        make_config(variants=2),
        make_config(halt="confident"),
        make_config(halt="fixed", act_steps=1),
        make_config(halt="fixed", act_steps=2),
        make_config([arc1[task] for task in EVALUATED]),
        make_config(checkpoint=str(other)),
    ]
    assert len({evaluate(config, answering({})).folder.name for config in configs}) == 7


@pytest.mark.parametrize("kind", ["trm", "hybrid"])
def test_every_key_of_a_section_is_ignored_explicitly_or_changes_the_folder(
    kind: str, trained: Config, hybrid: Config
) -> None:
    """A new config key must not reuse stale predictions."""
    config = trained if kind == "trm" else hybrid
    checkpoint = newest(config.run_folder / "checkpoints")
    assert checkpoint
    dataset = Dataset.open(config.data_folder)
    name = _evaluation_folder_name(config, checkpoint, dataset)
    ignored = IGNORED_KEYS if kind == "hybrid" else IGNORED_KEYS | HYBRID_KEYS
    keys = {f"{section}.{f.name}" for section in SECTIONS[kind] for f in fields(CONFIG[section])}
    assert {key for key in ignored if key.partition(".")[0] in SECTIONS[kind]} <= keys
    for dotted in keys:
        section, _, key = dotted.partition(".")
        changed = copy.copy(getattr(config, section))  # unlike `replace`, skips validation
        object.__setattr__(changed, key, another(getattr(changed, key)))
        other = replace(config, **{section: changed})
        renamed = _evaluation_folder_name(other, checkpoint, dataset)
        assert (renamed != name) == (dotted not in ignored), dotted


def another(value: Any) -> Any:
    """Return another value of the same type, 1 for None."""
    if isinstance(value, bool):
        return not value
    return value + {str: "x", tuple: ("x",)}.get(type(value), 1) if value is not None else 1


def test_every_config_section_is_known_to_be_read_or_not() -> None:
    """These sections reach a prediction only through the checkpoint, the dataset or the device."""
    not_named = {"paths", "data", "trm", "training", "cluster", "sweep", "logging"}
    assert not_named | set(SECTIONS["hybrid"]) == CONFIG.keys()


def test_killed_evaluation_resumes_with_the_remaining_tasks(
    make_config: MakeConfig, start: Callable[..., BaseProcess]
) -> None:
    reached = multiprocessing.get_context("forkserver").Event()
    process = start(evaluate_loudly, make_config(), predict_locally, StuckAt("2/3", reached))
    assert reached.wait(60)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    questions: list[Question] = []
    outcome = evaluate(make_config(), recording(questions))
    assert [question.task.id for question in questions] == sorted(EVALUATED)[2:]
    complete = evaluate(make_config(run="complete"))
    assert predictions(outcome.folder) == predictions(complete.folder)
    assert results(outcome) == results(complete) and submission(outcome) == submission(complete)


@pytest.mark.parametrize("damage", ["torn", "of another task", "a test short", "no object"])
def test_incomplete_prediction_is_replaced(make_config: MakeConfig, damage: str) -> None:
    first = evaluate(make_config())
    path = first.folder / "predictions" / "44f52bb0.json"
    complete = path.read_text()
    other = json.loads(complete)
    del other["tests"][1]
    path.write_text(
        {
            "torn": complete[: len(complete) // 2],
            "of another task": (path.parent / "25ff71a9.json").read_text(),
            "a test short": json.dumps(other),
            "no object": "[]",
        }[damage]
    )
    questions: list[Question] = []
    again = evaluate(make_config(), recording(questions))
    assert [question.task.id for question in questions] == ["44f52bb0"]
    assert results(again) == results(first)


def test_contamination_statement_reports_pairs_trained_on(
    make_config: MakeConfig, arc1: Arc
) -> None:
    def statement(run: str, tasks: list[str] | None = None) -> str:
        chosen = None if tasks is None else [arc1[task] for task in tasks]
        outcome = evaluate(make_config(chosen, run=run), answering({}))
        return str(outcome.results["protocol"]["training data"])

    assert statement("a") == "transductive: demonstrations of 3 of 3 tasks were trained on"
    mixed = statement("b", [EVALUATED[0], "a85d4709"])
    assert mixed == "transductive: demonstrations of 1 of 2 tasks were trained on"
    assert statement("c", ["a85d4709"]) == "inductive: no pair of these tasks was trained on"
    leaked = statement("d", ["0d3d703e", "74dd1130", *EVALUATED])
    assert leaked.startswith("CONTAMINATED: 2 tasks have a test among the training pairs")
    assert leaked.endswith("(0d3d703e, 74dd1130)")


def test_puzzle_ids_are_blank_on_a_dataset_not_trained_on(
    make_config: MakeConfig, arc1: Arc
) -> None:
    questions: list[Question] = []
    outcome = evaluate(make_config([arc1["a85d4709"]]), recording(questions))
    assert questions[0].identifiers == range(0) and len(questions[0].variants) == 6
    assert outcome.results["protocol"]["puzzle ids"].startswith("blank")
    assert (
        evaluate(make_config(run="same"), answering({})).results["protocol"]["puzzle ids"]
        == "as trained"
    )


def test_unknown_answers_give_everything_except_scores(
    make_config: MakeConfig, arc1: Arc, tmp_path: Path
) -> None:
    config = make_config([arc1[task].without_answers() for task in EVALUATED])
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
    # With blank puzzle ids equal inputs are merged: 4 of the 30 variants equal another one.
    assert found["spent"]["rows"] == 5 * 6 - 4
    assert [task["solved"] for task in found["tasks"]] == [None] * 3
    assert {task: len(tests) for task, tests in submission(outcome).items()} == {
        task: len(arc1[task].test) for task in EVALUATED
    }
    assert (outcome.folder / "report.html").stat().st_size > 1000
    assert "nothing is scored" in describe(outcome.results)


def test_results_record_cost_halting_and_no_oracle(make_config: MakeConfig) -> None:
    outcome = evaluate(make_config())
    found = results(outcome)
    assert json.loads((outcome.folder / "results.json").read_text()) == outcome.results
    assert found["oracle"] is False
    assert found["spent"] == {"rows": 30, "act_steps": 120, "llm_tokens": 0}
    fixed = results(evaluate(make_config(halt="fixed", act_steps=3)))
    assert fixed["spent"] == {"rows": 30, "act_steps": 90, "llm_tokens": 0}
    assert fixed["protocol"]["halting"] == "3 ACT steps"


def test_incompatible_checkpoint_and_settings_are_rejected(
    make_config: MakeConfig, trained: Config, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"evaluation\.act_steps: 5 is more than the model's 4"):
        evaluate(make_config(halt="fixed", act_steps=5))
    data = {"max_side": 6}
    paths = {"data": str(tmp_path / "six"), "runs": str(tmp_path)}
    evaluation = {"checkpoint": str(checkpoint.folder)}
    other = config_of(Path(trained.paths.root), data=data, paths=paths, evaluation=evaluation)
    prepare(other.data, other.data_folder, lambda line: None)
    with pytest.raises(UserError, match="a canvas of 9 cells, the dataset has 36"):
        evaluate(other)
    untrained = replace(other, evaluation=replace(other.evaluation, checkpoint=None))
    with pytest.raises(UserError, match="run: holds no checkpoint; train first"):
        evaluate(untrained)
