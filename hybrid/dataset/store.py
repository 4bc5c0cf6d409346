"""The dataset folder: tasks and variants as Parquet, and `dataset.json` that says what they are.

    tasks.parquet      one row a task: id, purpose, source, grids
    variants.parquet   one row a variant: task (row of tasks.parquet), dihedral, colours; a *plan*,
                       the grids are made when a row is needed
    dataset.json       counts, seed, source versions, fingerprint, digests of the two files, its own

The puzzle identifier of variant row v is v + 1; identifier 0 is the blank puzzle.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from hybrid import storage
from hybrid.arc import Augmentation, Grid, Pair, Task
from hybrid.dataset.config import DataConfig
from hybrid.errors import UserError

FORMAT = 1
SMALLER_CANVASES = (11, 16, 21)
"""Sides that `data.canvas=bucketed` puts tasks on, beside data.max_side: grids up to 10, 15 and 20,
with the border that ends them."""
TABLES = ("tasks.parquet", "variants.parquet")
Purpose = Literal["training", "evaluation"]

_GRID = pa.struct([("height", pa.uint8()), ("width", pa.uint8()), ("cells", pa.binary())])
_PAIRS = pa.list_(pa.struct([("input", _GRID), ("output", _GRID)]))
TASKS = pa.schema(
    [
        ("id", pa.string()),
        ("purpose", pa.string()),
        ("source", pa.string()),
        ("content_hash", pa.string()),
        ("train", _PAIRS),
        ("test", _PAIRS),
    ]
)
VARIANTS = pa.schema([("task", pa.int32()), ("dihedral", pa.uint8()), ("colours", pa.binary(10))])


@dataclass(frozen=True, kw_only=True, eq=False)
class Dataset:
    """Everything in the folder, in memory: the plan is small (16 bytes a variant)."""

    folder: Path
    meta: dict[str, Any]
    """dataset.json."""
    tasks: tuple[Task, ...]
    purposes: tuple[Purpose, ...]
    task_of: npt.NDArray[np.int32]
    """[V] row in `tasks` of each variant; variants of a task are together, the original first."""
    dihedral: npt.NDArray[np.uint8]
    """[V]"""
    colours: npt.NDArray[np.uint8]
    """[V, 10]"""

    @staticmethod
    def open(folder: str | Path, *, answers: bool = False) -> Dataset:
        """The dataset in `folder`; UserError if it is missing, incomplete or was changed.

        Evaluation tasks come without their test outputs unless `answers` are asked for, which is
        for scoring alone.
        """
        folder = Path(folder)
        fetch(folder)
        meta = read_meta(folder)
        tables = {name: _read_table(folder / name, meta) for name in TABLES}
        task_table = tables["tasks.parquet"]
        variants = tables["variants.parquet"]
        colours = variants["colours"].combine_chunks().buffers()[1]
        return Dataset(
            folder=folder,
            meta=meta,
            tasks=tuple(_tasks(task_table, answers)),
            purposes=tuple(task_table["purpose"].to_pylist()),
            task_of=variants["task"].to_numpy(),
            dihedral=variants["dihedral"].to_numpy(),
            colours=np.frombuffer(colours, np.uint8, 10 * len(variants)).reshape(-1, 10),
        )

    @property
    def fingerprint(self) -> str:
        """Digest of everything a model can see except `canvas_mode`, without evaluation answers."""
        return str(self.meta["fingerprint"])

    @property
    def canvas(self) -> int:
        """Side of the largest canvas that grids are put on."""
        return int(self.meta["config"]["max_side"])

    @property
    def canvas_mode(self) -> str:
        """`data.canvas` of when it was prepared."""
        return str(self.meta["config"].get("canvas", "full"))

    def check_same_recipe(self, config: DataConfig) -> None:
        """UserError if `config` describes another dataset: only preparing listens to it."""
        made = {"canvas": "full", **self.meta["config"]}
        differs = [
            f"data.{key} is {made[key]!r} there, {value!r} here"
            for key, value in plain(config).items()
            if key in made and made[key] != value
        ]
        if differs:
            raise UserError(
                f"{storage.uri(self.folder)}: {'; '.join(differs)}; say what is there, or"
                " prepare another paths.data"
            )

    @property
    def bucketed(self) -> bool:
        """Whether small tasks stand on smaller canvases."""
        return self.canvas_mode == "bucketed"

    @cached_property
    def sides(self) -> npt.NDArray[np.uint8]:
        """[T] side of each task's canvas, which all its grids but unknown answers fit, with the
        border that a larger canvas would show as well.
        """
        full = np.full(len(self.tasks), self.canvas, np.uint8)
        if not self.bucketed:
            return full
        sides = np.array([side for side in SMALLER_CANVASES if side < self.canvas] + [self.canvas])
        # An answer must not be read off the size of a canvas, also by who may see answers.
        largest = [
            _largest(task if purpose == "training" else task.without_answers())
            for task, purpose in zip(self.tasks, self.purposes, strict=True)
        ]
        wanted = np.minimum(np.array(largest) + 1, self.canvas)
        found: npt.NDArray[np.uint8] = sides[np.searchsorted(sides, wanted)].astype(np.uint8)
        return found

    @property
    def num_identifiers(self) -> int:
        """Rows of the puzzle table that fits this dataset."""
        return len(self.task_of) + 1

    @cached_property
    def first_variant(self) -> npt.NDArray[np.int64]:
        """[T + 1]: the variants of task t are rows first_variant[t] to first_variant[t + 1]."""
        return np.searchsorted(self.task_of, np.arange(len(self.tasks) + 1))

    @cached_property
    def evaluated(self) -> tuple[int, ...]:
        """Rows in `tasks` of the evaluation tasks."""
        return tuple(t for t, purpose in enumerate(self.purposes) if purpose == "evaluation")

    def training_pairs(self, task: int) -> tuple[Pair, ...]:
        """The pairs of a task that may be trained on: of an evaluation task its demonstrations."""
        if self.purposes[task] == "evaluation":
            return self.demonstrations(task)
        return tuple(pair for pair in self.tasks[task].pairs if pair.output is not None)

    def demonstrations(self, task: int) -> tuple[Pair, ...]:
        """The demonstrations of a task that may be shown: without those that are held out."""
        shown = self.tasks[task].train
        if self.purposes[task] == "evaluation":
            return shown[: len(shown) - self.meta["config"]["hold_out_demos"]]
        return shown

    def held_out(self, task: int) -> tuple[Pair, ...]:
        """The demonstrations of an evaluation task that nobody is shown or trained on."""
        return self.tasks[task].train[len(self.demonstrations(task)) :]

    def problem(self, variant: int, pair: Pair) -> Task:
        """What a reader is shown of a pair: the task's other demonstrations, and its input.

        In the variant's orientation and colours; the output of the pair is not in it.
        """
        task = int(self.task_of[variant])
        view = self.augmentation(variant)
        others = tuple(shown for shown in self.demonstrations(task) if shown != pair)
        asked = Pair(input=pair.input, output=None)
        return view.apply_task(Task(id=view.task, train=others, test=(asked,)))

    def problems(self, variants: int | None) -> list[tuple[int, int]]:
        """(variant, number of the pair in its task's `pairs`) of all that a reader can be shown.

        Of the first `variants` variants of each task: training pairs, and tests that are asked.
        """
        found = []
        for task, pairs in enumerate(self.tasks):
            trained = self.training_pairs(task)
            numbers = [
                number
                for number, pair in enumerate(pairs.pairs)
                if any(pair is other for other in trained) or number >= len(pairs.train)
            ]
            first, stop = (int(v) for v in self.first_variant[task : task + 2])
            for variant in range(first, min(stop, first + (variants or stop))):
                found += [(variant, number) for number in numbers]
        return found

    def problem_at(self, variant: int, number: int) -> Task:
        """The `problem` of a pair of the variant's task, by its number."""
        return self.problem(variant, self.tasks[int(self.task_of[variant])].pairs[number])

    def augmentation(self, variant: int) -> Augmentation:
        """The augmentation that variant row `variant` names."""
        return Augmentation(
            task=self.tasks[int(self.task_of[variant])].id,
            dihedral=int(self.dihedral[variant]),
            colours=tuple(int(colour) for colour in self.colours[variant]),
        )


def _largest(task: Task) -> int:
    """Longest side of a grid of the task."""
    return int(max(max(grid.shape) for pair in task.pairs for grid in pair.grids))


def grids_to_arrow(task: Task, purpose: Purpose, source: str) -> dict[str, Any]:
    """One row of tasks.parquet."""

    def grid(value: Grid | None) -> dict[str, Any] | None:
        if value is None:
            return None
        return {"height": value.shape[0], "width": value.shape[1], "cells": value.tobytes()}

    def pairs(values: Sequence[Pair]) -> list[dict[str, Any]]:
        return [{"input": grid(pair.input), "output": grid(pair.output)} for pair in values]

    return {
        "id": task.id,
        "purpose": purpose,
        "source": source,
        "content_hash": task.content_hash,
        "train": pairs(task.train),
        "test": pairs(task.test),
    }


def plain(config: DataConfig) -> dict[str, Any]:
    """As it stands in dataset.json."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(config).items()}


def fetch(folder: Path) -> None:
    """Bring the copy of a dataset that lies in a store up to date."""
    if not storage.is_cached(folder):
        return
    storage.download(folder / "dataset.json")
    try:
        files = read_meta(folder)["files"]
    except UserError:
        return  # whoever reads it will be told
    for name in TABLES:
        path = folder / name
        if not path.exists() or digest(path) != files.get(name):
            storage.download(path)


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_meta(folder: Path, meta: dict[str, Any]) -> None:
    """Write dataset.json: `meta`, sealed with a digest of it."""
    sealed = {**meta, "sha256": _meta_digest(meta)}
    (folder / "dataset.json").write_text(json.dumps(sealed, indent=1) + "\n")


def read_meta(folder: Path) -> dict[str, Any]:
    """What `write_meta` was given; UserError if it is missing or was changed."""
    path = folder / "dataset.json"
    try:
        meta = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{folder}: no dataset here; run jobs/prepare.py first") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({error}); prepare it again") from error
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise UserError(f"{path}: not a dataset of format {FORMAT}; prepare it again")
    if meta.pop("sha256", None) != _meta_digest(meta):
        raise UserError(f"{path}: changed since it was prepared; prepare it again")
    return meta


def _meta_digest(meta: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(meta).encode()).hexdigest()


def _tasks(table: pa.Table, answers: bool) -> Iterator[Task]:
    for some in table.to_batches(max_chunksize=1024):  # as Python objects they are ten times larger
        for row in some.to_pylist():
            yield _task(row, answers)


def _task(row: dict[str, Any], answers: bool) -> Task:
    def grid(value: dict[str, Any] | None) -> Grid | None:
        if value is None:
            return None
        cells = np.frombuffer(value["cells"], np.uint8)
        return cells.reshape(value["height"], value["width"])

    def pairs(values: list[dict[str, Any]]) -> tuple[Pair, ...]:
        found = []
        for value in values:
            given = grid(value["input"])
            assert given is not None
            found.append(Pair(input=given, output=grid(value["output"])))
        return tuple(found)

    task = Task(id=row["id"], train=pairs(row["train"]), test=pairs(row["test"]))
    return task if answers or row["purpose"] == "training" else task.without_answers()


def _read_table(path: Path, meta: dict[str, Any]) -> pa.Table:
    schema = TASKS if path.name == TABLES[0] else VARIANTS
    try:
        if digest(path) != meta["files"].get(path.name):
            raise UserError(f"{path}: changed since it was prepared; prepare it again")
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path}: cannot be read ({' '.join(str(error).split())})") from error
    if not table.schema.equals(schema):
        raise UserError(f"{path}: has columns {table.schema.names}, expected {schema.names}")
    return table
