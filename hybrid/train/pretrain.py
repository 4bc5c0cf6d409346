"""Pretraining of the TRM on the dataset's training pairs."""

from __future__ import annotations

import json
import logging
import math
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from hybrid import __version__
from hybrid.arc import pair_hash
from hybrid.checkpoint import Checkpoint, newest, prune, seal
from hybrid.config import Config, differences, dump, to_dict
from hybrid.context import RunContext, worker_slots
from hybrid.dataset import Dataset, Stream
from hybrid.errors import UserError
from hybrid.evaluate import exact_accuracy
from hybrid.train.feed import Feed
from hybrid.train.runlog import RunLog
from hybrid.train.state import TrainState, fresh, restore, save
from hybrid.train.step import Diverged, Sums, train_step

log = logging.getLogger(__name__)

PROJECT = "arc-trm-pretrain"
CHECKPOINTS = "checkpoints"
"""Folder of a run that holds them."""
MAY_CHANGE = {"training": ("steps", "epochs", "save_every", "keep_checkpoints", "probe_pairs")}
"""Keys that a resumed run may have changed; of `data` and `trm` none."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """How a run ended."""

    step: int
    checkpoint: Path
    untrained: float | None
    """Exact accuracy on training pairs before the first step; None if it was not measured."""
    trained: float | None


def total_steps(config: Config, rows_per_epoch: int) -> int:
    """Optimiser steps of the whole run; an epoch is as many as offer each of its rows once."""
    training = config.training
    if training.steps is not None:
        return training.steps
    if training.epochs is None:
        raise UserError("training.steps or training.epochs must be given")
    return max(1, math.ceil(training.epochs * rows_per_epoch / training.batch_size))


def pretrain(config: Config, context: RunContext) -> Result:
    """Train to the end, from the newest checkpoint of the run folder where there is one."""
    dataset = Dataset.open(config.data_folder)
    stream = Stream(dataset, config.training.seed)
    total = total_steps(config, len(stream))
    slots = worker_slots(config.training.batch_size, context.rank, context.world_size)
    state = fresh(config, dataset, slots, context.device)
    folder = config.run_folder / CHECKPOINTS
    resumed = newest(folder)
    if resumed:
        refuse_changes(config, dataset, resumed)
        restore(state, resumed)
    first = int(state.taken.min())
    rounds = context.rounds(stream, slots, config.training.batch_size, first)
    feed = Feed(rounds, first, state.taken)
    resumed_at = state.step if resumed else None
    with RunLog(config, project=PROJECT, rank=context.rank, resumed_at=resumed_at) as run:
        log.info("step %d of %d, %s", state.step, total, resumed.folder if resumed else "fresh")
        meter = _Meter(state, stream, config, context, run)
        if state.step == 0:
            meter.probe()
        while state.step < total:
            sums = _step(state, feed, config, total, context, folder)
            last = state.step == total
            saving = last or state.step % config.training.save_every == 0
            # What is not written yet would be lost to a run that resumes here.
            meter.add(sums, saving)
            if last:
                meter.probe()
            if saving:
                _save(state, dataset, config, context, folder)
                context.report(
                    {"step": state.step, **meter.latest}, step_folder(folder, state.step)
                )
    probes = probed(config.run_folder)
    return Result(
        step=state.step,
        checkpoint=step_folder(folder, state.step),
        untrained=probes.get(0),
        trained=probes.get(state.step),
    )


def check(config: Config) -> None:
    """UserError for whatever a worker would refuse, before anything is started or written."""
    dataset = Dataset.open(config.data_folder)
    total_steps(config, len(Stream(dataset, config.training.seed)))
    worker_slots(config.training.batch_size, 0, max(1, config.cluster.num_workers))
    resumed = newest(config.run_folder / CHECKPOINTS)
    if resumed:
        refuse_changes(config, dataset, resumed)


def step_folder(checkpoints: Path, step: int) -> Path:
    """The checkpoint folder of a step."""
    return checkpoints / f"step_{step:08d}"


def probed(run_folder: Path) -> dict[int, float]:
    """Exact accuracy on training pairs by step, as metrics.jsonl has it."""
    key = "probe/exact_accuracy"
    lines = (run_folder / "metrics.jsonl").read_text().splitlines()
    return {m["step"]: m[key] for m in map(json.loads, lines) if key in m}


def refuse_changes(config: Config, dataset: Dataset, checkpoint: Checkpoint) -> None:
    """UserError if the run in the folder is another one than the config describes."""
    where = checkpoint.folder.parent.parent
    changed = differences(checkpoint.state["config"], to_dict(config), ("trm", "training"))
    changed = [
        line
        for line in changed
        if line.split(":")[0].split(".")[1] not in MAY_CHANGE.get(line.split(".")[0], ())
    ]
    if changed:
        raise UserError(f"{where}: holds a run of another config ({'; '.join(changed)})")
    if checkpoint.state["dataset"]["fingerprint"] != dataset.fingerprint:
        raise UserError(f"{where}: holds a run on another dataset than {dataset.folder}")


class _Meter:
    """Sums metrics over steps and workers, writes them every `logging.every` steps and to save."""

    def __init__(
        self, state: TrainState, stream: Stream, config: Config, context: RunContext, run: RunLog
    ) -> None:
        self.state, self.stream, self.config, self.context, self.run = (
            state, stream, config, context, run,
        )  # fmt: skip
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
        losses = {name: sums.pop(name) / asked for name in ("lm_loss", "q_halt_loss")}
        self.latest = {
            "loss": losses["lm_loss"] + 0.5 * losses["q_halt_loss"],
            **losses,
            **{name: value / ended for name, value in sums.items()},
            "epoch": rows / len(self.stream),
            "samples_per_s": asked / seconds,
            "seconds_per_step": seconds / self.steps,
        }
        self.run.write({"step": self.state.step, **self.latest})
        self._restart()

    def probe(self) -> None:
        """Exact accuracy of the averaged weights on original training pairs, by rank 0."""
        count = self.config.training.probe_pairs
        if self.context.rank or not count:
            return
        rows = self.stream.original_pairs(count)
        with self.state.average.applied():
            accuracy = exact_accuracy(self.state.model, rows, self.config.evaluation.batch_size)
        self.run.write(
            {
                "step": self.state.step,
                "probe/exact_accuracy": accuracy,
                "probe/pairs": len(rows["labels"]),
            }
        )


def _step(
    state: TrainState, feed: Feed, config: Config, total: int, context: RunContext, folder: Path
) -> Sums:
    batch = feed.refill(state.carry)
    try:
        return train_step(state, batch, config.training, total, context)
    except Diverged as error:
        good = newest(folder)
        kept = good.folder if good else "none yet"
        raise Diverged(f"{error}; last good checkpoint: {kept}") from None


def _save(
    state: TrainState, dataset: Dataset, config: Config, context: RunContext, folder: Path
) -> None:
    """All workers write their parts, then rank 0 seals the folder."""
    final = step_folder(folder, state.step)
    partial = final.with_suffix(".partial")
    if context.rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    _wait_for_all(context)
    save(state, partial, context.rank)
    _wait_for_all(context)
    if context.rank == 0:
        texts = {"config.yaml": dump(config), "trained_on.json": json.dumps(trained_on(dataset))}
        seal(partial, final, _describe(state, dataset, config, context), texts)
        prune(final, config.training.keep_checkpoints)
    _wait_for_all(context)


def trained_on(dataset: Dataset) -> list[str]:
    """Content hashes of all training pairs, `input|output`, sorted."""
    pairs = {
        pair_hash(p) for task in range(len(dataset.tasks)) for p in dataset.training_pairs(task)
    }
    return sorted(pairs)


def _describe(
    state: TrainState, dataset: Dataset, config: Config, context: RunContext
) -> dict[str, Any]:
    return {
        "kind": "trm",
        "step": state.step,
        "world_size": context.world_size,
        "trm": asdict(state.model.config),
        "config": to_dict(config),
        "dataset": {key: dataset.meta[key] for key in ("fingerprint", "counts", "sources")},
        "versions": {"arc-hybrid": __version__, "torch": torch.__version__},
    }


def _wait_for_all(context: RunContext) -> None:
    # Read, because on a GPU the sum is only enqueued: the files must wait, not the stream.
    context.sum_(torch.zeros(1, device=context.device)).item()
