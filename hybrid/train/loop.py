"""The loop that all training has in common: order, resuming, metrics, checkpoints.

What differs between training the TRM and training the hybrid is a `Learner`.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from hybrid import storage
from hybrid.arc import pair_hash
from hybrid.checkpoint import Checkpoint, newest
from hybrid.config import Config, differences, to_dict
from hybrid.context import RunContext, Signal, worker_slots
from hybrid.dataset import Dataset, Stream
from hybrid.errors import UserError
from hybrid.evaluate import Validation
from hybrid.llm import check_model
from hybrid.train.feed import Feed
from hybrid.train.runlog import RunLog, read_metrics
from hybrid.train.saving import save_checkpoint, step_folder
from hybrid.train.state import (
    CHECKPOINTS,
    TrainState,
    initial_checkpoint,
    model_config,
    refuse_other_sizes,
    restore,
)
from hybrid.train.step import Diverged, Sums
from hybrid.train.stop import StopFile
from hybrid.trm import Batch

log = logging.getLogger(__name__)

MAY_CHANGE = {
    "training": ("steps", "epochs", "save_every", "keep_checkpoints", "probe_pairs", "recompute"),
    "llama": ("batch_size", "encodings"),
    "trm": ("init_from",),  # a resumed run has begun already
}
"""Keys that a resumed run may have changed; of `data` none."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """How a run ended."""

    step: int
    checkpoint: Path
    untrained: float | None
    """Exact accuracy on training pairs before the first step; None if it was not measured."""
    trained: float | None
    validation: Validation | None = None
    """On held-out tasks, where the dataset has some."""
    stopped: bool = False
    """Before its last step, because it was asked to."""


class Learner(Protocol):
    """What is trained."""

    state: TrainState

    @property
    def kind(self) -> str:
        """Of its checkpoints: trm, hybrid."""
        ...

    @property
    def project(self) -> str:
        """In W&B."""
        ...

    @property
    def sections(self) -> tuple[str, ...]:
        """Of the config: a resumed run may not have changed them."""
        ...

    def start(self) -> None:
        """Called once, before a fresh run's first step."""
        ...

    def step(self, batch: Batch, total_steps: int) -> Sums:
        """One optimiser step."""
        ...

    def accuracy(self, stream: Stream, count: int) -> tuple[float, int]:
        """Share of up to `count` original training pairs exactly right, and how many there were."""
        ...

    def validate(self, checkpoint: Path) -> Validation:
        """What a checkpoint just written is worth, see `hybrid.evaluate.validate`."""
        ...

    def describe(self) -> dict[str, Any]:
        """What a checkpoint says of it, beside what all say."""
        ...


MakeLearner = Callable[[Config, Dataset, RunContext, range], Learner]


def total_steps(config: Config, rows_per_epoch: int) -> int:
    """Optimiser steps of the whole run; an epoch is as many as offer each of its rows once."""
    training = config.training
    if training.steps is not None:
        return training.steps
    if training.epochs is None:
        raise UserError("training.steps or training.epochs must be given")
    return max(1, math.ceil(training.epochs * rows_per_epoch / training.batch_size))


def train(config: Config, context: RunContext, make: MakeLearner) -> Result:
    """Train to the end, from the newest checkpoint of the run folder where there is one."""
    dataset = Dataset.open(config.data_folder)
    stream = training_stream(config, dataset)
    total = total_steps(config, len(stream))
    slots = worker_slots(config.training.batch_size, context.rank, context.world_size)
    folder = config.run_folder / CHECKPOINTS
    resumed = newest(folder)
    # What a run began with may be gone by the time it is resumed.
    start = replace(config.trm, init_from=None) if resumed else config.trm
    learner = make(replace(config, trm=start), dataset, context, slots)
    state = learner.state
    stop_file = StopFile(config.run_folder)
    asked = Signal.NONE
    validating = context.rank == 0 and dataset.meta["config"]["hold_out_tasks"] > 0
    if resumed:
        refuse_changes(config, dataset, resumed, learner.kind, learner.sections)
        _refuse_another_reader(config, resumed, learner.describe())
        restore(state, resumed)
    first = int(state.taken.min())
    rounds = context.rounds(stream, slots, config.training.batch_size, first)
    feed = Feed(rounds, first, state.taken)
    resumed_at = state.step if resumed else None
    with RunLog(config, project=learner.project, rank=context.rank, resumed_at=resumed_at) as run:
        log.info("step %d of %d, %s", state.step, total, resumed.folder if resumed else "fresh")
        if state.step == 0:
            learner.start()
        meter = _Meter(learner, stream, config, context, run)
        if state.step == 0:
            meter.probe()
        elif validating and state.step not in validated(config.run_folder):
            meter.validate(step_folder(folder, state.step))  # killed in the middle of it
        while state.step < total and asked is not Signal.STOP:
            sums = _step(learner, feed, total, folder)
            mine = max(context.signal(), stop_file.signal() if context.rank == 0 else Signal.NONE)
            asked = context.agree(mine)
            last = state.step == total
            regular = last or state.step % config.training.save_every == 0
            saving = regular or asked is not Signal.NONE
            # What is not written yet would be lost to a run that resumes here.
            meter.add(sums, saving)
            if last:
                meter.probe()
            if saving:
                described = {"kind": learner.kind, **learner.describe()}
                save_checkpoint(state, described, dataset, config, context, folder)
                if regular and validating:
                    meter.validate(step_folder(folder, state.step))
                run.publish()
                context.report(
                    {"step": state.step, **meter.latest}, step_folder(folder, state.step)
                )
    probes = probed(config.run_folder) if context.rank == 0 else {}
    validations = validated(config.run_folder) if context.rank == 0 else {}
    return Result(
        step=state.step,
        checkpoint=step_folder(folder, state.step),
        untrained=probes.get(0),
        trained=probes.get(state.step),
        validation=validations.get(state.step),
        stopped=state.step < total,
    )


def training_stream(config: Config, dataset: Dataset) -> Stream:
    """The rows of a run."""
    return Stream(dataset, config.training.seed, config.training.variants)


def check(config: Config, kind: str, sections: tuple[str, ...]) -> None:
    """UserError for whatever a worker would refuse, before anything is started or written."""
    dataset = Dataset.open(config.data_folder)
    total_steps(config, len(training_stream(config, dataset)))
    if kind == "hybrid" and config.feedback.source in ("vote", "demos"):
        raise UserError(
            f"feedback.source={config.feedback.source} is for evaluation: a training row has no"
            " other views and no held-out demonstration; train with none, confidence or oracle"
        )
    worker_slots(config.training.batch_size, 0, max(1, config.cluster.num_workers))
    resumed = newest(config.run_folder / CHECKPOINTS)
    if resumed:
        refuse_changes(config, dataset, resumed, kind, sections)
    else:
        initial = initial_checkpoint(config)
        if initial:
            refuse_other_sizes(model_config(config, dataset), initial)
            _refuse_to_know(initial, dataset)
    if kind == "hybrid" and config.adapter.inject != "none":
        check_model(config.llama, config.models_folder)


def probed(run_folder: Path) -> dict[int, float]:
    """Exact accuracy on training pairs by step, as metrics.jsonl has it."""
    key = "probe/exact_accuracy"
    metrics = read_metrics(run_folder / "metrics.jsonl")
    return {m["step"]: m[key] for m in metrics if key in m}


def validated(run_folder: Path) -> dict[int, Validation]:
    """Validations by step, as metrics.jsonl has them."""
    names = ("right", "asked", "cells")
    return {
        m["step"]: Validation(**{name: m[f"validation/{name}"] for name in names})
        for m in read_metrics(run_folder / "metrics.jsonl")
        if "validation/asked" in m
    }


def refuse_changes(
    config: Config, dataset: Dataset, checkpoint: Checkpoint, kind: str, sections: tuple[str, ...]
) -> None:
    """UserError if the run in the folder is another one than the config describes."""
    where = storage.place(checkpoint.folder.parent.parent)
    if checkpoint.state["kind"] != kind:
        raise UserError(
            f"{where}: holds a run of kind {checkpoint.state['kind']}, not {kind};"
            " give this one another logging.run"
        )
    changed = differences(checkpoint.state["config"], to_dict(config), sections)
    changed = [
        line
        for line in changed
        if line.split(":")[0].split(".")[1] not in MAY_CHANGE.get(line.split(".")[0], ())
    ]
    if changed:
        raise UserError(f"{where}: holds a run of another config ({'; '.join(changed)})")
    if checkpoint.state["dataset"]["fingerprint"] != dataset.fingerprint:
        raise UserError(f"{where}: holds a run on another dataset than {dataset.folder}")


def _refuse_to_know(initial: Checkpoint, dataset: Dataset) -> None:
    """UserError if what a run starts from has seen the tests that are held out to judge it."""
    if not dataset.meta["config"]["hold_out_tasks"]:
        return
    answers = Dataset.open(dataset.folder, answers=True)
    seen = set(json.loads((initial.folder / "trained_on.json").read_text()))
    known = [
        answers.tasks[task].id
        for task in dataset.asked
        if any(pair_hash(pair) in seen for pair in answers.tasks[task].test)
    ]
    if known:
        raise UserError(
            f"trm.init_from: {storage.place(initial.folder)} was trained on the tests of"
            f" {len(known)} of the {len(dataset.asked)} held-out tasks: pretrain with the same"
            f" data.training, data.hold_out_tasks={len(dataset.asked)} and data.evaluation=[]"
        )


def _refuse_another_reader(config: Config, checkpoint: Checkpoint, now: dict[str, Any]) -> None:
    """UserError if the language model's name now means other weights than when the run began."""
    then, llama = checkpoint.state.get("llama"), now.get("llama")
    if then and llama and config.llama.frozen and then["fingerprint"] != llama["fingerprint"]:
        raise UserError(
            f"llama.model: {config.llama.model} is not the model that {checkpoint.folder} was"
            f" trained with (revision {then['revision']} then, {llama['revision']} now)"
        )


class _Meter:
    """Sums metrics over steps and workers, writes them every `logging.every` steps and to save."""

    def __init__(
        self, learner: Learner, stream: Stream, config: Config, context: RunContext, run: RunLog
    ) -> None:
        self.learner, self.state = learner, learner.state
        self.stream, self.config, self.context, self.run = stream, config, context, run
        self.latest: dict[str, Any] = {}
        self._restart()

    def _restart(self) -> None:
        self.sums: Sums = {}
        self.steps = 0
        self.since = time.perf_counter()

    def add(self, sums: Sums, saving: bool) -> None:
        """Count one step; on every worker alike, for writing sums over them."""
        for name, value in sums.items():
            self.sums[name] = self.sums.get(name, 0) + value.double()
        self.steps += 1
        if saving or self.state.step % self.config.logging.every == 0:
            self._write()

    def _write(self) -> None:
        names = sorted(self.sums)
        packed = torch.stack([self.sums[name] for name in names])
        taken = self.state.taken.sum().to(packed)
        *values, rows = self.context.sum_(torch.cat((packed, taken[None]))).tolist()
        sums = dict(zip(names, values, strict=True))
        seconds = time.perf_counter() - self.since
        asked = self.steps * self.config.training.batch_size
        ended = max(1.0, sums.pop("count"))
        # The TRM is asked once a step, the hybrid at every attempt.
        asked_of = sums.pop("asked", asked)
        losses = {name: sums.pop(name) / asked_of for name in ("lm_loss", "q_halt_loss")}
        if "compared" in sums:
            compared = max(1.0, sums.pop("compared"))
            losses["latent_variance"] = sums.pop("latent_variance") / compared
        self.latest = {
            "loss": losses["lm_loss"] + 0.5 * losses["q_halt_loss"],
            **losses,
            **{name: value / ended for name, value in sums.items()},
            "epoch": rows / len(self.stream),
            "samples_per_s": asked / seconds,
            "seconds_per_step": seconds / self.steps,
        }
        self.run.write({"step": self.state.step, **self.latest})
        if self.context.rank == 0:
            self.context.gauge({"step": self.state.step, **self.latest})
        self._restart()

    def probe(self) -> None:
        """Exact accuracy of the averaged weights on original training pairs, by rank 0."""
        count = self.config.training.probe_pairs
        if self.context.rank or not count:
            return
        started = time.perf_counter()
        with self.state.average.applied():
            accuracy, pairs = self.learner.accuracy(self.stream, count)
        self.run.write(
            {
                "step": self.state.step,
                "probe/exact_accuracy": accuracy,
                "probe/pairs": pairs,
            }
        )
        self.since += time.perf_counter() - started  # not training

    def validate(self, checkpoint: Path) -> None:
        """Score a checkpoint on held-out tasks; of rank 0, the others wait."""
        started = time.perf_counter()
        metrics = self.learner.validate(checkpoint).metrics()
        self.latest = {**self.latest, **metrics}
        self.run.write({"step": self.state.step, **metrics})
        self.context.gauge({"validation_right": metrics["validation/right"]})
        self.since += time.perf_counter() - started  # not training


def _step(learner: Learner, feed: Feed, total: int, folder: Path) -> Sums:
    batch = feed.refill(learner.state.carry)
    try:
        return learner.step(batch, total)
    except Diverged as error:
        good = newest(folder)
        kept = good.folder if good else "none yet"
        raise Diverged(f"{error}; last good checkpoint: {kept}") from None
