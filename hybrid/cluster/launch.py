"""Runs a job in this process or on a cluster, as `cluster.num_workers` says."""

from __future__ import annotations

import hybrid.evaluate as evaluation
from hybrid.config import Config
from hybrid.context import LocalContext, compute_device, share_cores
from hybrid.evaluate import Outcome, local_solve_all
from hybrid.train import Result, check
from hybrid.train import pretrain as pretrain_loop
from hybrid.train.progress import watch

# ray is imported where it is needed: without workers a job starts seconds earlier.


def pretrain(config: Config) -> Result:
    """Train the TRM; rerunning the same config resumes it."""
    check(config)
    with watch(config):
        if config.cluster.num_workers == 0:
            share_cores(1)
            return pretrain_loop(config, LocalContext(compute_device(config.cluster.use_gpu)))
        from hybrid.cluster.trainer import fit

        return fit(config)


def evaluate(config: Config) -> Outcome:
    """Solve and score; rerunning the same config resumes it."""
    if config.cluster.num_workers == 0:
        share_cores(1)
        return evaluation.evaluate(config, local_solve_all)
    from hybrid.cluster.evaluator import ray_solve_all

    return evaluation.evaluate(config, ray_solve_all(config))
