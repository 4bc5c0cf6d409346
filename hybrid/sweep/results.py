"""From trials on disk to a ranking: a table, sweep.parquet, and the config of the best."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from rich.console import Console
from rich.table import Table

from hybrid import storage
from hybrid.config import Config, to_dict
from hybrid.errors import UserError, make_folder
from hybrid.evaluate import Validation
from hybrid.sweep.space import Axis, trial_config
from hybrid.train import parse_metrics, validated

Status = Literal["done", "stopped early", "failed", "unfinished"]
NOTE = "trial.json"
"""Of a trial, in its run folder: values, status, seconds, error. Only the sweep writes it."""
REASON = "reason.txt"
"""Beside it, from the trial's own process: why it ended by an error, or was ended."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What came of one set of values."""

    name: str
    values: Mapping[str, Any]
    status: Status
    curve: Mapping[int, Validation]
    """Validations by step."""
    seconds: float
    error: str = ""

    @property
    def step(self) -> int:
        """Of the newest validation; 0 before the first."""
        return max(self.curve, default=0)

    @property
    def last(self) -> Validation | None:
        """The newest validation."""
        return self.curve[self.step] if self.curve else None


def read_trial(run_folder: Path) -> Trial | None:
    """A trial by what its run has left behind; None where it has not begun."""
    try:
        data = storage.read(run_folder / NOTE)
        if data is None:
            return None
        note = json.loads(data)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{storage.uri(run_folder / NOTE)}: cannot be read ({error}); delete its folder"
        ) from error
    curve = validated(parse_metrics(storage.read(run_folder / "metrics.jsonl") or b""))
    return Trial(name=run_folder.name, curve=curve, **note)


def write_trial(
    run_folder: Path, values: Mapping[str, Any], status: Status, seconds: float, error: str = ""
) -> None:
    """Write down how a trial stands."""
    make_folder(run_folder)
    note = {"values": dict(values), "status": status, "seconds": seconds, "error": error}
    partial = run_folder / f".{NOTE}.tmp"
    partial.write_text(json.dumps(note) + "\n")
    os.replace(partial, run_folder / NOTE)
    storage.upload(run_folder / NOTE)


def write_reason(run_folder: Path, reason: str) -> None:
    """Write down, from within a trial, what went wrong; "" forgets what an earlier one said."""
    make_folder(run_folder)
    (run_folder / REASON).write_text(reason)
    storage.upload(run_folder / REASON)


def read_reason(run_folder: Path) -> str:
    """What a trial said went wrong, or ""."""
    return (storage.read(run_folder / REASON) or b"").decode()


def ranked(trials: Sequence[Trial]) -> list[Trial]:
    """Best first, by what was right at the end, then by cells; those without a score last.

    A trial that failed is behind all that did not, whatever it had reached.
    """

    def key(trial: Trial) -> tuple[bool, float, str]:
        objective = trial.last.objective if trial.last else -1.0
        return trial.status == "failed", -objective, trial.name

    return sorted(trials, key=key)


def format_trial(trial: Trial) -> str:
    """Its values and its newest score, in a line."""
    values = " ".join(f"{key}={_short(value)}" for key, value in trial.values.items())
    score = "no score yet"
    if trial.last:
        score = f"step {trial.step}: {trial.last.rate}, cells {trial.last.cells:.1%}"
    return f"{trial.name} {values}: {score}"


def describe(trials: Sequence[Trial], axes: Sequence[Axis]) -> str:
    """The ranking as a table for a terminal of any width, failures with their reasons."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("", *(axis.key for axis in axes), "right of held-out", "cells", "step", "s", ""):
        table.add_column(name, overflow="fold")
    for place, trial in enumerate(ranked(trials), start=1):
        last = trial.last
        table.add_row(
            str(place),
            *(_short(trial.values.get(axis.key)) for axis in axes),
            str(last.rate) if last else "no score",
            f"{last.cells:.1%}" if last else "",
            str(trial.step),
            f"{trial.seconds:.0f}",
            "" if trial.status == "done" else trial.status,
        )
    console = Console(width=max(100, Console().width), no_color=True)
    with console.capture() as captured:
        console.print(table)
    lines = [captured.get().rstrip()]
    failed = [trial for trial in trials if trial.status == "failed"]
    lines += [f"{trial.name} failed: {trial.error}" for trial in failed]
    scored = [trial for trial in trials if trial.last]
    lines.append(
        f"on held-out training tasks; the best of {len(scored)} is a lucky pick among them: expect"
        " less of it on new tasks"
    )
    return "\n".join(lines)


def write_results(path: Path, trials: Sequence[Trial], axes: Sequence[Axis]) -> None:
    """sweep.parquet: one row a trial, best first, one column a key."""
    rows = []
    for trial in ranked(trials):
        last = trial.last
        rows.append(
            {
                "trial": trial.name,
                "status": trial.status,
                **{axis.key: trial.values.get(axis.key) for axis in axes},
                "step": trial.step,
                "right": last.right if last else None,
                "evaluated": last.evaluated if last else None,
                "low": last.rate.low if last else None,
                "high": last.rate.high if last else None,
                "cells": last.cells if last else None,
                "objective": last.objective if last else None,
                "seconds": trial.seconds,
                "error": trial.error or None,
            }
        )
    columns = {name: [row[name] for row in rows] for name in rows[0]} if rows else {}
    table = pa.table({name: _column(values) for name, values in columns.items()})
    partial = path.with_name(f".{path.name}.tmp")
    pq.write_table(table, partial)
    os.replace(partial, path)
    storage.upload(path)


def best_yaml(config: Config, trials: Sequence[Trial]) -> str:
    """The experiment with the best trial's values, for jobs/joint.py; UserError without one."""
    scored = [t for t in ranked(trials) if t.last and t.status != "failed"]
    if not scored:
        raise UserError("no trial of the sweep has a score")
    best = scored[0]
    assert best.last is not None
    config = trial_config(config, best.values)
    config = replace(config, logging=replace(config.logging, run=f"{config.logging.run}-best"))
    raw = to_dict(config)
    del raw["sweep"]
    values = ", ".join(f"{key}={_short(value)}" for key, value in best.values.items())
    values = " ".join(values.splitlines())
    said = (
        f"# The best of {len(scored)} trials, {best.name}: {values}\n"
        f"# Held-out training tasks right at step {best.step}: {best.last.rate}\n"
    )
    return said + yaml.safe_dump(raw, sort_keys=False)


def _column(values: list[Any]) -> pa.Array:
    """One type a column; values of several kinds (`choice: [auto, 3]`) become text."""
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
        return pa.array([None if value is None else str(value) for value in values])


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
