"""Training workers: TorchTrainer around the loop, and the loop's view of Ray."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from hybrid.cluster.runtime import cluster
from hybrid.cluster.stream import ray_rounds
from hybrid.config import Config, from_dict, to_dict
from hybrid.context import ProcessGroupContext, share_cores
from hybrid.dataset import Stream
from hybrid.dataset.stream import Rows
from hybrid.errors import UserError
from hybrid.train import Diverged, Result, joint, pretrain

RAY_FOLDER = "ray"
"""Ray Train's own bookkeeping, inside the run folder."""


class RayContext(ProcessGroupContext):
    """A Ray Train worker: its process group, and rows from Ray Data."""

    def __init__(self) -> None:
        super().__init__(ray.train.torch.get_device())

    def rounds(self, stream: Stream, slots: range, total_slots: int, first: int) -> Iterator[Rows]:
        """Made by Ray Data."""
        return ray_rounds(stream, slots, total_slots, first)

    def report(self, metrics: Mapping[str, Any], checkpoint: Path) -> None:
        """Tell the controller. The checkpoint is ours: it stands on shared storage already."""
        ray.train.report({**metrics, "checkpoint": str(checkpoint)})


def train_worker(settings: dict[str, Any]) -> dict[str, Any]:
    """What every worker runs. Takes and returns plain values: they are pickled."""
    config = from_dict(settings["config"])
    share_cores(ray.train.get_context().get_local_world_size())
    try:
        loop = joint if settings["kind"] == "hybrid" else pretrain
        result = loop(config, RayContext())
    except UserError as error:
        return {"user_error": str(error)}
    except Diverged as error:
        # Not a fault to recover from: the same steps again would end in the same place.
        return {"diverged": str(error)}
    return {
        "step": result.step,
        "checkpoint": str(result.checkpoint),
        "untrained": result.untrained,
        "trained": result.trained,
    }


def fit(config: Config, kind: str) -> Result:
    """Run the loop of a `kind` on the config's workers, replacing lost ones; rerun to resume."""
    with cluster(config, spare_cpus=1):
        trainer = TorchTrainer(
            train_worker,
            train_loop_config={"config": to_dict(config), "kind": kind},
            scaling_config=ScalingConfig(
                num_workers=config.cluster.num_workers,
                use_gpu=config.cluster.use_gpu,
                resources_per_worker={
                    "CPU": config.cluster.cpus_per_worker,
                    **({"GPU": 1} if config.cluster.use_gpu else {}),
                },
            ),
            run_config=RunConfig(
                name=RAY_FOLDER,
                storage_path=str(config.run_folder),
                failure_config=FailureConfig(max_failures=config.cluster.max_failures),
            ),
        )
        # Ray's own record would resume a finished run as finished; the loop looks for itself.
        shutil.rmtree(config.run_folder / RAY_FOLDER, ignore_errors=True)
        found = trainer.fit().return_value
    if "user_error" in found:
        raise UserError(found["user_error"])
    if "diverged" in found:
        raise Diverged(found["diverged"])
    return Result(**{**found, "checkpoint": Path(found["checkpoint"])})
