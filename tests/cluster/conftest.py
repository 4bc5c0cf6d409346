"""One real local cluster for all tests marked `ray`, and a tiny experiment on real ARC tasks."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from hybrid.config import Config, from_dict
from hybrid.dataset import prepare


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    import ray

    from hybrid.cluster.runtime import start_local

    os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.5"
    start_local(num_cpus=4)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The 15 ARC-1 training tasks that fit a 3 x 3 canvas, their tests held out."""
    folder = tmp_path_factory.mktemp("data") / "processed"
    config = make_experiment(folder.parent, "unused")
    prepare(config.data, folder, say=lambda line: None)
    return folder


@pytest.fixture(scope="session")
def experiment(prepared: Path) -> Callable[..., Config]:
    """experiment(run, section={key: value}) -> a tiny config on the prepared tasks."""
    return partial(make_experiment, prepared.parent)


def make_experiment(root: Path, run: str, **sections: dict[str, Any]) -> Config:
    raw: dict[str, dict[str, Any]] = {
        "paths": {"root": str(root), "data": str(root / "processed")},
        "data": {"training": [], "evaluation": ["arc1-training"], "variants": 3, "max_side": 3},
        "trm": {
            "hidden_size": 32,
            "num_heads": 2,
            "expansion": 2,
            "H_cycles": 2,
            "L_cycles": 1,
            "halt_max_steps": 3,
            "puzzle_emb_ndim": 32,
            "puzzle_emb_len": 1,
        },
        "training": {
            "batch_size": 8,
            "steps": 8,
            "save_every": 4,
            "lr": 1e-3,
            "lr_warmup_steps": 2,
            "probe_pairs": 8,
        },
        "cluster": {"num_workers": 1, "cpus_per_worker": 0.5},
        "logging": {"run": run, "every": 2, "wandb": False},
    }
    for section, keys in sections.items():
        raw.setdefault(section, {}).update(keys)
    return from_dict(raw)
