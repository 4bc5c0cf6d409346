"""Hyperparameter sweeps with Ray Tune; each trial is a separate training run.

The state of a trial is in plain files in its run folder; Tune's own records are never read. To
resume a sweep, finished trials report their stored validations to Tune again.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
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
from hybrid.cluster.trainer import make_trainer, run_trainer
from hybrid.config import Config, differences, from_dict, to_dict
from hybrid.context import LocalContext
from hybrid.dataset import Dataset, prepare
from hybrid.device import compute_device, share_cores
from hybrid.errors import Stopped, UserError, make_folder
from hybrid.evaluate import Validation
from hybrid.prompt_cache import cache_prompts_locally, plan, summary
from hybrid.sweep import (
    Axis,
    Status,
    Trial,
    TrialRecord,
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
"""File in the run folder that holds the sweep's SweepRecord."""
TUNE_FOLDER = "tune"
"""Subfolder of the run folder for Ray Tune's own records."""

Echo = Callable[[str], None]
Values = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class SweepRecord:
    """The content of sweep.json, where `start` is a key next to the config's sections."""

    config: dict[str, Any]
    start: str | None
    """Checkpoint that all trials start from."""


def sweep(config: Config, echo: Echo = print) -> tuple[list[Trial], tuple[Axis, ...]]:
    """Train the hybrid once per set of sampled values; rerunning the same config resumes the sweep.

    Trials are scored on held-out training tasks (`sweep.hold_out_tasks`). Writes sweep.parquet,
    report.html and best.yaml to the run folder. Failed trials are listed with their errors.
    Raises Stopped, without best.yaml, if trials are left to run.
    """
    axes = parse_space(config)
    start = _check_unchanged(config)
    base = _prepared(config, start, echo)
    search = RandomSearch(base, axes) if base.sweep.search == "random" else OptunaSearch(base, axes)
    if search.open:  # else the start checkpoint may have been deleted
        check(base, Joint.kind, Joint.sections)
    _write_record(config, SweepRecord(config=to_dict(config), start=base.trm.init_from))
    with cluster(base, workers=_workers(base), spare_cpus=_spare(base)):
        concurrent = _concurrent_trials(base)
        echo(f"{storage.uri(config.run_folder)}: {search.summary}, {concurrent} at a time")
        started: set[str] = set()
        if search.open:
            if base.llama.prompt_cache:
                echo(_cache_prompts(base))
            started = _run(base, search, concurrent, config.run_folder / TUNE_FOLDER, echo)
    trials = known_trials(base)
    ended = {trial.name for trial in trials if trial.status != "unfinished"}
    left = (search.names | started) - ended
    write_results(config.run_folder / "sweep.parquet", trials, axes)
    write_report(config.run_folder / "report.html", config.logging.run, trials, axes)
    if left:
        raise Stopped(f"{len(left)} trials are unfinished; run the same command to resume them")
    storage.write(config.run_folder / "best.yaml", best_yaml(config, trials))
    return trials, axes


def _cache_prompts(config: Config) -> str:
    fill = cache_prompts_on_ray if config.cluster.num_workers else cache_prompts_locally
    missing = plan(config)
    return summary(config, missing, fill(config, missing))


def _prepared(config: Config, start: str | None, echo: Echo) -> Config:
    """Prepare the sweep's dataset; return the experiment that trials vary.

    `start`: the start checkpoint of an earlier run of this sweep. It is pinned by URI, because
    `trm.init_from` may name a run that gains checkpoints.
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
    prepare(data, base.data_folder, echo)
    return base


def _check_unchanged(config: Config) -> str | None:
    """Return the recorded start checkpoint, if any; raise UserError if the sweep has changed."""
    record = _read_record(config)
    if record is None:
        return None
    now = json.loads(json.dumps(to_dict(config)))
    sections = [name for name in now if name not in ("cluster", "paths", "logging")]
    allowed = ("sweep.num_samples:", "sweep.max_concurrent_trials:")
    changes = differences(record.config, now, sections)
    changed = [change for change in changes if not change.startswith(allowed)]
    if changed:
        raise UserError(
            f"{storage.uri(config.run_folder)}: holds another sweep ({'; '.join(changed)}); give"
            " this one another logging.run"
        )
    return record.start


def _read_record(config: Config) -> SweepRecord | None:
    path = config.run_folder / SWEEP
    data = storage.read(path)
    if data is None:
        return None
    try:
        content = json.loads(data)
    except ValueError as error:
        raise UserError(f"{storage.uri(path)}: cannot be read ({error})") from error
    return SweepRecord(start=content.pop("start", None), config=content)


def _write_record(config: Config, record: SweepRecord) -> None:
    make_folder(config.run_folder)
    data = json.dumps({**record.config, "start": record.start})
    storage.write(config.run_folder / SWEEP, data)


def _workers(config: Config) -> int:
    """Return the workers of a trial; with num_workers=0 the loop runs in Tune's process."""
    return max(1, config.cluster.num_workers)


def _spare(config: Config) -> int:
    """Return the CPUs to leave free for Ray Data, which serves the workers of all trials."""
    return int(config.cluster.num_workers > 0)


def _concurrent_trials(config: Config) -> int:
    """Return how many trials run at a time."""
    resources = ray.cluster_resources()
    cpus = _workers(config) * config.cluster.cpus_per_worker
    fit = int((resources["CPU"] - _spare(config)) // cpus)
    if config.cluster.use_gpu:
        fit = min(fit, int(resources["GPU"] // _workers(config)))
    return max(1, min(fit, config.sweep.max_concurrent_trials or fit))


def _run(
    config: Config, search: RandomSearch | OptunaSearch, concurrent: int, folder: Path, echo: Echo
) -> set[str]:
    """Run the trials, with Tune's own records in `folder`; return the names of started trials."""
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # Tune's own status tables
    # Checkpoints saved on a stop or preemption request are not validated.
    os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")
    for name in ("ray.tune", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)
    rows = len(training_stream(config, Dataset.open(config.data_folder)))
    scheduler = FIFOScheduler()
    if config.sweep.scheduler == "asha":
        scheduler = ASHAScheduler(
            time_attr="step",
            max_t=10**9,  # trials end by training.steps
            grace_period=config.sweep.grace_period or config.training.save_every,
            reduction_factor=config.sweep.reduction_factor,
        )
    storage.remove(folder)
    store, name = storage.filesystem(folder.parent)
    recorder = _TrialRecorder(config, rows, search.count, echo)
    trainable = tune.with_parameters(_train_trial, base=to_dict(config))
    tune.Tuner(
        tune.with_resources(trainable, _resources(config)),
        param_space=search.space,
        tune_config=tune.TuneConfig(
            metric=OBJECTIVE,
            mode="max",
            num_samples=search.num_samples,
            max_concurrent_trials=concurrent,
            search_alg=search.searcher,
            scheduler=scheduler,
        ),
        run_config=tune.RunConfig(
            name=folder.name,
            # A trial whose process is lost restarts from its checkpoint.
            failure_config=tune.FailureConfig(max_failures=config.cluster.max_failures),
            storage_path=name,
            storage_filesystem=store,
            callbacks=[recorder],
            verbose=0,
        ),
    ).fit()
    return recorder.started


def _resources(config: Config) -> dict[str, float]:
    """Return the resources of a trial's driver process.

    It has no CPU if workers train, else drivers could hold every CPU and block all workers. It has
    1 MiB of memory because Ray rejects an empty request.
    """
    if config.cluster.num_workers:
        return {"CPU": 0, "memory": 2**20}
    return {"CPU": config.cluster.cpus_per_worker, "GPU": int(config.cluster.use_gpu)}


def _train_trial(settings: dict[str, Any], base: dict[str, Any]) -> None:
    """Run or resume one trial in Tune's process; `settings` holds the sampled values."""
    values = settings.get("values", settings)
    config = _config_of(from_dict(base), values)
    known = read_trial(config.run_folder)
    if known:
        for step, validation in sorted(known.curve.items()):
            _report(step, validation)
        if known.status != "unfinished":
            return
    write_reason(config.run_folder, "")
    try:
        check(config, Joint.kind, Joint.sections)
        if config.cluster.num_workers:
            trainer = make_trainer(config, Joint.kind, [TuneReportCallback()])
            result = run_trainer(trainer, config)
        else:
            share_cores(1)
            result = joint(config, _TrialContext(compute_device(config.cluster.use_gpu)))
    except Exception as error:
        # Only the sweep's driver knows whether the trial failed or was stopped; it sets the status.
        write_reason(config.run_folder, _reason(error))
        if isinstance(error, RayError):
            raise  # a Ray process was lost: Tune restarts the trial
        return
    # Report again, because Ray Train may lose the last report of a worker that exits.
    assert result.validation is not None
    _report(result.step, result.validation)


class _TrialContext(LocalContext):
    """RunContext of a trial without workers."""

    def report(self, metrics: Mapping[str, Any], checkpoint: Path) -> None:
        """Report the metrics to Tune."""
        tune.report(dict(metrics))


def _report(step: int, validation: Validation) -> None:
    tune.report({"step": step, **validation.metrics()})


def _config_of(config: Config, values: Values) -> Config:
    """Return the config of a trial."""
    config = trial_config(config, values)
    return replace(config, logging=replace(config.logging, run=trial_name(values)))


class _TrialRecorder(tune.Callback):  # type: ignore[misc]
    """Write trial records and print progress, in the sweep's driver process."""

    def __init__(self, config: Config, rows: int, count: int, echo: Echo) -> None:
        self.config, self.rows, self.count, self.echo = config, rows, count, echo
        self.printed_steps: dict[str, int] = {}
        self.earlier_seconds: dict[str, float] = {}
        """Training time of resumed trials in earlier runs of the sweep."""
        self.started: set[str] = set()
        """Names of the trials that Tune has started."""

    def on_trial_start(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        known = self._known(trial)
        name = self._folder(trial).name
        self.started.add(name)
        self.earlier_seconds[name] = known.seconds if known else 0.0
        if known is None:
            self._write(trial, "unfinished")

    def on_trial_result(
        self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        known = self._known(trial)
        if known and known.step > self.printed_steps.get(known.name, 0):
            self.printed_steps[known.name] = known.step
            self.echo(format_trial(known))
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

    def _write(self, trial: Any, status: Status, error: str = "") -> None:
        folder = self._folder(trial)
        seconds = float((trial.last_result or {}).get("time_total_s", 0.0))
        seconds += self.earlier_seconds.get(folder.name, 0.0)
        values = dict(self._values(trial))
        record = TrialRecord(values=values, status=status, seconds=seconds, error=error)
        write_trial(folder, record)

    def _end(self, trial: Any, status: Status, error: str = "") -> None:
        self._write(trial, status, error)
        ended = sum(t.status != "unfinished" for t in known_trials(self.config))
        self.echo(
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
    """Return the reason of a failure as one line: the last line of the innermost cause."""
    failures = getattr(error, "worker_failures", None) or {}
    for inner in (*failures.values(), error.__cause__):
        if isinstance(inner, BaseException):
            return _reason(inner)
    if isinstance(error, UserError):
        return str(error)
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[-1] if lines else 'no reason given'}"
