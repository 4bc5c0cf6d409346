"""Joining a cluster or starting one on this machine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ray

from hybrid.config import Config
from hybrid.errors import UserError

LOCAL = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # workers' prints would come out twice
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # makes a cluster of one machine listen on 127.0.0.1
    "RAY_AUTH_MODE": "disabled",  # else a token file appears in the user's home
    "RAY_worker_niceness": "0",  # a worker that others overtake stalls at every barrier of OpenMP
}
"""Environment of a cluster of our own; what the user has set stays."""


@contextmanager
def cluster(config: Config, *, spare_cpus: int = 0) -> Iterator[None]:
    """Inside, ray is connected.

    To the running cluster where RAY_ADDRESS or a job names one, else to one of this machine that
    ends with the block. Raises UserError if the cluster can never hold the workers that the config
    asks for and `spare_cpus` for other tasks.
    """
    ours = not ray.is_initialized()
    if ours and os.environ.get("RAY_ADDRESS"):
        ray.init()
    elif ours:
        start_local()
    try:
        _check_fits(config, spare_cpus)
        yield
    finally:
        if ours:
            ray.shutdown()


def start_local(num_cpus: int | None = None) -> None:
    """A cluster of this machine alone, which nobody else can reach."""
    for name, value in LOCAL.items():
        os.environ.setdefault(name, value)
    package = Path(__file__).parents[2]
    # Workers' own logs are in the run folder; what they raise comes back here.
    ray.init(
        address="local",
        num_cpus=num_cpus,
        log_to_driver=False,
        logging_level="WARNING",
        runtime_env={"env_vars": {"PYTHONPATH": str(package)}},
    )


def _check_fits(config: Config, spare_cpus: int) -> None:
    wanted = config.cluster.num_workers * config.cluster.cpus_per_worker
    have = ray.cluster_resources()
    cpus = have.get("CPU", 0.0)
    # Ray Data makes the rows in tasks of its own: without a core for them training never starts.
    if wanted > cpus - spare_cpus:
        spare = " and one for the data stream" if spare_cpus else ""
        raise UserError(
            f"cluster.num_workers={config.cluster.num_workers} of cpus_per_worker="
            f"{config.cluster.cpus_per_worker:g} need {wanted:g} CPUs{spare};"
            f" the cluster has {cpus:g}"
        )
    if config.cluster.use_gpu and config.cluster.num_workers > have.get("GPU", 0.0):
        raise UserError(
            f"cluster.use_gpu: {config.cluster.num_workers} workers need a GPU each;"
            f" the cluster has {have.get('GPU', 0.0):g}"
        )
