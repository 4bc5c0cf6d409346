"""Connect to a Ray cluster, or start one on this machine."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import ray
from ray.exceptions import NodeDiedError, TaskUnschedulableError, WorkerCrashedError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from hybrid import storage
from hybrid.config import Config
from hybrid.errors import Stopped, UserError, make_folder

LOCAL = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # a single node then listens on 127.0.0.1 only
    "RAY_AUTH_MODE": "disabled",  # else Ray writes a token file to the home directory
    "RAY_worker_niceness": "0",  # a worker with low priority stalls at OpenMP barriers
}
"""Environment defaults of a local cluster."""
EVERYWHERE = {
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # else workers' output is printed twice
}
"""Environment defaults of any cluster."""
CONNECT_S = 10.0
"""Timeout for the head node to accept a connection, seconds."""
PACKAGE = Path(__file__).parents[1]


@contextmanager
def cluster(config: Config, *, workers: int | None = None, spare_cpus: int = 0) -> Iterator[None]:
    """Connect Ray for the duration of the block.

    Joins the cluster that RAY_ADDRESS or a submitted job names; else starts one on this machine and
    shuts it down at the end. Raises UserError if the cluster is too small for `workers` (default:
    cluster.num_workers) and `spare_cpus` for other tasks, or if a node cannot see paths.root.
    """
    connects = not ray.is_initialized()
    if connects:
        with _signals_kept():
            address = os.environ.get("RAY_ADDRESS")
            _join(address) if address else start_local()
    try:
        check_fits(config, workers or config.cluster.num_workers, spare_cpus)
        _check_shared(config)
        yield
    except SystemError as error:
        # Ray wraps an exception that a signal handler raises during a blocking call.
        if isinstance(error.__cause__, Stopped):
            raise error.__cause__ from None
        raise
    finally:
        if connects:
            ray.shutdown()


def start_local(num_cpus: int | None = None) -> None:
    """Start a cluster on this machine that listens on the loopback interface only."""
    for name, value in (LOCAL | EVERYWHERE).items():
        os.environ.setdefault(name, value)
    # Ray reads this variable at import, and the processes it starts read it again.
    ray._private.ray_constants.ENABLE_RAY_CLUSTER = False
    # Workers log to the run folder, and Ray re-raises their exceptions here.
    ray.init(
        address="local",
        num_cpus=num_cpus,
        log_to_driver=False,
        logging_level="WARNING",
        runtime_env={"env_vars": {"PYTHONPATH": str(PACKAGE.parent)}},
    )


@contextmanager
def _signals_kept() -> Iterator[None]:
    """Restore our signal handlers after ray.init() replaces them."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    if threading.current_thread() is threading.main_thread():
        for number, handler in before.items():
            if handler is not None:
                signal.signal(number, handler)


def _join(address: str) -> None:
    """Connect to the cluster at `address`; upload this package unless a submitted job did."""
    for name, value in EVERYWHERE.items():
        os.environ.setdefault(name, value)
    if "://" in address:
        raise UserError(
            f"RAY_ADDRESS={address}: give host:port of the head node, or submit the job:"
            " ray job submit --working-dir . -- python ..."
        )
    if address != "auto":
        _check_reachable(address)
    in_job = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
    try:
        ray.init(
            address=address,
            log_to_driver=False,
            logging_level="WARNING",
            runtime_env=None if in_job else {"py_modules": [str(PACKAGE)]},
        )
    except (ConnectionError, ValueError) as error:
        raise UserError(f"RAY_ADDRESS={address}: no cluster there ({error})") from None


def _check_reachable(address: str) -> None:
    """Raise UserError if no process listens at `address`; Ray itself retries for minutes."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S).close()
    except (OSError, ValueError) as error:
        raise UserError(f"RAY_ADDRESS={address}: no cluster there ({error})") from None


def check_fits(config: Config, workers: int, spare_cpus: int) -> None:
    """Raise UserError if the cluster is too small for the workers, even when it is idle."""
    needed = workers * config.cluster.cpus_per_worker
    resources = ray.cluster_resources()
    cpus, gpus = resources.get("CPU", 0.0), resources.get("GPU", 0.0)
    # Ray Data runs its tasks on spare cores: without one, training never starts.
    if needed > cpus - spare_cpus:
        spare = " and one for the data stream" if spare_cpus else ""
        raise UserError(
            f"cluster.num_workers={workers} of cpus_per_worker="
            f"{config.cluster.cpus_per_worker:g} need {needed:g} CPUs{spare};"
            f" the cluster has {cpus:g}"
        )
    if config.cluster.use_gpu and workers > gpus:
        raise UserError(
            f"cluster.use_gpu: {workers} workers need a GPU each; the cluster has {gpus:g}"
        )


def _check_shared(config: Config) -> None:
    """Raise UserError if a node cannot see a file that this process writes under paths.root."""
    here = ray.get_runtime_context().get_node_id()
    others = [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["NodeID"] != here]
    root = config.paths.root
    if not others and not storage.is_uri(root):
        return
    marker = storage.folder(root) / f".seen-{uuid4().hex}"
    try:
        make_folder(marker.parent)
        storage.write(marker, "checks that all nodes of the cluster see this folder\n")
        task = ray.remote(num_cpus=0)(_sees)
        pending = {
            node: task.options(
                scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)
            ).remote(root, marker.name)
            for node in others
        }
        blind = [node for node, ref in pending.items() if _get(ref) is False]
    finally:
        storage.remove(marker)
    if blind:
        raise UserError(
            f"paths.root={root}: {len(blind)} of the cluster's {len(others) + 1} nodes do not see"
            " it; name a folder that all of them share, or a URI (s3://, gs://)"
        )


def _get(ref: Any) -> Any:
    """Return a task's result, or None if its node is dead, which Ray notices with a delay."""
    try:
        return ray.get(ref)
    except (TaskUnschedulableError, NodeDiedError, WorkerCrashedError):
        return None


def _sees(root: str, name: str) -> bool:
    return storage.exists(storage.folder(root) / name)
