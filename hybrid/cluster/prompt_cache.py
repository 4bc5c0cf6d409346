"""Fill the prompt cache with Ray Data: each actor of a pool holds the language model."""

from __future__ import annotations

from typing import Any

import numpy as np
import ray.data
from ray.data import ActorPoolStrategy

from hybrid.cluster.runtime import cluster
from hybrid.cluster.stream import quiet
from hybrid.config import Config
from hybrid.device import compute_device, share_cores
from hybrid.errors import UserError
from hybrid.prompt_cache import PromptCacher


def cache_prompts_on_ray(config: Config, problems: list[tuple[int, int]]) -> int:
    """Cache missing `problems` on `cluster.num_workers` actors; return the number added."""
    rows = [{"variant": variant, "number": number} for variant, number in problems]
    with cluster(config, spare_cpus=1):
        quiet()
        results = ray.data.from_items(rows).map_batches(
            _worker(config),
            batch_size=config.llama.batch_size,
            batch_format="numpy",
            compute=ActorPoolStrategy(size=config.cluster.num_workers),
            num_cpus=config.cluster.cpus_per_worker,
            num_gpus=1 if config.cluster.use_gpu else 0,
        )
        total = 0
        for row in results.iter_rows():
            if row["error"]:
                raise UserError(row["error"])
            total += row["added"]
        return total


def _worker(config: Config) -> type:
    """Return the class of the pool's actors.

    The class closes over `config`: Ray cannot restart an actor if the node that stores its
    constructor arguments is lost.
    """

    class Worker:
        def __init__(self) -> None:
            share_cores(config.cluster.num_workers)
            self.cacher: PromptCacher | None = None

        def __call__(self, batch: dict[str, np.ndarray[Any, Any]]) -> dict[str, list[Any]]:
            problems = list(zip(batch["variant"].tolist(), batch["number"].tolist(), strict=True))
            try:
                if self.cacher is None:
                    self.cacher = PromptCacher(config, compute_device(config.cluster.use_gpu))
                return {"added": [self.cacher.add(problems)], "error": [""]}
            except UserError as error:
                # If raised, Ray Data would wrap it in an error of its own.
                return {"added": [0], "error": [str(error)]}

    return Worker
