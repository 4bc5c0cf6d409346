"""Search algorithms: trials sampled in advance, or suggested by Optuna while the sweep runs."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

from ray import tune

from hybrid import storage
from hybrid.config import Config
from hybrid.errors import UserError
from hybrid.sweep import Axis, Trial, draw, read_trial, trial_name

OBJECTIVE = "validation/objective"
MAX_DUPLICATES = 200
"""Give up after this many consecutive duplicate suggestions."""


def known_trials(config: Config) -> list[Trial]:
    """Return all trials that have started."""
    folder = config.runs_folder
    trials = [read_trial(folder / name) for name in storage.names(folder)]
    return [trial for trial in trials if trial]


class RandomSearch:
    """Trials sampled in advance; finished ones report to Tune again, failed ones are left out."""

    def __init__(self, config: Config, axes: Sequence[Axis]) -> None:
        known = known_trials(config)
        failed = {trial.name for trial in known if trial.status == "failed"}
        ended = {trial.name for trial in known if trial.status != "unfinished"}
        sampled = draw(axes, config.sweep.num_samples, config.sweep.seed)
        self.count = len(sampled)
        runnable = [values for values in sampled if trial_name(values) not in failed]
        self.names = {trial_name(values) for values in sampled}
        self.open = any(trial_name(values) not in ended for values in runnable)
        self.summary = f"{len(sampled)} trials, {len(ended)} of them done"
        self.space = {"values": tune.grid_search(runnable)}
        self.num_samples = 1
        self.searcher = None


class OptunaSearch:
    """Trials suggested by Optuna from the scores of trials that have ended."""

    def __init__(self, config: Config, axes: Sequence[Axis]) -> None:
        known = known_trials(config)
        ended = [trial for trial in known if trial.status != "unfinished"]
        self.count = config.sweep.num_samples
        sizes = [_size(axis) for axis in axes]
        if all(sizes):  # the space is finite
            self.count = min(self.count, math.prod(sizes))
        self.num_samples = max(0, self.count - len(ended))
        self.names: set[str] = set()  # unknown in advance
        self.open = self.num_samples > 0
        self.summary = f"{self.count} trials, {len(ended)} of them done"
        self.space: dict[str, Any] = {}  # the searcher holds the space
        unfinished = [dict(trial.values) for trial in known if trial.status == "unfinished"]
        # With an unchanged seed Optuna would repeat its first suggestions.
        self.searcher = _optuna_search(
            axes, config.sweep.seed + len(ended), unfinished, {trial.name for trial in ended}
        )
        for trial in ended:
            if trial.last:
                self.searcher.add_evaluated_point(dict(trial.values), trial.last.objective)


def _optuna_search(
    axes: Sequence[Axis], seed: int, unfinished: list[dict[str, Any]], ended: set[str]
) -> Any:
    """Return Tune's Optuna searcher without duplicates, because training is deterministic.

    `unfinished`: values of started trials, which it suggests first. `ended`: names of ended trials.
    """
    try:
        from optuna.trial import TrialState
        from ray.tune.search.optuna import OptunaSearch as TuneSearch
    except ImportError:
        raise UserError(
            'sweep.search=optuna: not installed; pip install "arc-hybrid[optuna]"'
        ) from None
    logging.getLogger("optuna").setLevel(logging.ERROR)
    suggested = set(ended)

    class Search(TuneSearch):  # type: ignore[misc]
        def suggest(self, trial_id: str) -> Any:
            for _ in range(MAX_DUPLICATES):
                values = super().suggest(trial_id)
                if trial_name(values) not in suggested:
                    suggested.add(trial_name(values))
                    return values
                self._ot_study.tell(self._ot_trials.pop(trial_id), state=TrialState.FAIL)
            return self.FINISHED

    return Search(
        TuneSearch.convert_search_space({axis.key: _domain(axis) for axis in axes}),
        metric=OBJECTIVE,
        mode="max",
        seed=seed,
        points_to_evaluate=unfinished or None,
    )


def _size(axis: Axis) -> int:
    """Return the number of values of an axis; 0 if it is continuous."""
    if axis.kind == "int":
        return int(axis.values[1] - axis.values[0] + 1)
    return len(axis.values) if axis.kind == "choice" else 0


def _domain(axis: Axis) -> Any:
    if axis.kind == "choice":
        return tune.choice(list(axis.values))
    low, high = axis.values
    if axis.kind == "int":
        return tune.randint(low, high + 1)
    return tune.uniform(low, high) if axis.kind == "uniform" else tune.loguniform(low, high)
