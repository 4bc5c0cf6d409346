"""Joining a cluster or starting one on this machine."""

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
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # makes a cluster of one machine listen on 127.0.0.1
    "RAY_AUTH_MODE": "disabled",  # else a token file appears in the user's home
    "RAY_worker_niceness": "0",  # a worker that others overtake stalls at every barrier of OpenMP
}
"""Environment of a cluster of our own; what the user has set stays."""
EVERYWHERE = {
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # workers' prints would come out twice
}
CONNECT_S = 10.0
PACKAGE = Path(__file__).parents[1]


@contextmanager
def cluster(config: Config, *, workers: int | None = None, spare_cpus: int = 0) -> Iterator[None]:
    """Inside, ray is connected.

    To the running cluster where RAY_ADDRESS or a job names one, else to one of this machine that
    ends with the block. Raises UserError if the cluster can never hold `workers`
    (cluster.num_workers when not given) and `spare_cpus` for other tasks, or if a node of it does
    not see paths.root.
    """
    ours = not ray.is_initialized()
    if ours:
        with _signals_kept():
            address = os.environ.get("RAY_ADDRESS")
            _join(address) if address else start_local()
    try:
        check_fits(config, workers or config.cluster.num_workers, spare_cpus)
        _check_shared(config)
        yield
    except SystemError as error:
        # What a signal's handler raises while Ray's library waits comes out of it like this.
        if isinstance(error.__cause__, Stopped):
            raise error.__cause__ from None
        raise
    finally:
        if ours:
            ray.shutdown()


def start_local(num_cpus: int | None = None) -> None:
    """A cluster of this machine alone, which nobody else can reach."""
    for name, value in (LOCAL | EVERYWHERE).items():
        os.environ.setdefault(name, value)
    # Ray has read this one when it was imported; the processes it starts read it again.
    ray._private.ray_constants.ENABLE_RAY_CLUSTER = False
    # Workers' own logs are in the run folder; what they raise comes back here.
    ray.init(
        address="local",
        num_cpus=num_cpus,
        log_to_driver=False,
        logging_level="WARNING",
        runtime_env={"env_vars": {"PYTHONPATH": str(PACKAGE.parent)}},
    )


@contextmanager
def _signals_kept() -> Iterator[None]:
    """Ray takes SIGTERM for a crash, or exits by itself; what the job wants with it stands again
    afterwards.
    """
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    if threading.current_thread() is threading.main_thread():
        for number, handler in before.items():
            if handler is not None:
                signal.signal(number, handler)


def _join(address: str) -> None:
    """The cluster at `address`, which gets the package from here unless a job has brought it."""
    for name, value in EVERYWHERE.items():
        os.environ.setdefault(name, value)
    if "://" in address:
        raise UserError(
            f"RAY_ADDRESS={address}: give host:port of the head node, or submit the job:"
            " ray job submit --working-dir . -- python ..."
        )
    if address != "auto":
        _check_there(address)
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


def _check_there(address: str) -> None:
    """UserError, in seconds, if nobody listens: Ray would go on trying for many minutes."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S).close()
    except (OSError, ValueError) as error:
        raise UserError(f"RAY_ADDRESS={address}: no cluster there ({error})") from None


def check_fits(config: Config, workers: int, spare_cpus: int) -> None:
    """UserError if the cluster is too small for the workers, even with nothing else on it."""
    wanted = workers * config.cluster.cpus_per_worker
    have = ray.cluster_resources()
    cpus = have.get("CPU", 0.0)
    # Ray Data makes the rows in tasks of its own: without a core for them training never starts.
    if wanted > cpus - spare_cpus:
        spare = " and one for the data stream" if spare_cpus else ""
        raise UserError(
            f"cluster.num_workers={workers} of cpus_per_worker="
            f"{config.cluster.cpus_per_worker:g} need {wanted:g} CPUs{spare};"
            f" the cluster has {cpus:g}"
        )
    if config.cluster.use_gpu and workers > have.get("GPU", 0.0):
        raise UserError(
            f"cluster.use_gpu: {workers} workers need a GPU each;"
            f" the cluster has {have.get('GPU', 0.0):g}"
        )


def _check_shared(config: Config) -> None:
    """UserError if a node does not see what this process writes under paths.root."""
    here = ray.get_runtime_context().get_node_id()
    others = [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["NodeID"] != here]
    root = config.paths.root
    if not others and not storage.is_uri(root):
        return
    mark = storage.folder(root) / f".seen-{uuid4().hex}"
    try:
        make_folder(mark.parent)
        mark.write_text("a job looks whether all nodes see this folder\n")
        storage.upload(mark)
        task = ray.remote(num_cpus=0)(_sees)
        asked = {
            node: task.options(
                scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)
            ).remote(root, mark.name)
            for node in others
        }
        blind = [node for node, sees in asked.items() if _get(sees) is False]
    finally:
        storage.remove(mark)
    if blind:
        raise UserError(
            f"paths.root={root}: {len(blind)} of the cluster's {len(others) + 1} nodes do not see"
            " it; name a folder that all of them share, or a URI (s3://, gs://)"
        )


def _get(ref: Any) -> Any:
    """The result, or None if its node is gone: Ray notices that only after a while."""
    try:
        return ray.get(ref)
    except (TaskUnschedulableError, NodeDiedError, WorkerCrashedError):
        return None


def _sees(root: str, name: str) -> bool:
    return storage.exists(storage.folder(root) / name)
