"""Training workers: TorchTrainer around the loop, and the loop's view of Ray."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import ray.train
import ray.train.torch
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.torch.config import _TorchBackend
from ray.train.v2._internal.execution.context import get_train_context
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from hybrid import storage
from hybrid.cluster.gauges import Gauges
from hybrid.cluster.runtime import cluster
from hybrid.cluster.stream import ray_rounds
from hybrid.config import Config, from_dict, to_dict
from hybrid.context import ProcessGroupContext, Signal
from hybrid.dataset import Stream
from hybrid.dataset.stream import Rows
from hybrid.device import share_cores
from hybrid.errors import CollectiveUserError, UserError
from hybrid.evaluate import Validation
from hybrid.train import Diverged, Result, joint, pretrain

RAY_FOLDER = "ray"
"""Ray Train's own bookkeeping, inside the run folder."""
REFUSAL = "refusal.txt"
"""In it: what one worker found wrong with the input."""

WAIT_FOR_NODES_MIN = 30
"""A lost node may come back; Ray Train tries once a minute."""

_preempted = threading.Event()
"""This worker's process was told to go (SIGTERM)."""

T = TypeVar("T")


class WorkerPreempted(RuntimeError):
    """This worker was told to go and has saved; Ray Train goes on with another in its place."""


class RayContext(ProcessGroupContext):
    """A Ray Train worker: its process group, and rows from Ray Data."""

    def __init__(self, run: str) -> None:
        super().__init__(ray.train.torch.get_device())
        self.gauges = Gauges(run)
        self.saved_for: object = None

    def rounds(self, stream: Stream, slots: range, total_slots: int, first: int) -> Iterator[Rows]:
        """Made by Ray Data."""
        return ray_rounds(stream, slots, total_slots, first)

    def signal(self) -> Signal:
        """SAVE when this process, or a node of the cluster, is about to go."""
        # The public get_preemption_info is a barrier over all workers: too slow for every step,
        # and `agree` is one already.
        warned = get_train_context().preemption_context.preemption_info
        drained = warned is not None and warned != self.saved_for
        self.saved_for = warned
        return Signal.SAVE if drained or _preempted.is_set() else Signal.NONE

    def gauge(self, metrics: Mapping[str, float]) -> None:
        """On the dashboard, and wherever Prometheus looks."""
        self.gauges.set(metrics)

    def report(self, metrics: Mapping[str, Any], checkpoint: Path) -> None:
        """Tell the controller. The checkpoint is ours: it stands on shared storage already."""
        if _preempted.is_set():
            raise WorkerPreempted(f"SIGTERM: {checkpoint.name} is saved")
        ray.train.report({**metrics, "checkpoint": storage.uri(checkpoint)})


class _Backend(_TorchBackend):  # type: ignore[misc]
    """torch.distributed as Ray Train sets it up, in workers that survive a SIGTERM long enough."""

    def on_training_start(self, worker_group: Any, backend_config: Any) -> None:
        super().on_training_start(worker_group, backend_config)
        worker_group.execute(_hear_sigterm)


class _Config(TorchConfig):  # type: ignore[misc]
    @property
    def backend_cls(self) -> type:
        return _Backend


def _hear_sigterm() -> None:
    """In the main thread of a worker, which is not the one that trains."""
    before = signal.getsignal(signal.SIGTERM)

    def hear(number: int, frame: FrameType | None) -> None:
        again = _preempted.is_set()
        _preempted.set()
        if again and callable(before):
            before(number, frame)

    signal.signal(signal.SIGTERM, hear)


def train_worker(settings: dict[str, Any]) -> dict[str, Any]:
    """What every worker runs. Takes and returns plain values: they are pickled."""
    config = from_dict(settings["config"])
    refusal = _refusal(config)
    if refusal:
        return {"user_error": refusal}
    share_cores(ray.train.get_context().get_local_world_size())
    try:
        loop = joint if settings["kind"] == "hybrid" else pretrain
        result = loop(config, RayContext(config.logging.run))
    except UserError as error:
        if isinstance(error, CollectiveUserError) or ray.train.get_context().get_world_size() == 1:
            return {"user_error": str(error)}
        # The others are waiting for this one, and Ray looks at what rank 0 returns: it ends them,
        # and `_refusal` the next try.
        _refuse(config, str(error))
        raise
    except Diverged as error:
        # Not a fault to recover from: the same steps again would end in the same place.
        return {"diverged": str(error)}
    return {
        "step": result.step,
        "checkpoint": storage.uri(result.checkpoint),
        "untrained": result.untrained,
        "trained": result.trained,
        "validation": asdict(result.validation) if result.validation else None,
        "stopped": result.stopped,
    }


def _refuse(config: Config, reason: str) -> None:
    path = config.run_folder / RAY_FOLDER / REFUSAL
    with suppress(OSError, UserError):  # it was perhaps the disk that was full
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(reason)
        storage.upload(path)


def _refusal(config: Config) -> str | None:
    """What a worker of an earlier try found wrong with the input: it still would."""
    found = storage.read(config.run_folder / RAY_FOLDER / REFUSAL)
    return found.decode() if found else None


def trainer(config: Config, kind: str, callbacks: list[Any] | None = None) -> TorchTrainer:
    """The loop of a `kind` on the config's workers."""
    workers = config.cluster
    store, name = storage.filesystem(config.run_folder)
    return TorchTrainer(
        train_worker,
        train_loop_config={"config": to_dict(config), "kind": kind},
        torch_config=_Config(),
        scaling_config=ScalingConfig(
            num_workers=(workers.min_workers, workers.num_workers)
            if workers.min_workers
            else workers.num_workers,
            use_gpu=workers.use_gpu,
            resources_per_worker={
                "CPU": workers.cpus_per_worker,
                **({"GPU": 1} if workers.use_gpu else {}),
            },
        ),
        run_config=RunConfig(
            name=RAY_FOLDER,
            storage_path=name,
            storage_filesystem=store,
            failure_config=FailureConfig(
                max_failures=workers.max_failures, controller_failure_limit=WAIT_FOR_NODES_MIN
            ),
            callbacks=callbacks,
        ),
    )


def run(trainer: TorchTrainer, config: Config) -> Result:
    """Train, replacing lost workers; rerun to resume."""
    # Ray's own record would resume a finished run as finished; the loop looks for itself.
    storage.remove(config.run_folder / RAY_FOLDER)
    try:
        found = trainer.fit().return_value
    except WorkerGroupError as error:
        refusal = next(filter(None, map(_user_error, error.worker_failures.values())), None)
        if refusal:
            raise refusal from error
        raise
    except ControllerError as error:
        raise UserError(
            f"cluster.num_workers={config.cluster.num_workers}: the workers could not be placed for"
            f" {WAIT_FOR_NODES_MIN} minutes; is a node gone for good? ({error.controller_failure})"
        ) from error
    if "user_error" in found:
        raise UserError(found["user_error"])
    if "diverged" in found:
        raise Diverged(found["diverged"])
    validation = Validation(**found["validation"]) if found["validation"] else None
    checkpoint = storage.folder(found["checkpoint"])
    return Result(**{**found, "checkpoint": checkpoint, "validation": validation})


def _user_error(error: BaseException | None) -> UserError | None:
    """The UserError behind what Ray raises."""
    while error and not isinstance(error, UserError):
        error = error.__cause__
    return error if isinstance(error, UserError) else None


def fit(config: Config, kind: str) -> Result:
    """Run the loop of a `kind` on a cluster."""
    with cluster(config, workers=config.cluster.min_workers, spare_cpus=1):
        # In the main thread Ray Train would take Ctrl-C for itself, and abort.
        return _in_thread(lambda: run(trainer(config, kind), config))


def _in_thread(work: Callable[[], T]) -> T:
    """Do it in another thread and wait; what it raises is raised here."""
    done: list[T] = []
    wrong: list[BaseException] = []

    def target() -> None:
        try:
            done.append(work())
        except BaseException as error:
            wrong.append(error)

    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    thread.join()
    if wrong:
        raise wrong[0]
    return done[0]
