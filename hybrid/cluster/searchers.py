"""Which trials a sweep still has to run: drawn beforehand, or proposed by Optuna as others end."""

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
PROPOSALS = 200
"""After so many that were known already, there are no others."""


def known_trials(config: Config) -> list[Trial]:
    """All trials that have begun."""
    folder = config.runs_folder
    found = [read_trial(folder / name) for name in storage.names(folder)]
    return [trial for trial in found if trial]


class RandomSearch:
    """Trials drawn beforehand; those that have ended tell Tune so, those that failed are left."""

    def __init__(self, config: Config, axes: Sequence[Axis]) -> None:
        failed = {trial.name for trial in known_trials(config) if trial.status == "failed"}
        drawn = draw(axes, config.sweep.num_samples, config.sweep.seed)
        done = {trial.name for trial in known_trials(config) if trial.status != "unfinished"}
        self.count = len(drawn)
        left = [values for values in drawn if trial_name(values) not in failed]
        self.names = {trial_name(values) for values in drawn}
        self.open = any(trial_name(values) not in done for values in left)
        self.said = f"{len(drawn)} trials, {len(done)} of them done"
        self.space = {"values": tune.grid_search(left)}
        self.num_samples = 1
        self.searcher = None


class OptunaSearch:
    """Trials chosen as they go, by what is known of those that have ended."""

    def __init__(self, config: Config, axes: Sequence[Axis]) -> None:
        known = known_trials(config)
        ended = [trial for trial in known if trial.status != "unfinished"]
        self.count = config.sweep.num_samples
        sizes = [_size(axis) for axis in axes]
        if all(sizes):  # no more trials than there are different ones
            self.count = min(self.count, math.prod(sizes))
        self.num_samples = max(0, self.count - len(ended))
        self.names: set[str] = set()  # it may end below the count
        self.open = self.num_samples > 0
        self.said = f"{self.count} trials, {len(ended)} of them done"
        self.space: dict[str, Any] = {}  # the searcher has it
        going = [dict(trial.values) for trial in known if trial.status == "unfinished"]
        # With the same seed it would propose the same again.
        self.searcher = _optuna_search(
            axes, config.sweep.seed + len(ended), going, {trial.name for trial in ended}
        )
        for trial in ended:
            if trial.last:
                self.searcher.add_evaluated_point(dict(trial.values), trial.last.objective)


def _optuna_search(
    axes: Sequence[Axis], seed: int, going: list[dict[str, Any]], known: set[str]
) -> Any:
    """Optuna behind Tune; no values are proposed twice, they would end in the same weights.

    `going`: values of trials that had begun, which come first. `known`: names of those that ended.
    """
    try:
        from optuna.trial import TrialState
        from ray.tune.search.optuna import OptunaSearch as TuneSearch
    except ImportError:
        raise UserError(
            'sweep.search=optuna: not installed; pip install "arc-hybrid[optuna]"'
        ) from None
    logging.getLogger("optuna").setLevel(logging.ERROR)
    given = set(known)

    class Search(TuneSearch):  # type: ignore[misc]
        def suggest(self, trial_id: str) -> Any:
            for _ in range(PROPOSALS):
                values = super().suggest(trial_id)
                if trial_name(values) not in given:
                    given.add(trial_name(values))
                    return values
                self._ot_study.tell(self._ot_trials.pop(trial_id), state=TrialState.FAIL)
            return self.FINISHED

    return Search(
        TuneSearch.convert_search_space({axis.key: _domain(axis) for axis in axes}),
        metric=OBJECTIVE,
        mode="max",
        seed=seed,
        points_to_evaluate=going or None,
    )


def _size(axis: Axis) -> int:
    """How many values it has; 0 for too many to count."""
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
