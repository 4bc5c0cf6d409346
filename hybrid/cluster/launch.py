"""Runs a job in this process or on a cluster, as `cluster.num_workers` says."""

from __future__ import annotations

import hybrid.evaluate as evaluation
from hybrid import storage
from hybrid import train as loops
from hybrid.config import Config
from hybrid.context import LocalContext
from hybrid.device import compute_device, share_cores
from hybrid.encode import Encoder, plan
from hybrid.errors import Stopped
from hybrid.evaluate import Outcome, local_solve_all
from hybrid.train import Joint, Pretraining, Result, check
from hybrid.train.progress import watch
from hybrid.train.stop import stoppable

# ray is imported where it is needed: without workers a job starts seconds earlier.

LOOPS = {"trm": loops.pretrain, "hybrid": loops.joint}
"""Training loops by the kind of checkpoint they write."""


def pretrain(config: Config) -> Result:
    """Train the TRM; rerunning the same config resumes it."""
    return _train(config, Pretraining.kind, Pretraining.sections)


def joint(config: Config) -> Result:
    """Train the hybrid; rerunning the same config resumes it."""
    return _train(config, Joint.kind, Joint.sections)


def _train(config: Config, kind: str, sections: tuple[str, ...]) -> Result:
    config = check(config, kind, sections)
    with watch(config), stoppable(config.run_folder):
        result = _run(config, kind)
    if result.stopped:
        raise Stopped(
            f"at step {result.step}: {storage.place(result.checkpoint)};"
            " the same command goes on from there"
        )
    return result


def _run(config: Config, kind: str) -> Result:
    if config.cluster.num_workers == 0:
        share_cores(1)
        return LOOPS[kind](config, LocalContext(compute_device(config.cluster.use_gpu)))
    from hybrid.cluster.trainer import fit

    return fit(config, kind)


def encode(config: Config) -> str:
    """Encode all problems of the dataset that are not there yet; says what was done."""
    problems = plan(config)
    if config.cluster.num_workers:
        from hybrid.cluster.encoder import ray_encode

        made = ray_encode(config, problems)
    else:
        share_cores(1)
        encoder = Encoder(config, compute_device(config.cluster.use_gpu))
        size = config.llama.batch_size
        parts = [problems[first : first + size] for first in range(0, len(problems), size)]
        made = sum(map(encoder.add, parts))
    return f"{len(problems)} problems, {made} encoded now: {config.paths.encodings}"


def evaluate(config: Config) -> Outcome:
    """Solve and score; rerunning the same config resumes it."""
    if config.cluster.num_workers == 0:
        share_cores(1)
        return evaluation.evaluate(config, local_solve_all)
    from hybrid.cluster.evaluator import ray_solve_all

    return evaluation.evaluate(config, ray_solve_all(config))
