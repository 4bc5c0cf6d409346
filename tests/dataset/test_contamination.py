"""Contamination checks: no evaluated test pair is trained on, regardless of task id."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
from helpers import poison, write_tasks

from hybrid.arc import Pair, Task, load_tasks
from hybrid.dataset import DataConfig, Dataset, prepare
from hybrid.dataset.prepare import select
from hybrid.errors import UserError

Arc = dict[str, Task]
COPIES = ["0934a4d8", "136b0064", "16b78196", "981571dc", "aa4ec2a5", "da515329"]


def config_of(
    training: str | Path, evaluation: str | Path, on_overlap: Literal["refuse", "drop"] = "drop"
) -> DataConfig:
    return DataConfig(
        training=(str(training),), evaluation=(str(evaluation),), variants=0, on_overlap=on_overlap
    )


@pytest.mark.parametrize(
    ("training", "evaluation", "leaking"),
    [
        ("arc2-training", "arc1-evaluation", 376),
        ("arc1-evaluation", "arc2-evaluation", COPIES),
        ("arc1-training", "arc1-evaluation", ["40853293"]),
        ("arc1-training", "arc2-evaluation", []),
        ("arc2-training", "arc2-evaluation", []),
    ],
)
def test_known_overlaps_are_dropped_and_reported(
    training: str, evaluation: str, leaking: int | list[str]
) -> None:
    lines: list[str] = []
    selected, report = select(config_of(training, evaluation), lines.append)
    dropped = report["excluded"]["leaking"]
    assert leaking in (len(dropped), dropped)
    assert [s.task.id for s in selected if s.purpose == "training"] == [
        task.id for task in load_tasks(training) if task.id not in dropped
    ]
    assert [s.task for s in selected if s.purpose == "evaluation"] == load_tasks(evaluation)
    if dropped:
        assert lines[2].startswith(f"{len(dropped)} of ")
        assert "have a test pair among the training pairs" in lines[2]


def test_training_on_arc2_for_arc1_evaluation_raises_a_user_error(tmp_path: Path) -> None:
    data = config_of("arc2-training", "arc1-evaluation", "refuse")
    with pytest.raises(UserError, match=r"376 tasks contain a test .* data\.on_overlap=drop"):
        prepare(data, tmp_path / "d", lambda line: None)
    assert not (tmp_path / "d").exists()


def test_equal_content_under_another_id_is_found(tmp_path: Path, arc1: Arc) -> None:
    assert arc1["40853293"].content_hash == arc1["070dd51e"].content_hash
    write_tasks(tmp_path / "training", [arc1["40853293"], arc1["74dd1130"]])
    write_tasks(tmp_path / "evaluation", [arc1["070dd51e"]])
    data = config_of(tmp_path / "training", tmp_path / "evaluation")
    with pytest.raises(UserError, match="40853293"):
        prepare(replace(data, on_overlap="refuse"), tmp_path / "d", lambda line: None)
    prepare(data, tmp_path / "d", lambda line: None)
    assert [task.id for task in Dataset.open(tmp_path / "d").tasks] == ["74dd1130", "070dd51e"]


def test_dropped_tasks_do_not_depend_on_the_answers(tmp_path: Path, arc1: Arc) -> None:
    write_tasks(tmp_path / "training", [arc1["40853293"], arc1["74dd1130"]])
    write_tasks(tmp_path / "evaluation", [poison(arc1["070dd51e"])])
    data = config_of(tmp_path / "training", tmp_path / "evaluation")
    assert prepare(data, tmp_path / "d", lambda line: None)["excluded"]["leaking"] == ["40853293"]


def test_one_id_for_two_tasks_raises_a_user_error(tmp_path: Path, arc1: Arc) -> None:
    other = replace(arc1["74dd1130"], id="25ff71a9")
    write_tasks(tmp_path / "training", [other])
    write_tasks(tmp_path / "evaluation", [arc1["25ff71a9"]])
    with pytest.raises(UserError, match=r"task 25ff71a9 is both in .*training.* and in"):
        prepare(config_of(tmp_path / "training", tmp_path / "evaluation"), tmp_path / "d", print)
    twice = DataConfig(
        training=(str(tmp_path / "training"), str(tmp_path / "evaluation")), evaluation=()
    )
    with pytest.raises(UserError, match="task 25ff71a9 differs from the one in"):
        prepare(twice, tmp_path / "d", print)


def test_a_task_with_reordered_pairs_is_the_same_task() -> None:
    """ARC-2 contains 391 ARC-1 tasks, some with reordered demonstrations."""
    both = DataConfig(training=("arc1-training", "arc2-training"), evaluation=())
    assert len(select(both, lambda line: None)[0]) == 400 + 1000 - 391


def test_a_test_among_another_tasks_demonstrations_raises_a_user_error(
    tmp_path: Path, arc1: Arc
) -> None:
    victim, other = arc1["25ff71a9"], arc1["74dd1130"]
    leaking = replace(other, id="leaking", train=(*other.train, victim.test[1]))
    write_tasks(tmp_path / "evaluation", [victim, leaking])
    data = DataConfig(training=(), evaluation=(str(tmp_path / "evaluation"),), variants=0)
    with pytest.raises(
        UserError, match="a test of task 25ff71a9 is a demonstration of task leaking"
    ):
        prepare(data, tmp_path / "d", lambda line: None)


def test_equal_inputs_with_unknown_answers_are_not_contamination(tmp_path: Path, arc1: Arc) -> None:
    """A test input of 6ea4a07e is also in 8719f442, with another output."""
    tasks = [arc1["6ea4a07e"], arc1["8719f442"]]
    train: set[Pair] = set(tasks[1].train)
    test = tasks[0].test
    assert not train & set(test)
    assert {p.input.tobytes() for p in train} & {p.input.tobytes() for p in test}
    write_tasks(tmp_path / "evaluation", [task.without_answers() for task in tasks])
    data = DataConfig(training=(), evaluation=(str(tmp_path / "evaluation"),), variants=0)
    assert prepare(data, tmp_path / "d", lambda line: None)["counts"]["tasks"] == 2
