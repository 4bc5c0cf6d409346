"""Preparation of a dataset folder: load sources, check them, draw variants, write atomically."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hybrid import storage
from hybrid.arc import Task, draw_variants, find_overlap, load_tasks, source_version
from hybrid.dataset.config import DataConfig
from hybrid.dataset.store import (
    FORMAT,
    TABLES,
    TASKS,
    VARIANTS,
    Purpose,
    digest,
    fetch,
    grids_to_arrow,
    plain,
    read_meta,
    write_meta,
)
from hybrid.errors import UserError, make_folder

Say = Callable[[str], None]
TASKS_FILE, VARIANTS_FILE = TABLES
VARIANTS_PER_ROW_GROUP = 1 << 16


@dataclass(frozen=True, kw_only=True)
class Selected:
    """A task to include in the dataset."""

    task: Task
    purpose: Purpose
    source: str


def prepare(config: DataConfig, folder: str | Path, say: Say = print) -> dict[str, Any]:
    """Write the dataset that `config` describes to `folder` and return its dataset.json.

    An existing dataset of the same config and sources is kept. The same config gives the same
    bytes. `folder` changes only by renames, so a killed run leaves no partial dataset. Progress
    lines go to `say`. Raise UserError for malformed sources, for a folder that contains anything
    but a dataset and, with on_overlap=refuse, for contamination.
    """
    folder = Path(folder)
    where = storage.uri(folder)
    versions = {source: source_version(source) for source in _sources(config)}
    recipe = {"config": plain(config), "sources": versions}
    fetch(folder)
    existing = _existing(folder, recipe)
    if existing:
        say(f"{where}: already prepared, {existing['counts']}")
        return existing
    _check_replaceable(folder)
    selected, report = select(config, say)
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    make_folder(partial.parent)
    partial.mkdir()
    try:
        meta = {"format": FORMAT, **recipe, **report, **_write(partial, config, selected, say)}
        write_meta(partial, meta)
        _replace(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    for name in (*TABLES, "dataset.json"):
        storage.upload(folder / name)
    say(f"{where}: {meta['counts']}, fingerprint {meta['fingerprint'][:12]}")
    return meta


def select(config: DataConfig, say: Say) -> tuple[list[Selected], dict[str, Any]]:
    """Select the tasks that fit the canvas and leak no test; also return a report of the others."""
    training = _read(config.training, "training", say)
    evaluation = _read(config.evaluation, "evaluation", say)
    n_tasks, n_evaluation = len(training) + len(evaluation), len(evaluation)
    training = [s for s in training if s.task.max_side <= config.max_side]
    if config.hold_out_tasks:
        training, evaluation = _hold_out(config, training, say)
        n_evaluation = len(evaluation)
    # Answers must not decide whether an evaluation task fits, because they are unknown.
    evaluation = [s for s in evaluation if s.task.without_answers().max_side <= config.max_side]
    too_large = n_tasks - len(training) - len(evaluation)
    if too_large:
        say(f"{too_large} of {n_tasks} tasks excluded: larger than data.max_side={config.max_side}")
    training, dropped = _without_leaks(config, training, evaluation, say)
    if not training and not evaluation:
        raise UserError(f"data.max_side={config.max_side}: no task fits this canvas")
    _check_no_duplicates(training + evaluation)
    _check_enough_tasks(evaluation, config.hold_out_demos)
    report = {
        "excluded": {"too_large": too_large, "leaking": dropped},
        "evaluation": {"evaluated": len(evaluation), "of": n_evaluation},
    }
    return training + evaluation, report


def _read(sources: tuple[str, ...], purpose: Purpose, say: Say) -> list[Selected]:
    """Load the tasks of several sources, sorted by id; merge equal tasks."""
    by_id: dict[str, Selected] = {}
    for source in sources:
        tasks = load_tasks(source)
        say(f"{source}: {len(tasks)} tasks for {purpose}")
        for task in tasks:
            other = by_id.setdefault(task.id, Selected(task=task, purpose=purpose, source=source))
            if not _same(other.task, task):
                raise UserError(f"{source}: task {task.id} differs from the one in {other.source}")
    return [by_id[task_id] for task_id in sorted(by_id)]


def _hold_out(
    config: DataConfig, training: list[Selected], say: Say
) -> tuple[list[Selected], list[Selected]]:
    """Split the training tasks at random into training tasks and held-out ones."""
    answered = [s for s in training if all(pair.output is not None for pair in s.task.test)]
    if len(answered) <= config.hold_out_tasks:
        raise UserError(
            f"data.hold_out_tasks={config.hold_out_tasks}: must be less than the {len(answered)}"
            " training tasks on this canvas"
        )
    rng = np.random.default_rng([config.seed, config.hold_out_tasks])
    drawn = {answered[n].task.id for n in rng.permutation(len(answered))[: config.hold_out_tasks]}
    held = [replace(s, purpose="evaluation") for s in training if s.task.id in drawn]
    say(f"{len(held)} training tasks held out")
    return [s for s in training if s.task.id not in drawn], held


def _same(one: Task, other: Task) -> bool:
    """Return whether the pairs are equal in any order: ARC-2 reorders tasks of ARC-1."""
    return set(one.train) == set(other.train) and set(one.test) == set(other.test)


def _without_leaks(
    config: DataConfig, training: list[Selected], evaluation: list[Selected], say: Say
) -> tuple[list[Selected], list[str]]:
    """Return the training tasks without tests of an evaluation task, and the other tasks' ids.

    Tests are compared by *input*, because the selection must not depend on the answers.
    """
    blind = [s.task.without_answers() for s in evaluation]
    overlap = find_overlap([s.task for s in training], blind)
    leaking = overlap.leaking_tasks
    if leaking:
        say(overlap.describe())
        if config.on_overlap == "refuse":
            raise UserError(
                f"data.training: {len(leaking)} tasks contain a test of an evaluation task"
                f" ({', '.join(sorted(leaking)[:5])}{', ...' if len(leaking) > 5 else ''});"
                " data.on_overlap=drop excludes them"
            )
        say(f"{len(leaking)} training tasks excluded")
    # Equal inputs are not enough: 6ea4a07e's test input has another output in 8719f442.
    answered = [s.task for s in evaluation if all(p.output is not None for p in s.task.test)]
    for other, task in find_overlap(blind, answered).leaks:
        raise UserError(
            f"data.evaluation: a test of task {task} is a demonstration of task {other}"
        )
    return [s for s in training if s.task.id not in leaking], sorted(leaking)


def _check_no_duplicates(selected: list[Selected]) -> None:
    seen: dict[str, Selected] = {}
    for s in selected:
        other = seen.setdefault(s.task.id, s)
        if other is not s:
            raise UserError(
                f"task {s.task.id} is both in {other.source} ({other.purpose})"
                f" and in {s.source} ({s.purpose})"
            )


def _check_enough_tasks(evaluation: list[Selected], held_out: int) -> None:
    few = [s.task.id for s in evaluation if len(s.task.train) <= held_out]
    if few:
        raise UserError(
            f"data.hold_out_demos={held_out} leaves no demonstration of {len(few)} tasks"
            f" ({', '.join(few[:5])}{', ...' if len(few) > 5 else ''})"
        )


def _write(folder: Path, config: DataConfig, selected: list[Selected], say: Say) -> dict[str, Any]:
    rows = [grids_to_arrow(s.task, s.purpose, s.source) for s in selected]
    pq.write_table(pa.Table.from_pylist(rows, TASKS), folder / TASKS_FILE, compression="zstd")
    identity = {name: value for name, value in plain(config).items() if name != "canvas"}
    fingerprint = hashlib.sha256(json.dumps(identity).encode())
    for s in selected:
        visible = s.task.without_answers() if s.purpose == "evaluation" else s.task
        fingerprint.update(f"{s.purpose} {s.task.id} {visible.content_hash}\n".encode())
    count = 0
    with pq.ParquetWriter(folder / VARIANTS_FILE, VARIANTS, compression="zstd") as writer:
        for batch in _variant_batches(config, selected, say):
            for column in batch.columns:
                fingerprint.update(column.buffers()[1])
            writer.write_batch(batch)
            count += len(batch)
    pairs = sum(
        len(s.task.train) - config.hold_out_demos
        if s.purpose == "evaluation"
        else len(s.task.pairs)
        for s in selected
    )
    purposes = [s.purpose for s in selected]
    return {
        "counts": {
            "tasks": len(selected),
            "training_tasks": purposes.count("training"),
            "evaluation_tasks": purposes.count("evaluation"),
            "evaluation_outputs": sum(
                len(s.task.test) for s in selected if s.purpose == "evaluation"
            ),
            "training_pairs": pairs,
            "variants": count,
        },
        "fingerprint": fingerprint.hexdigest(),
        "files": {name: digest(folder / name) for name in (TASKS_FILE, VARIANTS_FILE)},
    }


def _variant_batches(
    config: DataConfig, selected: list[Selected], say: Say
) -> Iterator[pa.RecordBatch]:
    """Yield the variants in row groups of at least VARIANTS_PER_ROW_GROUP rows."""
    parts: list[tuple[int, Any, Any]] = []
    rows = 0
    for row, s in enumerate(selected):
        # One generator per task, so that its variants do not depend on other tasks.
        key = int.from_bytes(hashlib.sha256(s.task.id.encode()).digest()[:8], "little")
        rng = np.random.default_rng([config.seed, key])
        dihedral, colours = draw_variants(s.task.without_answers(), config.variants, rng)
        parts.append((row, dihedral, colours))
        rows += len(dihedral)
        if rows >= VARIANTS_PER_ROW_GROUP or row == len(selected) - 1:
            yield _variant_batch(parts)
            parts, rows = [], 0
        if (row + 1) % 100 == 0 or row == len(selected) - 1:
            say(f"variants: {row + 1}/{len(selected)} tasks")


def _variant_batch(parts: list[tuple[int, Any, Any]]) -> pa.RecordBatch:
    tasks = np.concatenate([np.full(len(d), row, np.int32) for row, d, _ in parts])
    dihedral = np.concatenate([d for _, d, _ in parts])
    colours = np.ascontiguousarray(np.concatenate([c for _, _, c in parts]))
    packed = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(10), len(colours), [None, pa.py_buffer(colours)]
    )
    return pa.record_batch([pa.array(tasks), pa.array(dihedral), packed], schema=VARIANTS)


def _check_replaceable(folder: Path) -> None:
    """Raise UserError if `folder` contains files that do not belong to a dataset."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file; name a folder in paths.data")
    others = sorted(set(storage.names(folder)) - {"dataset.json", *TABLES})
    if others:
        raise UserError(
            f"{folder}: contains {', '.join(others[:5])}, which is not part of a dataset;"
            " name another folder in paths.data"
        )


def _replace(partial: Path, folder: Path) -> None:
    """Replace the old folder by the new one; `folder` is absent only between two renames."""
    old = folder.with_name(f".{folder.name}.old-{os.getpid()}")
    if folder.exists():
        os.replace(folder, old)
    os.replace(partial, folder)
    shutil.rmtree(old, ignore_errors=True)


def _existing(folder: Path, recipe: dict[str, Any]) -> dict[str, Any] | None:
    """Return dataset.json of `folder` if it has this recipe and its tables are intact."""
    try:
        meta = read_meta(folder)
        intact = all(digest(folder / name) == value for name, value in meta["files"].items())
    except (UserError, OSError):
        return None
    return meta if intact and all(meta[key] == recipe[key] for key in recipe) else None


def _sources(config: DataConfig) -> list[str]:
    return sorted({*config.training, *config.evaluation})
