"""Dataset preparation: content, exclusions, and independence from evaluation answers."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest
from helpers import EVALUATED, TRAINED, StuckAt, poison, write_tasks

from hybrid.arc import Task
from hybrid.config import Config
from hybrid.dataset import DataConfig, Dataset, Stream, prepare
from hybrid.errors import UserError

Configure = Callable[..., Config]
Start = Callable[..., BaseProcess]
Arc = dict[str, Task]


def quiet(line: str) -> None:
    pass


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def variants_of(dataset: Dataset, task: str) -> list[str]:
    names = map(dataset.augmentation, range(len(dataset.task_of)))
    return [augmentation.name for augmentation in names if augmentation.task == task]


def test_the_same_config_gives_the_same_bytes_and_another_seed_other_variants(
    configure: Configure, tmp_path: Path
) -> None:
    data = configure().data
    for name in ("a", "b"):
        prepare(data, tmp_path / name, quiet)
    assert content(tmp_path / "a") == content(tmp_path / "b")
    assert content(tmp_path / "a").keys() == {"tasks.parquet", "variants.parquet", "dataset.json"}
    prepare(replace(data, seed=1), tmp_path / "c", quiet)
    a, c = Dataset.open(tmp_path / "a"), Dataset.open(tmp_path / "c")
    assert a.fingerprint != c.fingerprint
    for task in TRAINED + EVALUATED:
        assert variants_of(a, task)[0] == variants_of(c, task)[0] == task
        assert variants_of(a, task) != variants_of(c, task)


def test_adding_a_task_does_not_change_the_variants_of_others(
    configure: Configure, tmp_path: Path, arc1: Arc
) -> None:
    data = configure().data
    prepare(data, tmp_path / "before", quiet)
    write_tasks(tmp_path / "training", [arc1["0d3d703e"]])
    prepare(data, tmp_path / "after", quiet)
    before, after = (Dataset.open(tmp_path / name) for name in ("before", "after"))
    assert after.tasks[0].id == "0d3d703e", "the new task should come first"
    for task in TRAINED + EVALUATED:
        assert variants_of(before, task) == variants_of(after, task)


def test_variants_do_not_depend_on_the_row_group_size(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = configure().data
    one = prepare(data, tmp_path / "one", quiet)
    monkeypatch.setitem(prepare.__globals__, "VARIANTS_PER_ROW_GROUP", 8)
    many = prepare(data, tmp_path / "many", quiet)
    assert one["files"]["variants.parquet"] != many["files"]["variants.parquet"]
    a, b = Dataset.open(tmp_path / "one"), Dataset.open(tmp_path / "many")
    for name in ("task_of", "dihedral", "colours", "first_variant"):
        assert np.array_equal(getattr(a, name), getattr(b, name)), name


def test_the_original_is_the_first_variant_and_identifiers_include_the_blank(
    configure: Configure, tmp_path: Path
) -> None:
    meta = prepare(configure().data, tmp_path / "d", quiet)
    dataset = Dataset.open(tmp_path / "d")
    assert dataset.num_identifiers == meta["counts"]["variants"] + 1 == 6 * 6 + 1
    assert [task.id for task in dataset.tasks] == sorted(TRAINED) + sorted(EVALUATED)
    for number, task in enumerate(dataset.tasks):
        first, stop = dataset.first_variant[number : number + 2]
        assert dataset.augmentation(first).name == task.id
        assert {dataset.augmentation(v).task for v in range(first, stop)} == {task.id}
        assert len({dataset.augmentation(v).name for v in range(first, stop)}) == stop - first
    assert stop == len(dataset.task_of)


def test_tasks_round_trip_through_the_dataset(
    configure: Configure, tmp_path: Path, arc1: Arc
) -> None:
    prepare(configure().data, tmp_path / "d", quiet)
    dataset = Dataset.open(tmp_path / "d", answers=True)
    assert list(dataset.tasks) == [arc1[task.id] for task in dataset.tasks]
    assert [dataset.tasks[t].id for t in dataset.evaluated] == sorted(EVALUATED)


def test_answers_are_not_loaded_by_default(configure: Configure, tmp_path: Path) -> None:
    """Training workers and Ray Data tasks also open the dataset; only scoring loads answers."""
    prepare(configure().data, tmp_path / "d", quiet)
    dataset = Dataset.open(tmp_path / "d")
    tests = [pair for task in dataset.evaluated for pair in dataset.tasks[task].test]
    assert tests and all(pair.output is None for pair in tests)
    trained = set(range(len(dataset.tasks))) - set(dataset.evaluated)
    assert all(pair.output is not None for task in trained for pair in dataset.tasks[task].test)


def test_a_task_with_few_distinct_variants_has_few_rows(tmp_path: Path, arc1: Arc) -> None:
    write_tasks(tmp_path / "tasks", [arc1["332efdb3"], arc1["74dd1130"]])
    data = DataConfig(training=(str(tmp_path / "tasks"),), evaluation=(), variants=20)
    prepare(data, tmp_path / "d", quiet)
    dataset = Dataset.open(tmp_path / "d")
    few, many = (variants_of(dataset, task) for task in ("332efdb3", "74dd1130"))
    assert (len(few), len(set(few)), len(many)) == (9, 9, 21)


def test_tests_of_evaluation_tasks_are_not_training_pairs(
    configure: Configure, tmp_path: Path
) -> None:
    meta = prepare(configure().data, tmp_path / "d", quiet)
    dataset = Dataset.open(tmp_path / "d")
    count = 0
    for number, (task, purpose) in enumerate(zip(dataset.tasks, dataset.purposes, strict=True)):
        pairs = dataset.training_pairs(number)
        assert pairs == (task.pairs if purpose == "training" else task.train)
        count += len(pairs)
    assert count == meta["counts"]["training_pairs"] == len(Stream(dataset, 0))
    assert meta["counts"]["evaluation_outputs"] == 5


def test_answers_do_not_affect_model_inputs(
    configure: Configure, tmp_path: Path, arc1: Arc
) -> None:
    """Replace every answer by garbage, some larger than the canvas, and compare the datasets."""
    data = configure().data
    prepare(data, tmp_path / "clean", quiet)
    garbage = [poison(arc1[task]) for task in EVALUATED]
    assert max(task.max_side for task in garbage) > data.max_side
    write_tasks(tmp_path / "evaluation", garbage)
    prepare(data, tmp_path / "poisoned", quiet)
    clean, poisoned = (Dataset.open(tmp_path / name) for name in ("clean", "poisoned"))
    answers = [Dataset.open(d.folder, answers=True).tasks for d in (clean, poisoned)]
    assert answers[0] != answers[1], "the answers should differ"
    variants = [content(d.folder)["variants.parquet"] for d in (clean, poisoned)]
    assert variants[0] == variants[1]
    assert clean.fingerprint == poisoned.fingerprint
    assert clean.meta["counts"] == poisoned.meta["counts"]
    assert clean.tasks == poisoned.tasks
    two_epochs = np.arange(2 * len(Stream(clean, 0)))
    rows = [Stream(dataset, 0).rows(two_epochs) for dataset in (clean, poisoned)]
    assert all(np.array_equal(rows[0][name], rows[1][name]) for name in rows[0])


def test_too_large_tasks_are_counted_and_answers_do_not_matter(
    configure: Configure, tmp_path: Path, arc1: Arc
) -> None:
    """49d1d64f, d631b094, be03b35f and the garbage answers of 25ff71a9 do not fit side 3."""
    lines: list[str] = []
    write_tasks(tmp_path / "evaluation", [arc1["be03b35f"], poison(arc1["25ff71a9"])])
    meta = prepare(configure(data={"max_side": 3}).data, tmp_path / "d", lines.append)
    assert [task.id for task in Dataset.open(tmp_path / "d").tasks] == [
        "74dd1130",
        *sorted(EVALUATED),
    ]
    assert meta["excluded"] == {"too_large": 3, "leaking": []}
    assert meta["evaluation"] == {"evaluated": 3, "of": 4}
    assert "3 of 7 tasks excluded: larger than data.max_side=3" in lines
    with pytest.raises(UserError, match=r"data\.max_side=1: no task fits"):
        prepare(configure(data={"max_side": 1}).data, tmp_path / "d", quiet)


def test_a_rerun_reports_it_and_changes_no_file(configure: Configure, tmp_path: Path) -> None:
    data, lines = configure().data, list[str]()
    first = prepare(data, tmp_path / "d", quiet)
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "d").iterdir()}
    second = prepare(data, tmp_path / "d", lines.append)
    assert second == first
    assert [line for line in lines if "already prepared" in line] == lines
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "d").iterdir()} == written


@pytest.mark.parametrize("name", ["tasks.parquet", "variants.parquet"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_table_is_reported_and_prepared_again(
    configure: Configure, tmp_path: Path, name: str, damage: str
) -> None:
    data = configure().data
    prepare(data, tmp_path / "d", quiet)
    intact, path = content(tmp_path / "d"), tmp_path / "d" / name
    middle = len(intact[name]) // 2
    if damage == "flip":
        flipped = bytes([intact[name][middle] ^ 1])
        path.write_bytes(intact[name][:middle] + flipped + intact[name][middle + 1 :])
    elif damage == "truncate":
        path.write_bytes(intact[name][:middle])
    else:
        path.unlink()
    with pytest.raises(UserError, match=name):
        Dataset.open(tmp_path / "d")
    prepare(data, tmp_path / "d", quiet)
    assert content(tmp_path / "d") == intact


def test_changing_a_source_prepares_the_dataset_again(
    configure: Configure, tmp_path: Path, arc1: Arc
) -> None:
    data = configure().data
    before = prepare(data, tmp_path / "d", quiet)
    write_tasks(tmp_path / "training", [arc1["0d3d703e"]])
    after = prepare(data, tmp_path / "d", quiet)
    assert after["counts"]["tasks"] == before["counts"]["tasks"] + 1
    assert "0d3d703e" in {task.id for task in Dataset.open(tmp_path / "d").tasks}


@pytest.mark.parametrize("old", [False, True])
def test_a_killed_prepare_does_not_change_the_folder(
    configure: Configure, tmp_path: Path, start: Start, old: bool
) -> None:
    data, folder = configure().data, tmp_path / "d"
    if old:
        prepare(replace(data, seed=1), folder, quiet)
    before = content(folder) if old else None
    reached = multiprocessing.get_context("forkserver").Event()
    process = start(prepare, data, folder, StuckAt("variants: 6/6", reached))
    assert reached.wait(60), "prepare printed no progress"
    assert list(tmp_path.glob(".d.partial-*/variants.parquet")), "no partial dataset on disk"
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert (content(folder) if folder.exists() else None) == before
    prepare(data, folder, quiet)
    prepare(data, tmp_path / "undisturbed", quiet)
    assert content(folder) == content(tmp_path / "undisturbed")


def test_a_failed_prepare_removes_its_partial_files(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def disk_full(*arguments: object) -> None:
        raise OSError("disk full")

    data = configure().data
    before = set(tmp_path.iterdir())
    monkeypatch.setitem(prepare.__globals__, "_replace", disk_full)
    with pytest.raises(OSError, match="disk full"):
        prepare(data, tmp_path / "d", quiet)
    assert set(tmp_path.iterdir()) == before


def test_a_folder_with_other_files_is_not_replaced(configure: Configure, tmp_path: Path) -> None:
    data, precious = configure().data, tmp_path / "home" / "thesis.tex"
    precious.parent.mkdir()
    precious.write_text("years of work")
    with pytest.raises(UserError, match=r"home: contains thesis\.tex, which is not part"):
        prepare(data, precious.parent, quiet)
    with pytest.raises(UserError, match=r"thesis\.tex: is a file"):
        prepare(data, precious, quiet)
    assert precious.read_text() == "years of work"
