"""Problem encodings made beforehand, by Ray Data: a plan of problems -> actors that each hold the
language model and write what is missing.
"""

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


def cache_prompts_on_ray(config: Config, plan: list[tuple[int, int]]) -> int:
    """Encode what is not there yet on `cluster.num_workers` actors; returns how many that were."""
    rows = [{"variant": variant, "number": number} for variant, number in plan]
    with cluster(config, spare_cpus=1):
        quiet()
        made = ray.data.from_items(rows).map_batches(
            _worker(config),
            batch_size=config.llama.batch_size,
            batch_format="numpy",
            compute=ActorPoolStrategy(size=config.cluster.num_workers),
            num_cpus=config.cluster.cpus_per_worker,
            num_gpus=1 if config.cluster.use_gpu else 0,
        )
        total = 0
        for row in made.iter_rows():
            if row["wrong"]:
                raise UserError(row["wrong"])
            total += row["made"]
        return total


def _worker(config: Config) -> type:
    """The class of the pool's actors. It holds the config itself: arguments of a constructor would
    be lost with the node that keeps them, as Ray warns.
    """

    class Worker:
        def __init__(self) -> None:
            share_cores(config.cluster.num_workers)
            self.encoder: PromptCacher | None = None

        def __call__(self, plan: dict[str, np.ndarray[Any, Any]]) -> dict[str, list[Any]]:
            pairs = list(zip(plan["variant"].tolist(), plan["number"].tolist(), strict=True))
            try:
                if self.encoder is None:
                    self.encoder = PromptCacher(config, compute_device(config.cluster.use_gpu))
                return {"made": [self.encoder.add(pairs)], "wrong": [""]}
            except UserError as error:
                # Raised, it would arrive as a fault of Ray's.
                return {"made": [0], "wrong": [str(error)]}

    return Worker
