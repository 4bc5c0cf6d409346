"""A sweep on the cluster: Ray Tune runs trials side by side, each a training run of its own.

What is known of a trial lies in its run folder, as plain files; Tune's own records are not read
again. A sweep that is run once more tells Tune what its trials have reached, and goes on.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.exceptions import RayError
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler

from hybrid import storage
from hybrid.cluster.prompt_cache import cache_prompts_on_ray
from hybrid.cluster.runtime import cluster
from hybrid.cluster.searchers import OBJECTIVE, OptunaSearch, RandomSearch, known_trials
from hybrid.cluster.trainer import run, trainer
from hybrid.config import Config, differences, from_dict, to_dict
from hybrid.context import LocalContext
from hybrid.dataset import Dataset, prepare
from hybrid.device import compute_device, share_cores
from hybrid.errors import Stopped, UserError, make_folder
from hybrid.evaluate import Validation
from hybrid.prompt_cache import cache_prompts_locally, plan, summary
from hybrid.sweep import (
    Axis,
    Trial,
    best_yaml,
    format_trial,
    parse_space,
    read_reason,
    read_trial,
    trial_config,
    trial_name,
    write_reason,
    write_report,
    write_results,
    write_trial,
)
from hybrid.train import Joint, check, initial_checkpoint, joint, total_steps
from hybrid.train.preflight import training_stream

SWEEP = "sweep.json"
"""In the run folder: the config that its trials vary."""
TUNE_FOLDER = "tune"
"""Ray Tune's own bookkeeping, inside the run folder."""

Say = Callable[[str], None]
Values = Mapping[str, Any]


def sweep(config: Config, say: Say = print) -> tuple[list[Trial], tuple[Axis, ...]]:
    """Train the hybrid with many sets of values; rerunning the same config resumes it.

    Every trial is judged on training tasks that are held out (`sweep.hold_out_tasks`). Writes
    sweep.parquet, report.html and best.yaml into the run folder; a trial that fails is listed.
    """
    axes = parse_space(config)
    start = _check_unchanged(config)
    base = _prepared(config, start, say)
    search = RandomSearch(base, axes) if base.sweep.search == "random" else OptunaSearch(base, axes)
    if search.open:  # else what trials began from may be gone
        check(base, Joint.kind, Joint.sections)
    _note(config, base.trm.init_from)
    with cluster(base, workers=_workers(base), spare_cpus=_spare(base)):
        at_once = _at_once(base)
        say(f"{storage.uri(config.run_folder)}: {search.said}, {at_once} at a time")
        begun: set[str] = set()
        if search.open:
            if base.llama.prompt_cache:
                say(_cache_prompts(base))
            begun = _run(base, search, at_once, config.run_folder / TUNE_FOLDER, say)
    trials = known_trials(base)
    left = (search.names | begun) - {trial.name for trial in trials if trial.status != "unfinished"}
    write_results(config.run_folder / "sweep.parquet", trials, axes)
    write_report(config.run_folder / "report.html", config.logging.run, trials, axes)
    if left:
        raise Stopped(f"{len(left)} trials have not ended; the same command goes on with them")
    best = config.run_folder / "best.yaml"
    best.write_text(best_yaml(config, trials))
    storage.upload(best)
    return trials, axes


def _cache_prompts(config: Config) -> str:
    fill = cache_prompts_on_ray if config.cluster.num_workers else cache_prompts_locally
    missing = plan(config)
    return summary(config, missing, fill(config, missing))


def _prepared(config: Config, start: str | None, say: Say) -> Config:
    """The experiment that trials vary: on data of its own, with a start that stays where it is.

    `start`: the checkpoint that trials of this sweep have begun from, where there are some.
    """
    run_folder = storage.uri(config.run_folder)
    data = replace(config.data, evaluation=(), hold_out_tasks=config.sweep.hold_out_tasks)
    paths = replace(
        config.paths,
        data=storage.join(run_folder, "data"),
        runs=storage.join(run_folder, "trials"),
    )
    if start is None:
        initial = initial_checkpoint(config)
        start = storage.uri(initial.folder) if initial else None
    base = replace(config, data=data, paths=paths, trm=replace(config.trm, init_from=start))
    prepare(data, base.data_folder, say)
    return base


def _check_unchanged(config: Config) -> str | None:
    """UserError if the run folder holds another sweep; else what its trials begin from."""
    path = config.run_folder / SWEEP
    storage.download(path)
    if not path.exists():
        return None
    try:
        before = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{storage.uri(path)}: cannot be read ({error})") from error
    now = json.loads(json.dumps(to_dict(config)))
    sections = [name for name in now if name not in ("cluster", "paths", "logging")]
    may = ("sweep.num_samples:", "sweep.max_concurrent_trials:")  # more of the same, or faster
    changed = [c for c in differences(before, now, sections) if not c.startswith(may)]
    if changed:
        raise UserError(
            f"{storage.uri(path.parent)}: holds another sweep ({'; '.join(changed)}); give"
            " this one another logging.run"
        )
    start: str | None = before.get("start")
    return start


def _note(config: Config, start: str | None) -> None:
    """Write down which sweep the run folder holds, and which checkpoint its start is."""
    path = config.run_folder / SWEEP
    make_folder(path.parent)
    partial = path.with_name(f".{path.name}.tmp")
    partial.write_text(json.dumps({**to_dict(config), "start": start}))
    os.replace(partial, path)
    storage.upload(path)


def _workers(config: Config) -> int:
    """Of a trial; without any the loop runs in Tune's own process."""
    return max(1, config.cluster.num_workers)


def _spare(config: Config) -> int:
    """CPUs for the rows of all trials, which Ray Data makes for workers."""
    return int(config.cluster.num_workers > 0)


def _at_once(config: Config) -> int:
    """Trials that the cluster holds side by side."""
    have = ray.cluster_resources()
    needs = _workers(config) * config.cluster.cpus_per_worker
    fit = int((have["CPU"] - _spare(config)) // needs)
    if config.cluster.use_gpu:
        fit = min(fit, int(have["GPU"] // _workers(config)))
    return max(1, min(fit, config.sweep.max_concurrent_trials or fit))


def _run(
    config: Config, search: RandomSearch | OptunaSearch, at_once: int, folder: Path, say: Say
) -> set[str]:
    """Run the trials, Tune's own records in `folder`; names of those that have begun."""
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # its tables; ours are said here
    # A checkpoint that nobody planned comes without a score.
    os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")
    for name in ("ray.tune", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)
    rows = len(training_stream(config, Dataset.open(config.data_folder)))
    scheduler = FIFOScheduler()
    if config.sweep.scheduler == "asha":
        scheduler = ASHAScheduler(
            time_attr="step",
            max_t=10**9,  # a trial ends by itself
            grace_period=config.sweep.grace_period or config.training.save_every,
            reduction_factor=config.sweep.reduction_factor,
        )
    storage.remove(folder)
    store, name = storage.filesystem(folder.parent)
    notes = _TrialRecorder(config, rows, search.count, say)
    trainable = tune.with_parameters(_train_trial, base=to_dict(config))
    tune.Tuner(
        tune.with_resources(trainable, _resources(config)),
        param_space=search.space,
        tune_config=tune.TuneConfig(
            metric=OBJECTIVE,
            mode="max",
            num_samples=search.num_samples,
            max_concurrent_trials=at_once,
            search_alg=search.searcher,
            scheduler=scheduler,
        ),
        run_config=tune.RunConfig(
            name=folder.name,
            # A process that is lost is replaced, and goes on from its checkpoint.
            failure_config=tune.FailureConfig(max_failures=config.cluster.max_failures),
            storage_path=name,
            storage_filesystem=store,
            callbacks=[notes],
            verbose=0,
        ),
    ).fit()
    return notes.begun


def _resources(config: Config) -> dict[str, float]:
    """Of Tune's process of a trial: no CPU where workers do the work, or the processes could hold
    all of them and no worker start. Something it must be: a megabyte.
    """
    if config.cluster.num_workers:
        return {"CPU": 0, "memory": 2**20}
    return {"CPU": config.cluster.cpus_per_worker, "GPU": int(config.cluster.use_gpu)}


def _train_trial(settings: dict[str, Any], base: dict[str, Any]) -> None:
    """What Tune runs: a training run, from where it stands."""
    values = settings.get("values", settings)
    config = _config_of(from_dict(base), values)
    before = read_trial(config.run_folder)
    if before:
        for step, validation in sorted(before.curve.items()):
            _report(step, validation)
        if before.status != "unfinished":
            return
    write_reason(config.run_folder, "")
    try:
        check(config, Joint.kind, Joint.sections)
        if config.cluster.num_workers:
            result = run(trainer(config, Joint.kind, [TuneReportCallback()]), config)
        else:
            share_cores(1)
            result = joint(config, _TrialContext(compute_device(config.cluster.use_gpu)))
    except Exception as error:
        # Whether the trial has failed, or the sweep was ended around it, is for the sweep to say.
        write_reason(config.run_folder, _reason(error))
        if isinstance(error, RayError):
            raise  # a process of Ray's was lost: Tune tries again, which would not help with others
        return
    # Said once more: what a worker says last, Ray Train may lose with the worker.
    assert result.validation is not None
    _report(result.step, result.validation)


class _TrialContext(LocalContext):
    """A trial without workers."""

    def report(self, metrics: Mapping[str, Any], checkpoint: Path) -> None:
        """To Tune."""
        tune.report(dict(metrics))


def _report(step: int, validation: Validation) -> None:
    tune.report({"step": step, **validation.metrics()})


def _config_of(config: Config, values: Values) -> Config:
    """The experiment of a trial."""
    config = trial_config(config, values)
    return replace(config, logging=replace(config.logging, run=trial_name(values)))


class _TrialRecorder(tune.Callback):  # type: ignore[misc]
    """In the sweep's own process: writes down how trials end, and says how they go."""

    def __init__(self, config: Config, rows: int, count: int, say: Say) -> None:
        self.config, self.rows, self.count, self.say = config, rows, count, say
        self.said: dict[str, int] = {}
        self.before: dict[str, float] = {}
        """Seconds of trials before this sweep took them up again."""
        self.begun: set[str] = set()
        """Names of trials."""

    def on_trial_start(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        known = self._known(trial)
        self.begun.add(self._folder(trial).name)
        self.before[self._folder(trial).name] = known.seconds if known else 0.0
        if known is None:
            self._write(trial, "unfinished")

    def on_trial_result(
        self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        known = self._known(trial)
        if known and known.step > self.said.get(known.name, 0):
            self.said[known.name] = known.step
            self.say(format_trial(known))
            if known.status == "unfinished":
                self._write(trial, "unfinished")

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        known = self._known(trial)
        if not known or known.status != "unfinished":
            return
        reason = read_reason(self._folder(trial))
        if reason:
            self._end(trial, "failed", reason)
        else:
            done = known.step == total_steps(_config_of(self.config, known.values), self.rows)
            self._end(trial, "done" if done else "stopped early")

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        reason = read_reason(self._folder(trial)) or "its process died"
        self._end(trial, "failed", reason)

    def _write(self, trial: Any, status: Any, error: str = "") -> None:
        folder = self._folder(trial)
        seconds = float((trial.last_result or {}).get("time_total_s", 0.0))
        seconds += self.before.get(folder.name, 0.0)
        write_trial(folder, self._values(trial), status, seconds, error)

    def _end(self, trial: Any, status: Any, error: str = "") -> None:
        self._write(trial, status, error)
        ended = sum(t.status != "unfinished" for t in known_trials(self.config))
        self.say(
            f"{ended}/{self.count} {self._folder(trial).name} {status}"
            f"{': ' if error else ''}{error}"
        )

    def _values(self, trial: Any) -> Values:
        values: Values = trial.config.get("values", trial.config)
        return values

    def _folder(self, trial: Any) -> Path:
        return self.config.runs_folder / trial_name(self._values(trial))

    def _known(self, trial: Any) -> Trial | None:
        return read_trial(self._folder(trial))


def _reason(error: BaseException) -> str:
    """What a trial failed of, in one line: the last words of the innermost cause."""
    failures = getattr(error, "worker_failures", None) or {}
    for inner in (*failures.values(), error.__cause__):
        if isinstance(inner, BaseException):
            return _reason(inner)
    if isinstance(error, UserError):
        return str(error)
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[-1] if lines else 'no reason given'}"
