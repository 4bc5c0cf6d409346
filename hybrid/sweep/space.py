"""What a sweep varies: dotted keys of the experiment, each with a kind of range.

adapter.hidden: {grid: [64, 128]}          every value, with every other grid
feedback.source: {choice: [none, confidence]}
training.ema_rate: {uniform: [0.9, 0.999]}
adapter.lr: {loguniform: [1.0e-4, 1.0e-2]}
training.max_attempts: {int: [1, 4]}       both ends included
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hybrid.config import Config, from_dict, to_dict
from hybrid.errors import UserError
from hybrid.train import check_feedback

LARGEST = 2**53
"""Beyond it not every whole number is a number."""
LISTS = ("grid", "choice")
RANGES = ("uniform", "loguniform", "int")
FIXED = {
    "paths": "all trials share them",
    "data": "all trials are asked the same",
    "evaluation": "all trials are asked in the same way",
    "cluster": "all trials have the same resources",
    "logging": "trials are named by the sweep",
    "sweep": "a sweep of sweeps is not to be had",
    "trm.init_from": "all trials start from the same",
}
"""What is not for sweeping, and why."""


@dataclass(frozen=True, kw_only=True)
class Axis:
    """One key and its values: a list of them, or the two ends of a range."""

    key: str
    kind: str
    values: tuple[Any, ...]


def parse_space(config: Config) -> tuple[Axis, ...]:
    """The axes of `sweep.space`; UserError with every problem, and values no trial could have."""
    space = config.sweep.space
    if not space:
        raise UserError("sweep.space: names no key to sweep over")
    problems: list[str] = []
    axes = [axis for key, given in space.items() if (axis := _axis(key, given, problems))]
    if config.sweep.search == "optuna":
        grids = [axis.key for axis in axes if axis.kind == "grid"]
        problems += [f"sweep.space.{key}: optuna searches no grid, use choice" for key in grids]
    for axis in axes:
        for value in _samples(axis):
            try:
                tried = trial_config(config, {axis.key: value})
                check_feedback(tried)
                if axis.key == "llama.model" and tried.llama.model != value:
                    problems.append(
                        f"sweep.space.{axis.key}: {value} is another folder to each trial: write"
                        f" {tried.llama.model}"
                    )
            except UserError as error:
                problems.append(f"sweep.space.{axis.key}: {error}")
                if "unknown" in str(error):
                    break  # whatever its value
    if problems:
        raise UserError("; ".join(dict.fromkeys(problems)))
    return tuple(axes)


def _samples(axis: Axis) -> tuple[Any, ...]:
    """Values that a trial could have: of a range its ends and one between."""
    if axis.kind not in ("uniform", "loguniform"):
        return axis.values
    low, high = axis.values
    return low, low + 0.618 * (high - low), high


def _axis(key: Any, given: Any, problems: list[str]) -> Axis | None:
    where = f"sweep.space.{key}"
    section, dot, name = str(key).partition(".")
    if not (dot and section and name):
        problems.append(f"{where}: not a section.key")
    elif section in FIXED or key in FIXED:
        what = section if section in FIXED else key
        problems.append(f"{where}: {what} cannot be swept over, {FIXED[what]}")
    elif not isinstance(given, Mapping) or len(given) != 1:
        problems.append(f"{where}: must be one of {', '.join(LISTS + RANGES)} with its values")
    else:
        ((kind, values),) = given.items()
        problem = _wrong(kind, values)
        if not problem:
            return Axis(key=str(key), kind=kind, values=tuple(values))
        problems.append(f"{where}: {problem}")
    return None


def _wrong(kind: Any, values: Any) -> str | None:
    if kind not in LISTS + RANGES:
        return f"{kind!r} is not one of {', '.join(LISTS + RANGES)}"
    if not isinstance(values, Sequence) or isinstance(values, str) or not values:
        return f"{kind} must be a list of values, got {values!r}"
    if kind in LISTS:
        repeated = len(set(map(repr, values))) < len(values)
        return f"{kind} has a value twice: {values}" if repeated else None
    wanted = (int,) if kind == "int" else (int, float)
    numbers = all(isinstance(v, wanted) and not isinstance(v, bool) for v in values)
    if not numbers or len(values) != 2 or not values[0] < values[1]:
        what = "whole numbers" if kind == "int" else "numbers"
        return f"{kind} must be two {what}, the smaller one first, got {values}"
    if kind == "loguniform" and values[0] <= 0:
        return f"{kind} must be finite and above 0: {values}"
    if not all(abs(value) < LARGEST for value in values):
        return f"{kind} must be finite, and below 2**53: {values}"
    return None


def draw(axes: Sequence[Axis], num_samples: int, seed: int) -> list[dict[str, Any]]:
    """Values of the trials: every combination of the grids, the other keys drawn `samples` times.

    The same trial twice would end in the same weights: it is there once.
    """
    rng = np.random.default_rng(seed)
    grids = [axis for axis in axes if axis.kind == "grid"]
    found: dict[str, dict[str, Any]] = {}
    for _ in range(num_samples):
        for combination in itertools.product(*(axis.values for axis in grids)):
            chosen = dict(zip((axis.key for axis in grids), combination, strict=True))
            drawn = {axis.key: _draw(axis, rng) for axis in axes if axis.kind != "grid"}
            values = {axis.key: (chosen | drawn)[axis.key] for axis in axes}
            found.setdefault(trial_name(values), values)
    return list(found.values())


def _draw(axis: Axis, rng: np.random.Generator) -> Any:
    if axis.kind == "choice":
        return axis.values[int(rng.integers(len(axis.values)))]
    low, high = axis.values
    if axis.kind == "int":
        return int(rng.integers(low, high + 1))
    if axis.kind == "uniform":
        drawn = rng.uniform(low, high)
    else:
        drawn = math.exp(rng.uniform(math.log(low), math.log(high)))
    return min(max(float(f"{drawn:.4g}"), low), high)  # nobody reads seventeen digits


def trial_name(values: Mapping[str, Any]) -> str:
    """The name of a trial's run: the same values have the same."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:10]


def trial_config(config: Config, values: Mapping[str, Any]) -> Config:
    """The experiment with the values of a trial; UserError if there is no such experiment."""
    raw = to_dict(config)
    for key, value in values.items():
        section, _, name = key.partition(".")
        raw.setdefault(section, {})[name] = value
    said = ", ".join(f"{key}={value!r}" for key, value in values.items())
    return from_dict(raw, where=said)
