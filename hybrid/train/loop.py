"""The training loop shared by TRM and hybrid: resuming, steps, metrics and checkpoints.

The batch is persistent: a *slot* (batch index) keeps its training row until it halts, then takes
its next one; the k-th row of every slot forms *round* k, counted from 0. A `TrainModule` (like a
LightningModule) holds model, optimizer state and training step.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path

from hybrid.checkpoint import Checkpoint, newest, read
from hybrid.config import Config
from hybrid.context import RunContext, Signal, worker_slots
from hybrid.dataset import Dataset
from hybrid.errors import CollectiveUserError, UserError
from hybrid.evaluate import Validation
from hybrid.train.checkpointing import restore, save_checkpoint, step_folder
from hybrid.train.loader import SlotLoader
from hybrid.train.metrics import MetricsAggregator, train_accuracies
from hybrid.train.module import MakeTrainModule
from hybrid.train.preflight import check_same_llm, check_unchanged, total_steps, training_stream
from hybrid.train.state import CHECKPOINTS
from hybrid.train.stop import StopFile
from hybrid.train.tracking import RunTracker
from hybrid.train.update import Diverged, Sums

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Result:
    """Outcome of a training run."""

    step: int
    checkpoint: Path
    """Folder of the checkpoint at `step`."""
    train_accuracy_before: float | None
    """Share (0..1) of training pairs predicted exactly before step 1; None on ranks > 0 or if
    train_accuracy_pairs=0."""
    train_accuracy_after: float | None
    """The same after the last step; also None if the run stopped early."""
    validation: Validation | None = None
    """Scores on held-out tasks; None on ranks > 0, without held-out tasks, or if this step was not
    a scheduled checkpoint."""
    stopped: bool = False
    """True if the run stopped on request before its last step."""


def train(config: Config, context: RunContext, make: MakeTrainModule) -> Result:
    """Train to the last step, resuming from the newest checkpoint of the run folder if any.

    Raises UserError, CollectiveUserError, Diverged.
    """
    run = _Run(config, context, make)
    module, state = run.module, run.state
    resume_step = state.step if run.resume_from else None
    with RunTracker(
        config, project=module.project, rank=context.rank, resumed_at=resume_step
    ) as tracker:
        origin = f"resumed from {run.resume_from.folder}" if run.resume_from else "new run"
        log.info("step %d of %d, %s", state.step, run.total_steps, origin)
        if state.step == 0:
            module.setup()
        metrics = MetricsAggregator(module, run.stream, config, context, tracker)
        if state.step == 0:
            metrics.measure_train_accuracy()
        elif run.must_validate() and state.step not in metrics.validated():
            metrics.validate(run.checkpoint)  # the run was killed before it had validated
        run.take_steps(metrics, tracker)
    accuracies = train_accuracies(config.run_folder) if context.rank == 0 else {}
    validations = metrics.validated() if context.rank == 0 else {}
    return Result(
        step=state.step,
        checkpoint=run.checkpoint,
        train_accuracy_before=accuracies.get(0),
        train_accuracy_after=accuracies.get(state.step),
        validation=validations.get(state.step),
        stopped=state.step < run.total_steps,
    )


class _Run:
    """A training run: its module, rows and checkpoints."""

    def __init__(self, config: Config, context: RunContext, make: MakeTrainModule) -> None:
        """Build module and loader; restore the newest checkpoint of the run, if any."""
        self.config, self.context = config, context
        self.dataset = Dataset.open(config.data_folder)
        self.stream = training_stream(config, self.dataset)
        self.total_steps = total_steps(config, len(self.stream))
        slots = worker_slots(config.training.batch_size, context.rank, context.world_size)
        self.folder = config.run_folder / CHECKPOINTS
        self.resume_from = _newest_for_all(self.folder, context)
        # A resumed run needs no initial checkpoint, which may have been deleted.
        trm = replace(config.trm, init_from=None) if self.resume_from else config.trm
        self.module = make(replace(config, trm=trm), self.dataset, context, slots)
        self.state = self.module.state
        if self.resume_from:
            check_unchanged(
                config, self.dataset, self.resume_from, self.module.kind, self.module.sections
            )
            check_same_llm(config, self.resume_from, self.module.metadata())
            restore(self.state, self.resume_from)
        first = int(self.state.rows_consumed.min())
        rounds = context.rounds(self.stream, slots, config.training.batch_size, first)
        sides = self.state.carry.current["side"]
        self.loader = SlotLoader(rounds, first, self.state.rows_consumed, sides)

    @property
    def checkpoint(self) -> Path:
        """Folder of the current step's checkpoint."""
        return step_folder(self.folder, self.state.step)

    def must_save(self) -> bool:
        """Return True if training.save_every or the end of the run requires a checkpoint now."""
        step = self.state.step
        return step == self.total_steps or step % self.config.training.save_every == 0

    def must_validate(self) -> bool:
        """Return True if this worker validates now; checkpoints saved on request are skipped."""
        held_out = self.dataset.meta["config"]["hold_out_tasks"] > 0
        return self.context.rank == 0 and held_out and self.must_save()

    def take_steps(self, metrics: MetricsAggregator, tracker: RunTracker) -> None:
        """Train until the last step or a stop request."""
        stop_file = StopFile(self.config.run_folder)
        signal = Signal.NONE
        while self.state.step < self.total_steps and signal is not Signal.STOP:
            sums = self._step()
            stop = stop_file.signal() if self.context.rank == 0 else Signal.NONE
            signal = self.context.agree(max(self.context.signal(), stop))
            saving = self.must_save() or signal is not Signal.NONE
            # Flush metrics before a checkpoint: a run resumed from it does not repeat these steps.
            metrics.add(sums, self.loader.waited, saving)
            if self.state.step == self.total_steps:
                metrics.measure_train_accuracy()
            if saving:
                self._save(metrics, tracker)

    def _step(self) -> Sums:
        batch = self.loader.refill(self.state.carry, self.state.halted)
        try:
            return self.module.step(batch, self.total_steps)
        except Diverged as error:
            good = newest(self.folder)
            kept = good.folder if good else "none yet"
            raise Diverged(f"{error}; last good checkpoint: {kept}") from None

    def _save(self, metrics: MetricsAggregator, tracker: RunTracker) -> None:
        """Save, validate and report a checkpoint."""
        tracker.upload()  # before the checkpoint: a run that resumes from it needs these metrics
        metadata = {"kind": self.module.kind, **self.module.metadata()}
        save_checkpoint(self.state, metadata, self.dataset, self.config, self.context, self.folder)
        if self.must_validate():
            metrics.validate(self.checkpoint)
        tracker.upload()
        self.context.report({"step": self.state.step, **metrics.latest}, self.checkpoint)


def _newest_for_all(folder: Path, context: RunContext) -> Checkpoint | None:
    """Return the newest intact checkpoint, the same on all workers.

    On a shared folder only rank 0 verifies digests; with a URI root every worker does. Raises
    CollectiveUserError if all are damaged.
    """
    checkpoint, problem = None, None
    if context.rank == 0:
        try:
            checkpoint = newest(folder)
        except UserError as error:
            problem = str(error)
    step = int(checkpoint.state["step"]) if checkpoint else None
    step, problem = context.gather_objects((step, problem))[0]
    if problem is not None:
        raise CollectiveUserError(problem)
    if context.rank and step is not None:
        return read(step_folder(folder, step), verified=True)
    return checkpoint
