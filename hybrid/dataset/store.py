"""The dataset folder: tasks and variants as Parquet, described by `dataset.json`.

    tasks.parquet      one row per task: id, purpose, source, grids
    variants.parquet   one row per variant: task (row of tasks.parquet), dihedral, colours; the
                       grids are computed when a row is needed
    dataset.json       config, counts, source versions, fingerprint, SHA-256 of each file

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
"""Canvas sides of `data.canvas=bucketed` in addition to data.max_side: grids up to 10, 15 and 20,
with their EOS border."""
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
    """A prepared dataset in memory (16 bytes per variant)."""

    folder: Path
    meta: dict[str, Any]
    """dataset.json."""
    tasks: tuple[Task, ...]
    purposes: tuple[Purpose, ...]
    task_of: npt.NDArray[np.int32]
    """[V] row in `tasks` of each variant; a task's variants are consecutive, the original first."""
    dihedral: npt.NDArray[np.uint8]
    """[V] index into DIHEDRAL of each variant."""
    colours: npt.NDArray[np.uint8]
    """[V, 10] new colour of each colour, per variant."""

    @staticmethod
    def open(folder: str | Path, *, answers: bool = False) -> Dataset:
        """Load the dataset in `folder`; raise UserError if it is missing, incomplete or changed.

        Evaluation tasks have no test outputs unless `answers` is true, which only scoring may set.
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
        """Digest of all that a model can see except `canvas_mode`; excludes evaluation answers."""
        return str(self.meta["fingerprint"])

    @property
    def canvas(self) -> int:
        """Side of the largest canvas, `data.max_side`."""
        return int(self.meta["config"]["max_side"])

    @property
    def canvas_mode(self) -> str:
        """`data.canvas` that the dataset was prepared with."""
        return str(self.meta["config"].get("canvas", "full"))

    def check_same_recipe(self, config: DataConfig) -> None:
        """Raise UserError if `data.*` differs from the config the dataset was prepared with."""
        prepared = {"canvas": "full", **self.meta["config"]}
        differs = [
            f"data.{key} is {prepared[key]!r} there, {value!r} here"
            for key, value in plain(config).items()
            if key in prepared and prepared[key] != value
        ]
        if differs:
            raise UserError(
                f"{storage.uri(self.folder)}: {'; '.join(differs)}; change data.* to match,"
                " or prepare another paths.data"
            )

    @property
    def bucketed(self) -> bool:
        """Whether small tasks are on smaller canvases."""
        return self.canvas_mode == "bucketed"

    @cached_property
    def sides(self) -> npt.NDArray[np.uint8]:
        """[T] side of each task's canvas: fits its grids and EOS border, except unknown answers."""
        full = np.full(len(self.tasks), self.canvas, np.uint8)
        if not self.bucketed:
            return full
        sides = np.array([side for side in SMALLER_CANVASES if side < self.canvas] + [self.canvas])
        # The canvas must not reveal an answer, even if the dataset was opened with answers.
        largest = [
            (task if purpose == "training" else task.without_answers()).max_side
            for task, purpose in zip(self.tasks, self.purposes, strict=True)
        ]
        min_sides = np.minimum(np.array(largest) + 1, self.canvas)
        smallest: npt.NDArray[np.uint8] = sides[np.searchsorted(sides, min_sides)].astype(np.uint8)
        return smallest

    @property
    def num_identifiers(self) -> int:
        """Number of rows of the puzzle table: one per variant and the blank puzzle."""
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
        """Return the pairs to train on; for an evaluation task, its demonstrations."""
        if self.purposes[task] == "evaluation":
            return self.demonstrations(task)
        return tuple(pair for pair in self.tasks[task].pairs if pair.output is not None)

    def demonstrations(self, task: int) -> tuple[Pair, ...]:
        """Return the demonstrations of a task, without held-out ones."""
        train = self.tasks[task].train
        if self.purposes[task] == "evaluation":
            return train[: len(train) - self.meta["config"]["hold_out_demos"]]
        return train

    def held_out(self, task: int) -> tuple[Pair, ...]:
        """Return the demonstrations excluded from training and prompts by `hold_out_demos`."""
        return self.tasks[task].train[len(self.demonstrations(task)) :]

    def problem(self, variant: int, pair: Pair) -> Task:
        """Return the language model's input for a pair: the other demonstrations and its input.

        Grids have the variant's orientation and colours. The pair's output is not included.
        """
        task = int(self.task_of[variant])
        augmentation = self.augmentation(variant)
        others = tuple(other for other in self.demonstrations(task) if other != pair)
        test = Pair(input=pair.input, output=None)
        return augmentation.apply_task(Task(id=augmentation.task, train=others, test=(test,)))

    def problems(self, variants: int | None) -> list[tuple[int, int]]:
        """List all possible problems as (variant, index of the pair in its task's `pairs`).

        Covers training pairs and evaluated tests of each task's first `variants` variants, or all.
        """
        problems = []
        for row, task in enumerate(self.tasks):
            trained = self.training_pairs(row)
            numbers = [
                number
                for number, pair in enumerate(task.pairs)
                if any(pair is other for other in trained) or number >= len(task.train)
            ]
            first, stop = (int(v) for v in self.first_variant[row : row + 2])
            for variant in range(first, min(stop, first + (variants or stop))):
                problems += [(variant, number) for number in numbers]
        return problems

    def problem_at(self, variant: int, number: int) -> Task:
        """Return the `problem` of the variant's task for `pairs[number]`."""
        return self.problem(variant, self.tasks[int(self.task_of[variant])].pairs[number])

    def augmentation(self, variant: int) -> Augmentation:
        """Return the augmentation of row `variant`."""
        return Augmentation(
            task=self.tasks[int(self.task_of[variant])].id,
            dihedral=int(self.dihedral[variant]),
            colours=tuple(int(colour) for colour in self.colours[variant]),
        )


def grids_to_arrow(task: Task, purpose: Purpose, source: str) -> dict[str, Any]:
    """Convert a task to a row of tasks.parquet."""

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
    """Return the config as stored in dataset.json."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(config).items()}


def fetch(folder: Path) -> None:
    """Update the local copy of a dataset in an object store."""
    if not storage.is_cached(folder):
        return
    storage.download(folder / "dataset.json")
    try:
        files = read_meta(folder)["files"]
    except UserError:
        return  # the caller gets this error when it reads dataset.json
    for name in TABLES:
        path = folder / name
        if not path.exists() or digest(path) != files.get(name):
            storage.download(path)


def digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_meta(folder: Path, meta: dict[str, Any]) -> None:
    """Write dataset.json: `meta` and its SHA-256."""
    sealed = {**meta, "sha256": _meta_digest(meta)}
    (folder / "dataset.json").write_text(json.dumps(sealed, indent=1) + "\n")


def read_meta(folder: Path) -> dict[str, Any]:
    """Return the `meta` of `write_meta`; raise UserError if it is missing or changed."""
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
    for batch in table.to_batches(max_chunksize=1024):  # Python objects take 10x the memory
        for row in batch.to_pylist():
            yield _task(row, answers)


def _task(row: dict[str, Any], answers: bool) -> Task:
    def grid(value: dict[str, Any] | None) -> Grid | None:
        if value is None:
            return None
        cells = np.frombuffer(value["cells"], np.uint8)
        return cells.reshape(value["height"], value["width"])

    def pairs(values: list[dict[str, Any]]) -> tuple[Pair, ...]:
        result = []
        for value in values:
            input_grid = grid(value["input"])
            assert input_grid is not None
            result.append(Pair(input=input_grid, output=grid(value["output"])))
        return tuple(result)

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
