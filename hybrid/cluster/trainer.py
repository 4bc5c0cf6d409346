"""Training workers: a TorchTrainer around the training loop, and its RunContext on Ray."""

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
"""Subfolder of the run folder for Ray Train's own records."""
USER_ERROR = "refusal.txt"
"""File in RAY_FOLDER that passes a UserError of one worker to the restarted group."""

WAIT_FOR_NODES_MIN = 30
"""Failed starts of the worker group that a run tolerates.

A start that waits for a node fails after about a minute (Ray's default start timeout). Ray never
resets the count during a run.
"""

_preempted = threading.Event()
"""Set when this worker's process receives SIGTERM."""

T = TypeVar("T")


class WorkerPreempted(RuntimeError):
    """Raised after SIGTERM, once the checkpoint is saved; Ray Train then replaces the worker."""


class RayContext(ProcessGroupContext):
    """RunContext of a Ray Train worker: its process group, and rows from Ray Data."""

    def __init__(self, run: str) -> None:
        super().__init__(ray.train.torch.get_device())
        self.gauges = Gauges(run)
        self._last_drain_notice: object = None
        """Ray's PreemptionInfo already handled."""

    def rounds(self, stream: Stream, slots: range, total_slots: int, first: int) -> Iterator[Rows]:
        """Yield rounds of rows from Ray Data."""
        return ray_rounds(stream, slots, total_slots, first)

    def signal(self) -> Signal:
        """Return SAVE once per drain notice for a node with workers of this run.

        After SIGTERM to this process, return SAVE on every call.
        """
        # The public get_preemption_info is a barrier over all workers, which is too slow for every
        # step; `agree` synchronizes them already.
        notice = get_train_context().preemption_context.preemption_info
        drained = notice is not None and notice != self._last_drain_notice
        self._last_drain_notice = notice
        return Signal.SAVE if drained or _preempted.is_set() else Signal.NONE

    def gauge(self, metrics: Mapping[str, float]) -> None:
        """Set the gauges on the Ray dashboard."""
        self.gauges.set(metrics)

    def report(self, metrics: Mapping[str, Any], checkpoint: Path) -> None:
        """Report metrics and the checkpoint's URI; the checkpoint is already on shared storage.

        Raises WorkerPreempted on a worker that received SIGTERM.
        """
        if _preempted.is_set():
            raise WorkerPreempted(f"SIGTERM: {checkpoint.name} is saved")
        ray.train.report({**metrics, "checkpoint": storage.uri(checkpoint)})


class _Backend(_TorchBackend):  # type: ignore[misc]
    """Ray Train's torch.distributed backend, with a SIGTERM handler so that workers save first."""

    def on_training_start(self, worker_group: Any, backend_config: Any) -> None:
        super().on_training_start(worker_group, backend_config)
        worker_group.execute(_install_sigterm_handler)


class _TorchConfig(TorchConfig):  # type: ignore[misc]
    """TorchConfig whose backend installs the SIGTERM handler on every worker."""

    @property
    def backend_cls(self) -> type:
        return _Backend


def _install_sigterm_handler() -> None:
    """Install a SIGTERM handler that sets `_preempted`; call this in the main thread.

    The second SIGTERM calls the previous handler, if it is a function.
    """
    previous = signal.getsignal(signal.SIGTERM)

    def handler(number: int, frame: FrameType | None) -> None:
        repeated = _preempted.is_set()
        _preempted.set()
        if repeated and callable(previous):
            previous(number, frame)

    signal.signal(signal.SIGTERM, handler)


def train_worker(settings: dict[str, Any]) -> dict[str, Any]:
    """Run the training loop in a worker. Arguments and results are plain values, for pickling."""
    config = from_dict(settings["config"])
    earlier_error = _read_user_error(config)
    if earlier_error:
        return {"user_error": earlier_error}
    share_cores(ray.train.get_context().get_local_world_size())
    try:
        loop = joint if settings["kind"] == "hybrid" else pretrain
        result = loop(config, RayContext(config.logging.run))
    except UserError as error:
        if isinstance(error, CollectiveUserError) or ray.train.get_context().get_world_size() == 1:
            return {"user_error": str(error)}
        # The other workers wait in a collective, and Ray reads only rank 0's result. So fail the
        # whole group, and let the restarted workers return the error.
        _write_user_error(config, str(error))
        raise
    except Diverged as error:
        # A restart would repeat the same steps and diverge again.
        return {"diverged": str(error)}
    return {
        "step": result.step,
        "checkpoint": storage.uri(result.checkpoint),
        "train_accuracy_before": result.train_accuracy_before,
        "train_accuracy_after": result.train_accuracy_after,
        "validation": asdict(result.validation) if result.validation else None,
        "stopped": result.stopped,
    }


def _write_user_error(config: Config, message: str) -> None:
    path = config.run_folder / RAY_FOLDER / USER_ERROR
    with suppress(OSError, UserError):  # the error itself may be a full disk
        path.parent.mkdir(parents=True, exist_ok=True)
        storage.write(path, message)


def _read_user_error(config: Config) -> str | None:
    """Return the UserError that ended the previous worker group, or None."""
    data = storage.read(config.run_folder / RAY_FOLDER / USER_ERROR)
    return data.decode() if data else None


def make_trainer(config: Config, kind: str, callbacks: list[Any] | None = None) -> TorchTrainer:
    """Return a trainer that runs the loop of `kind` (trm or hybrid) on the config's workers."""
    workers = config.cluster
    store, name = storage.filesystem(config.run_folder)
    return TorchTrainer(
        train_worker,
        train_loop_config={"config": to_dict(config), "kind": kind},
        torch_config=_TorchConfig(),
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


def run_trainer(trainer: TorchTrainer, config: Config) -> Result:
    """Train and replace lost workers; rerunning resumes from the newest checkpoint.

    Deletes Ray Train's records of earlier runs first. Raises UserError or Diverged, and Ray's
    WorkerGroupError after more than cluster.max_failures failures of the worker group.
    """
    # The records include USER_ERROR, which would end this run as well.
    storage.remove(config.run_folder / RAY_FOLDER)
    try:
        returned = trainer.fit().return_value
    except WorkerGroupError as error:
        user_error = next(filter(None, map(_user_error, error.worker_failures.values())), None)
        if user_error:
            raise user_error from error
        raise
    except ControllerError as error:
        raise UserError(
            f"cluster.num_workers={config.cluster.num_workers}: the workers could not be placed for"
            f" {WAIT_FOR_NODES_MIN} minutes; check `ray status` for missing nodes"
            f" ({error.controller_failure})"
        ) from error
    if "user_error" in returned:
        raise UserError(returned["user_error"])
    if "diverged" in returned:
        raise Diverged(returned["diverged"])
    validation = Validation(**returned["validation"]) if returned["validation"] else None
    checkpoint = storage.folder(returned["checkpoint"])
    return Result(**{**returned, "checkpoint": checkpoint, "validation": validation})


def _user_error(error: BaseException | None) -> UserError | None:
    """Return the UserError in an exception's chain of causes, or None."""
    while error and not isinstance(error, UserError):
        error = error.__cause__
    return error if isinstance(error, UserError) else None


def fit(config: Config, kind: str) -> Result:
    """Run the loop of `kind` (trm or hybrid) on a cluster."""
    with cluster(config, workers=config.cluster.min_workers, spare_cpus=1):
        # In the main thread, Ray Train would install its own SIGINT handler and abort.
        return _in_thread(lambda: run_trainer(make_trainer(config, kind), config))


def _in_thread(work: Callable[[], T]) -> T:
    """Run `work` in another thread; return its result or raise its exception."""
    results: list[T] = []
    errors: list[BaseException] = []

    def target() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]
