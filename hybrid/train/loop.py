"""The loop that all training has in common: order, resuming, metrics, checkpoints.

What differs between training the TRM and training the hybrid is a `TrainModule`.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from hybrid import storage
from hybrid.checkpoint import Checkpoint, newest, read
from hybrid.config import Config
from hybrid.context import RunContext, Signal, worker_slots
from hybrid.dataset import Dataset
from hybrid.errors import CollectiveUserError, UserError
from hybrid.evaluate import Validation
from hybrid.train.checkpointing import save_checkpoint, step_folder
from hybrid.train.loader import SlotLoader
from hybrid.train.metrics import MetricsAggregator, train_accuracies
from hybrid.train.module import MakeTrainModule, TrainModule
from hybrid.train.preflight import (
    check_same_llm,
    check_unchanged,
    total_steps,
    training_stream,
)
from hybrid.train.state import CHECKPOINTS, restore
from hybrid.train.stop import StopFile
from hybrid.train.tracking import RunTracker
from hybrid.train.update import Diverged, Sums

log = logging.getLogger(__name__)


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


def train(config: Config, context: RunContext, make: MakeTrainModule) -> Result:
    """Train to the end, from the newest checkpoint of the run folder where there is one."""
    dataset = Dataset.open(config.data_folder)
    stream = training_stream(config, dataset)
    total = total_steps(config, len(stream))
    slots = worker_slots(config.training.batch_size, context.rank, context.world_size)
    folder = config.run_folder / CHECKPOINTS
    resumed = _newest_for_all(folder, context)
    # What a run began with may be gone by the time it is resumed.
    start = replace(config.trm, init_from=None) if resumed else config.trm
    module = make(replace(config, trm=start), dataset, context, slots)
    state = module.state
    stop_file = StopFile(config.run_folder)
    asked = Signal.NONE
    validating = context.rank == 0 and dataset.meta["config"]["hold_out_tasks"] > 0

    def regular(step: int) -> bool:
        """Whether a checkpoint was due anyway; one that was asked for is not judged."""
        return step == total or step % config.training.save_every == 0

    if resumed:
        check_unchanged(config, dataset, resumed, module.kind, module.sections)
        check_same_llm(config, resumed, module.describe())
        restore(state, resumed)
    first = int(state.rows_consumed.min())
    rounds = context.rounds(stream, slots, config.training.batch_size, first)
    feed = SlotLoader(rounds, first, state.rows_consumed, state.carry.current["side"])
    resumed_at = state.step if resumed else None
    with RunTracker(
        config, project=module.project, rank=context.rank, resumed_at=resumed_at
    ) as run:
        log.info("step %d of %d, %s", state.step, total, resumed.folder if resumed else "fresh")
        if state.step == 0:
            module.start()
        metrics = MetricsAggregator(module, stream, config, context, run)
        if state.step == 0:
            metrics.measure_train_accuracy()
        elif validating and regular(state.step) and state.step not in metrics.validated():
            metrics.validate(step_folder(folder, state.step))  # killed in the middle of it
        while state.step < total and asked is not Signal.STOP:
            sums = _step(module, feed, total, folder)
            mine = max(context.signal(), stop_file.signal() if context.rank == 0 else Signal.NONE)
            asked = context.agree(mine)
            saving = regular(state.step) or asked is not Signal.NONE
            # What is not written yet would be lost to a run that resumes here.
            metrics.add(sums, feed.waited, saving)
            if state.step == total:
                metrics.measure_train_accuracy()
            if saving:
                run.upload()  # or what was measured since the last time might be lost
                described = {"kind": module.kind, **module.describe()}
                save_checkpoint(state, described, dataset, config, context, folder)
                if regular(state.step) and validating:
                    metrics.validate(step_folder(folder, state.step))
                run.upload()
                context.report(
                    {"step": state.step, **metrics.latest}, step_folder(folder, state.step)
                )
    probes = train_accuracies(config.run_folder) if context.rank == 0 else {}
    validations = metrics.validated() if context.rank == 0 else {}
    return Result(
        step=state.step,
        checkpoint=step_folder(folder, state.step),
        untrained=probes.get(0),
        trained=probes.get(state.step),
        validation=validations.get(state.step),
        stopped=state.step < total,
    )


def _newest_for_all(folder: Path, context: RunContext) -> Checkpoint | None:
    """The newest whole checkpoint, chosen by rank 0: hashing it takes long, and all must begin with
    the same one.
    """
    found, problem = None, None
    if context.rank == 0:
        try:
            found = newest(folder)
        except UserError as error:
            problem = error
    step = -2 if problem else int(found.state["step"]) if found else -1
    chosen = torch.tensor([step], dtype=torch.int64, device=context.device)
    step = int(context.gather(chosen, context.world_size)[0])
    if step == -2:
        raise CollectiveUserError(str(problem or f"{storage.uri(folder)}: no whole checkpoint"))
    if context.rank and step >= 0:
        return read(step_folder(folder, step), verified=True)
    return found


def _step(module: TrainModule, feed: SlotLoader, total: int, folder: Path) -> Sums:
    batch = feed.refill(module.state.carry, module.state.halted)
    try:
        return module.step(batch, total)
    except Diverged as error:
        good = newest(folder)
        kept = good.folder if good else "none yet"
        raise Diverged(f"{error}; last good checkpoint: {kept}") from None
