"""Search space of a sweep: dotted config keys, each with a list of values or a range.

adapter.hidden: {grid: [64, 128]}          every value, combined with every other grid
feedback.source: {choice: [none, confidence]}
training.ema_rate: {uniform: [0.9, 0.999]}
adapter.lr: {loguniform: [1.0e-4, 1.0e-2]}
training.max_attempts: {int: [1, 4]}       both ends inclusive
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
"""Float64 cannot represent every integer above it."""
LISTS = ("grid", "choice")
RANGES = ("uniform", "loguniform", "int")
FIXED = {
    "paths": "all trials share them",
    "data": "all trials use the same tasks",
    "evaluation": "all trials are evaluated in the same way",
    "cluster": "all trials have the same resources",
    "logging": "the sweep names its trials",
    "sweep": "a sweep cannot contain another sweep",
    "trm.init_from": "all trials start from the same checkpoint",
}
"""Sections and keys that cannot be swept over, with the reason."""


@dataclass(frozen=True, kw_only=True)
class Axis:
    """A swept key with its list of values, or with the two ends of its range."""

    key: str
    kind: str
    values: tuple[Any, ...]


def parse_space(config: Config) -> tuple[Axis, ...]:
    """Parse `sweep.space`; raise UserError that lists all problems, invalid values included."""
    space = config.sweep.space
    if not space:
        raise UserError("sweep.space: names no key; add at least one key to sweep over")
    problems: list[str] = []
    axes = [axis for key, entry in space.items() if (axis := _axis(key, entry, problems))]
    if config.sweep.search == "optuna":
        grids = [axis.key for axis in axes if axis.kind == "grid"]
        problems += [f"sweep.space.{key}: optuna cannot use grid; use choice" for key in grids]
    for axis in axes:
        for value in _samples(axis):
            try:
                trial = trial_config(config, {axis.key: value})
                check_feedback(trial)
                if axis.key == "llama.model" and trial.llama.model != value:
                    problems.append(
                        f"sweep.space.{axis.key}: relative path {value} depends on the trial's"
                        f" working directory; write {trial.llama.model}"
                    )
            except UserError as error:
                problems.append(f"sweep.space.{axis.key}: {error}")
                if "unknown" in str(error):
                    break  # the key is unknown, so every value has the same error
    if problems:
        raise UserError("; ".join(dict.fromkeys(problems)))
    return tuple(axes)


def _samples(axis: Axis) -> tuple[Any, ...]:
    """Return the values to validate; of a continuous range, both ends and one between."""
    if axis.kind not in ("uniform", "loguniform"):
        return axis.values
    low, high = axis.values
    return low, low + 0.618 * (high - low), high


def _axis(key: Any, entry: Any, problems: list[str]) -> Axis | None:
    """Parse one entry of `sweep.space`; append to `problems` and return None if it is invalid."""
    where = f"sweep.space.{key}"
    section, dot, name = str(key).partition(".")
    if not (dot and section and name):
        problems.append(f"{where}: must be of the form section.key")
    elif section in FIXED or key in FIXED:
        fixed = section if section in FIXED else key
        problems.append(f"{where}: {fixed} cannot be swept over, {FIXED[fixed]}")
    elif not isinstance(entry, Mapping) or len(entry) != 1:
        problems.append(f"{where}: must be one of {', '.join(LISTS + RANGES)} with its values")
    else:
        ((kind, values),) = entry.items()
        problem = _problem(kind, values)
        if not problem:
            return Axis(key=str(key), kind=kind, values=tuple(values))
        problems.append(f"{where}: {problem}")
    return None


def _problem(kind: Any, values: Any) -> str | None:
    """Describe the error of an entry of `sweep.space`; return None if it is valid."""
    if kind not in LISTS + RANGES:
        return f"{kind!r} is not one of {', '.join(LISTS + RANGES)}"
    if not isinstance(values, Sequence) or isinstance(values, str) or not values:
        return f"{kind} must be a list of values, got {values!r}"
    if kind in LISTS:
        repeated = len(set(map(repr, values))) < len(values)
        return f"{kind} has duplicate values: {values}" if repeated else None
    types = (int,) if kind == "int" else (int, float)
    numbers = all(isinstance(v, types) and not isinstance(v, bool) for v in values)
    if not numbers or len(values) != 2 or not values[0] < values[1]:
        expected = "integers" if kind == "int" else "numbers"
        return f"{kind} must be two {expected}, the smaller one first, got {values}"
    if kind == "loguniform" and values[0] <= 0:
        return f"{kind} must be finite and above 0, got {values}"
    if not all(abs(value) < LARGEST for value in values):
        return f"{kind} must be finite and below 2**53, got {values}"
    return None


def draw(axes: Sequence[Axis], num_samples: int, seed: int) -> list[dict[str, Any]]:
    """Sample the trials: every combination of the grids, `num_samples` times.

    Keys that are not grids are drawn anew for each. Duplicates are dropped, because training is
    deterministic. A larger `num_samples` with the same `seed` extends the list.
    """
    rng = np.random.default_rng(seed)
    grids = [axis for axis in axes if axis.kind == "grid"]
    trials: dict[str, dict[str, Any]] = {}
    for _ in range(num_samples):
        for combination in itertools.product(*(axis.values for axis in grids)):
            fixed = dict(zip((axis.key for axis in grids), combination, strict=True))
            drawn = {axis.key: _draw(axis, rng) for axis in axes if axis.kind != "grid"}
            values = {axis.key: (fixed | drawn)[axis.key] for axis in axes}
            trials.setdefault(trial_name(values), values)
    return list(trials.values())


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
    return min(max(float(f"{drawn:.4g}"), low), high)  # four significant digits


def trial_name(values: Mapping[str, Any]) -> str:
    """Return the run name of a trial: a hash of its values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:10]


def trial_config(config: Config, values: Mapping[str, Any]) -> Config:
    """Return the experiment with a trial's values; raise UserError if it does not accept them."""
    raw = to_dict(config)
    for key, value in values.items():
        section, _, name = key.partition(".")
        raw.setdefault(section, {})[name] = value
    where = ", ".join(f"{key}={value!r}" for key, value in values.items())
    return from_dict(raw, where=where)
