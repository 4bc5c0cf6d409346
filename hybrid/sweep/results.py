"""Trial records on disk, and the ranking made from them: table, sweep.parquet, best.yaml."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
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
RECORD = "trial.json"
"""File in a trial's run folder that holds its TrialRecord; written only by the sweep's driver."""
REASON = "reason.txt"
"""File next to it, written by the trial's own process: the error that ended it."""


@dataclass(frozen=True, kw_only=True)
class TrialRecord:
    """The content of trial.json."""

    values: Mapping[str, Any]
    """Sampled values by dotted config key."""
    status: Status
    seconds: float
    """Training time, over all runs of the trial."""
    error: str = ""


@dataclass(frozen=True, kw_only=True)
class Trial(TrialRecord):
    """A trial's record with its validation curve."""

    name: str
    curve: Mapping[int, Validation]
    """Validations by step."""

    @property
    def step(self) -> int:
        """Step of the newest validation; 0 before the first."""
        return max(self.curve, default=0)

    @property
    def last(self) -> Validation | None:
        """The newest validation."""
        return self.curve[self.step] if self.curve else None


def read_trial(run_folder: Path) -> Trial | None:
    """Read a trial from its run folder; return None if it has not started."""
    try:
        data = storage.read(run_folder / RECORD)
        if data is None:
            return None
        record = json.loads(data)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{storage.uri(run_folder / RECORD)}: cannot be read ({error}); delete its folder"
        ) from error
    curve = validated(parse_metrics(storage.read(run_folder / "metrics.jsonl") or b""))
    return Trial(name=run_folder.name, curve=curve, **record)


def write_trial(run_folder: Path, record: TrialRecord) -> None:
    """Write a trial's record to its run folder."""
    make_folder(run_folder)
    storage.write(run_folder / RECORD, json.dumps(asdict(record)) + "\n")


def write_reason(run_folder: Path, reason: str) -> None:
    """Store the error that ended a trial; "" clears the error of an earlier run."""
    make_folder(run_folder)
    storage.write(run_folder / REASON, reason)


def read_reason(run_folder: Path) -> str:
    """Return the error that `write_reason` stored, or ""."""
    return (storage.read(run_folder / REASON) or b"").decode()


def ranked(trials: Sequence[Trial]) -> list[Trial]:
    """Sort by newest objective, best first; then trials without one, then failed trials."""

    def key(trial: Trial) -> tuple[bool, float, str]:
        objective = trial.last.objective if trial.last else -1.0
        return trial.status == "failed", -objective, trial.name

    return sorted(trials, key=key)


def format_trial(trial: Trial) -> str:
    """Format a trial's values and its last score as one line."""
    values = " ".join(f"{key}={format_value(value)}" for key, value in trial.values.items())
    score = "no score yet"
    if trial.last:
        score = f"step {trial.step}: {trial.last.rate}, cells {trial.last.cells:.1%}"
    return f"{trial.name} {values}: {score}"


def ranking_header(axes: Sequence[Axis]) -> list[str]:
    """Return the column names of `ranking_row`."""
    return ["", *(axis.key for axis in axes), "right of held-out", "cells", "step", "seconds"]


def ranking_row(rank: int, trial: Trial, axes: Sequence[Axis]) -> list[str]:
    """Format a trial as a row of the ranking table, without its status."""
    last = trial.last
    return [
        str(rank),
        *(format_value(trial.values.get(axis.key)) for axis in axes),
        str(last.rate) if last else "no score",
        f"{last.cells:.1%}" if last else "",
        str(trial.step),
        f"{trial.seconds:.0f}",
    ]


def format_ranking(trials: Sequence[Trial], axes: Sequence[Axis]) -> str:
    """Format the ranking as a table for the terminal, followed by the errors of failed trials."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in (*ranking_header(axes), ""):
        table.add_column(name, overflow="fold")
    for rank, trial in enumerate(ranked(trials), start=1):
        status = "" if trial.status == "done" else trial.status
        table.add_row(*ranking_row(rank, trial, axes), status)
    console = Console(width=max(100, Console().width), no_color=True)
    with console.capture() as captured:
        console.print(table)
    lines = [captured.get().rstrip()]
    failed = [trial for trial in trials if trial.status == "failed"]
    lines += [f"{trial.name} failed: {trial.error}" for trial in failed]
    scored = [trial for trial in trials if trial.last]
    lines.append(
        f"scores are on held-out training tasks; the best of {len(scored)} was selected by its"
        " score: expect a lower one on new tasks"
    )
    return "\n".join(lines)


def write_results(path: Path, trials: Sequence[Trial], axes: Sequence[Axis]) -> None:
    """Write sweep.parquet: one row per trial, best first, with one column per swept key."""
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
    buffer = pa.BufferOutputStream()
    pq.write_table(pa.table({name: _column(cells) for name, cells in columns.items()}), buffer)
    storage.write(path, buffer.getvalue().to_pybytes())


def best_yaml(config: Config, trials: Sequence[Trial]) -> str:
    """Return the best trial's experiment as YAML; raise UserError if no trial has a score."""
    scored = [t for t in ranked(trials) if t.last and t.status != "failed"]
    if not scored:
        raise UserError("no trial of the sweep has a score")
    best = scored[0]
    assert best.last is not None
    config = trial_config(config, best.values)
    config = replace(config, logging=replace(config.logging, run=f"{config.logging.run}-best"))
    raw = to_dict(config)
    del raw["sweep"]
    values = ", ".join(f"{key}={format_value(value)}" for key, value in best.values.items())
    values = " ".join(values.splitlines())
    header = (
        f"# The best of {len(scored)} trials, {best.name}: {values}\n"
        f"# Held-out training tasks right at step {best.step}: {best.last.rate}\n"
    )
    return header + yaml.safe_dump(raw, sort_keys=False)


def _column(values: list[Any]) -> pa.Array:
    """Convert to one type; values of mixed types (`choice: [auto, 3]`) become text."""
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
        return pa.array([None if value is None else str(value) for value in values])


def format_value(value: Any) -> str:
    """Format a sampled value; floats with three significant digits."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)
