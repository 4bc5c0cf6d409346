"""What a hybrid is asked and told: no answer, no held-out pair, and what an oracle marks."""

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
    ASKED,
    assert_close,
    change_weights,
    hybrid_of,
    poison,
    predictions,
    quietly,
    recording,
    undecided,
    write_tasks,
)

from hybrid.arc import Task, pair_hash, string_to_grid
from hybrid.config import Config
from hybrid.context import LocalContext
from hybrid.dataset import Dataset, Stream, prepare
from hybrid.errors import UserError
from hybrid.evaluate import Job, Outcome, Question, describe, predict_locally
from hybrid.evaluate.trm_predictor import Prediction
from hybrid.llm import Prompt, Reader
from hybrid.train import joint

Ask = Callable[..., Config]
Arc = dict[str, Task]
HONEST = ("none", "confidence", "vote", "demos")


@pytest.fixture
def read_tasks(monkeypatch: pytest.MonkeyPatch) -> list[Task]:
    """All problems that are made into prompts from now on."""
    seen: list[Task] = []
    prompt = Reader.prompt

    def listen(self: Reader, task: Task, test: int = 0) -> Prompt:
        seen.append(task)
        return prompt(self, task, test)

    monkeypatch.setattr(Reader, "prompt", listen)
    return seen


@pytest.fixture(scope="module")
def fates(tmp_path_factory: pytest.TempPathFactory, arc1: Arc) -> Callable[..., Config]:
    """fates(name, tasks): prepare and train a hybrid whose evaluation tasks these are."""
    root = tmp_path_factory.mktemp("fates")
    write_tasks(root / "training", [arc1["74dd1130"]])

    def live(name: str, tasks: list[Task]) -> Config:
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
        change_weights(joint(config, LocalContext(torch.device("cpu"))).checkpoint, undecided)
        return config

    return live


def with_feedback(config: Config, source: str) -> Config:
    return replace(config, feedback=replace(config.feedback, source=source))


def as_predicted(task: Task, outcome: Outcome) -> Task:
    """The task with what won after the first attempt, which knows no feedback, for answers."""
    tests = predictions(outcome.folder)[task.id]["tests"]
    first = [string_to_grid("\n".join(test["curve"][0][0]["grid"])) for test in tests]
    pairs = zip(task.test, first, strict=True)
    return replace(task, test=tuple(replace(pair, output=grid) for pair, grid in pairs))


def test_no_answer_reaches_a_prediction_but_by_the_oracle(fates: Any, arc1: Arc) -> None:
    """End to end, preparing and training included, on real answers, garbage and flattery."""
    real = [arc1[task] for task in ASKED]
    clean = fates("clean", real)
    told = {source: quietly(with_feedback(clean, source)) for source in (*HONEST, "oracle")}
    worlds = {
        "garbage": [poison(task) for task in real],
        "flattery": [as_predicted(task, told["none"]) for task in real],
    }
    step = "checkpoints/step_00000002"
    for name, tasks in worlds.items():
        config = fates(name, tasks)
        assert_close(clean.run_folder / step, config.run_folder / step, 0, 0)
        for source in HONEST:
            outcome = quietly(with_feedback(config, source))
            assert predictions(outcome.folder) == predictions(told[source].folder), source
            files = [(o.folder / "submission.json").read_bytes() for o in (outcome, told[source])]
            assert files[0] == files[1], source
        outcome = quietly(with_feedback(config, "oracle"))
        assert predictions(outcome.folder) != predictions(told["oracle"].folder)
    assert outcome.results["spent"]["attempts"] < told["none"].results["spent"]["attempts"]
    attempts = {source: told[source].results["spent"]["attempts"] for source in HONEST}
    assert attempts["confidence"] < attempts["none"], "nobody stopped early"


def test_what_an_oracle_touches_is_marked_and_cannot_be_submitted(ask_hybrid: Ask) -> None:
    outcome = quietly(ask_hybrid(feedback={"source": "oracle"}))
    assert outcome.folder.name.endswith("-oracle")
    written = {path.name for path in outcome.folder.iterdir()}
    assert written == {"predictions", "results.json", "report.html"}
    found = json.loads((outcome.folder / "results.json").read_text())
    assert found["oracle"] is True and "LOOKED AT" in found["protocol"]["feedback"]
    assert all(p["oracle"] is True for p in predictions(outcome.folder).values())
    assert "ORACLE" in describe(outcome.results)
    honest = quietly(ask_hybrid())
    assert honest.folder != outcome.folder and honest.results["oracle"] is False
    assert (honest.folder / "submission.json").exists()
    assert all(p["oracle"] is False for p in predictions(honest.folder).values())


def test_a_question_has_answers_for_the_oracle_alone(ask_hybrid: Ask, arc1: Arc) -> None:
    for source in (*HONEST, "oracle"):
        asked: list[Question] = []
        quietly(ask_hybrid(feedback={"source": source}), recording(asked))
        assert [question.task.id for question in asked] == sorted(ASKED)
        for question in asked:
            assert all(pair.output is None for pair in question.task.test)
            if source == "oracle":
                real = [pair.output for pair in arc1[question.task.id].test]
                assert question.answers is not None
                for ours, theirs in zip(question.answers, real, strict=True):
                    assert np.array_equal(ours, theirs)  # type: ignore[arg-type]
            else:
                assert question.answers is None
            assert (question.held_out is not None) == (source == "demos")


def test_the_oracle_of_a_task_without_answers_is_refused(
    ask_hybrid: Ask, arc1: Arc, tmp_path: Path
) -> None:
    challenges = tmp_path / "x_challenges.json"
    write_tasks(tmp_path / "unknown", [arc1[task].without_answers() for task in ASKED])
    tasks = {p.stem: json.loads(p.read_text()) for p in (tmp_path / "unknown").iterdir()}
    challenges.write_text(json.dumps(tasks))
    data = {"training": [], "evaluation": [str(challenges)]}
    paths = {"data": str(tmp_path / "unknown-data")}
    config = ask_hybrid(data=data, paths=paths, feedback={"source": "oracle"})
    prepare(config.data, config.data_folder, lambda line: None)
    with pytest.raises(UserError, match="the answers of 25ff71a9 are not known"):
        quietly(config)


def test_held_out_demonstrations_are_in_no_row_and_no_prompt(
    hybrid: Config, ask_hybrid: Ask, read_tasks: list[Task]
) -> None:
    dataset = Dataset.open(hybrid.data_folder)
    held_out = {task: dataset.held_out(task) for task in dataset.evaluated}
    assert {len(pairs) for pairs in held_out.values()} == {1}
    kept = {pair_hash(pair) for pairs in held_out.values() for pair in pairs}
    in_views = {
        pair_hash(replace(pair, input=view.apply(pair.input), output=view.apply(pair.output)))
        for task, pairs in held_out.items()
        for view in map(
            dataset.augmentation, range(*dataset.first_variant[task : task + 2].tolist())
        )
        for pair in pairs
    }
    assert kept <= in_views
    assert not kept & {pair_hash(pair) for pair in Stream(dataset, 0).pairs}
    trained = hybrid.run_folder / "checkpoints/step_00000004/trained_on.json"
    assert not kept & set(json.loads(trained.read_text()))
    outcome = quietly(ask_hybrid(feedback={"source": "demos"}))
    read_tasks += [dataset.problem_at(*problem) for problem in dataset.problems(None)]
    again = replace(hybrid, logging=replace(hybrid.logging, run="read"))
    joint(again, LocalContext(torch.device("cpu")))
    shown = [pair_hash(pair) for task in read_tasks for pair in task.train]
    assert len(shown) > 500 and not in_views & set(shown)
    assert all(pair.output is None for task in read_tasks for pair in task.test)
    inputs = {name.partition("|")[0] for name in in_views}
    asked = {pair_hash(task.test[0]).partition("|")[0] for task in read_tasks}
    assert asked & inputs, "the held-out inputs themselves are asked"
    said = [
        attempt["feedback"]
        for p in predictions(outcome.folder).values()
        for test in p["tests"]
        for attempt in test["attempts"]
    ]
    assert all("on a held-out example" in line for line in said)


def test_demos_need_demonstrations_that_nobody_has_seen(
    ask_hybrid: Ask, hybrid: Config, tmp_path: Path
) -> None:
    """Without any held out; and held out now, but trained on before."""
    feedback = {"feedback": {"source": "demos"}}
    paths = {"data": str(tmp_path / "all")}
    nothing_kept = ask_hybrid(data={"hold_out_demos": 0}, paths=paths, **feedback)
    prepare(nothing_kept.data, nothing_kept.data_folder, lambda line: None)
    with pytest.raises(UserError, match=r"no demonstration was held out.*hold_out_demos=1"):
        quietly(nothing_kept)
    training = replace(nothing_kept.training, steps=1)
    blind = replace(with_feedback(nothing_kept, "none"), training=training)
    seen = joint(blind, LocalContext(torch.device("cpu")))
    late = ask_hybrid(evaluation={"checkpoint": str(seen.checkpoint)}, **feedback)
    with pytest.raises(UserError, match="trained on the held-out demonstrations of 3 tasks"):
        quietly(late)


def test_one_view_has_nobody_to_compare_with(ask_hybrid: Ask) -> None:
    with pytest.raises(UserError, match=r"feedback\.source=vote: .* has one view"):
        quietly(ask_hybrid(feedback={"source": "vote"}, evaluation={"variants": 1}))


def test_shuffled_gives_every_task_another_ones_text(
    ask_hybrid: Ask, read_tasks: list[Task], hybrid: Config
) -> None:
    """Which one does not depend on how many are asked: answers on disk are used again."""
    asked: list[Question] = []
    shuffled = {"text": "shuffled"}
    outcome = quietly(ask_hybrid(evaluation=shuffled), recording(asked))
    others = [q.read_instead.id for q in asked if q.read_instead]
    assert sorted(others) == sorted(ASKED)
    assert all(q.read_instead and q.read_instead.id != q.task.id for q in asked)
    dataset = Dataset.open(hybrid.data_folder)
    for question in asked:
        assert question.read_instead is not None
        row = [task.id for task in dataset.tasks].index(question.read_instead.id)
        assert question.read_instead.train == dataset.demonstrations(row)
    own = quietly(ask_hybrid("own"))
    assert own.results["protocol"]["text"] == "own"
    assert outcome.results["protocol"]["text"] == "shuffled"
    assert predictions(own.folder) != predictions(outcome.folder)
    read_tasks.clear()
    limited = quietly(ask_hybrid("limited", evaluation=shuffled | {"limit": 1}))
    assert {task.id.split("|")[0] for task in read_tasks} == {others[0]}
    first = predictions(outcome.folder)[asked[0].task.id]
    assert predictions(limited.folder) == {asked[0].task.id: first}


def test_half_an_evaluation_is_not_repeated(ask_hybrid: Ask) -> None:
    class Stop(Exception):
        pass

    def stopping(job: Job, questions: Sequence[Question]) -> Iterator[Prediction]:
        for number, prediction in enumerate(predict_locally(job, questions)):
            if number == 2:
                raise Stop
            yield prediction

    with pytest.raises(Stop):
        quietly(ask_hybrid(), stopping)
    rest: list[Question] = []
    outcome = quietly(ask_hybrid(), recording(rest))
    assert [question.task.id for question in rest] == sorted(ASKED)[2:] and outcome.resumed == 2
    whole = quietly(ask_hybrid("whole"))
    assert predictions(outcome.folder) == predictions(whole.folder)
    for key in ("scores", "curve", "baseline", "coverage", "protocol"):
        assert outcome.results[key] == whole.results[key], key
