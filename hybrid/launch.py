"""Launch a job in this process or on a Ray cluster, depending on `cluster.num_workers`."""

from __future__ import annotations

import hybrid.evaluate as evaluation
from hybrid import storage
from hybrid import train as loops
from hybrid.config import Config
from hybrid.context import LocalContext
from hybrid.device import compute_device, share_cores
from hybrid.errors import Stopped
from hybrid.evaluate import Outcome, predict_locally
from hybrid.prompt_cache import cache_prompts_locally, plan, summary
from hybrid.train import Joint, Pretraining, Result, check
from hybrid.train.progress import show_progress
from hybrid.train.stop import stop_on_signals

# Importing ray takes seconds, so the functions that need it import it.

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
    with show_progress(config), stop_on_signals(config.run_folder):
        result = _run(config, kind)
    if result.stopped:
        raise Stopped(
            f"at step {result.step}: {storage.uri(result.checkpoint)};"
            " run the same command to resume"
        )
    return result


def _run(config: Config, kind: str) -> Result:
    if config.cluster.num_workers == 0:
        share_cores(1)
        return LOOPS[kind](config, LocalContext(compute_device(config.cluster.use_gpu)))
    from hybrid.cluster.trainer import fit

    return fit(config, kind)


def cache_prompts(config: Config) -> str:
    """Fill the prompt cache with the dataset's prompts; return a one-line summary."""
    missing = plan(config)
    if config.cluster.num_workers:
        from hybrid.cluster.prompt_cache import cache_prompts_on_ray

        return summary(config, missing, cache_prompts_on_ray(config, missing))
    share_cores(1)
    return summary(config, missing, cache_prompts_locally(config, missing))


def evaluate(config: Config) -> Outcome:
    """Predict and score; rerunning the same config resumes it."""
    if config.cluster.num_workers == 0:
        share_cores(1)
        return evaluation.evaluate(config, predict_locally)
    from hybrid.cluster.evaluator import predict_on_ray

    return evaluation.evaluate(config, predict_on_ray(config))
