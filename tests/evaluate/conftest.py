"""Slightly trained models and the configs that evaluate them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    EVALUATED,
    change_weights,
    config_of,
    hybrid_of,
    randomize_halt_head,
    randomize_puzzle_table,
    write_tasks,
)

from hybrid.arc import Task
from hybrid.checkpoint import Checkpoint, read
from hybrid.config import Config
from hybrid.context import LocalContext
from hybrid.dataset import prepare
from hybrid.train import joint, pretrain

TRAINED = ("0d3d703e", "74dd1130", "9565186b")
CANVAS = {"max_side": 3}
"""Without padding to predict, even an untrained model predicts grids."""
EXACT = {"forward_dtype": "float64"}
"""In float64 the argmax token does not depend on the batch."""


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, arc1: dict[str, Task]) -> Config:
    """A run of 40 steps, checkpoints at 20 and 40; it predicts many grids, none correct."""
    root = tmp_path_factory.mktemp("trained")
    write_tasks(root / "training", [arc1[task] for task in TRAINED])
    write_tasks(root / "evaluation", [arc1[task] for task in EVALUATED])
    training = {"steps": 40, "save_every": 20, "batch_size": 12, "lr": 1e-3, "puzzle_lr": 0.1}
    config = config_of(root, data=CANVAS, trm=EXACT, training=training)
    prepare(config.data, config.data_folder, lambda line: None)
    pretrain(config, LocalContext(torch.device("cpu")))
    return config


@pytest.fixture
def checkpoint(trained: Config) -> Checkpoint:
    return read(trained.run_folder / "checkpoints" / "step_00000040")


@pytest.fixture
def make_config(trained: Config, tmp_path: Path, checkpoint: Checkpoint) -> Callable[..., Config]:
    """make_config(tasks, **evaluation): config that evaluates the model, on `tasks` if given."""

    def make(tasks: list[Task] | None = None, run: str = "run", **evaluation: Any) -> Config:
        sections: dict[str, dict[str, Any]] = {
            "data": dict(CANVAS),
            "paths": {"data": trained.paths.data, "runs": str(tmp_path / "runs")},
            "evaluation": {"checkpoint": str(checkpoint.folder)} | evaluation,
            "logging": {"run": run},
        }
        if tasks is not None:
            write_tasks(tmp_path / f"{run}-tasks", tasks)
            sections["paths"]["data"] = str(tmp_path / f"{run}-data")
            sections["data"] |= {"training": [], "evaluation": [str(tmp_path / f"{run}-tasks")]}
        config = config_of(Path(trained.paths.root), **sections)
        if tasks is not None:
            prepare(config.data, config.data_folder, lambda line: None)
        return config

    return make


@pytest.fixture(scope="session")
def hybrid(tmp_path_factory: pytest.TempPathFactory, arc1: dict[str, Task]) -> Config:
    """A hybrid of 4 steps, one demonstration per task held out; some rows stop early."""
    root = tmp_path_factory.mktemp("hybrid")
    write_tasks(root / "training", [arc1[task] for task in TRAINED])
    write_tasks(root / "evaluation", [arc1[task] for task in EVALUATED])
    config = hybrid_of(
        root,
        data=CANVAS | {"hold_out_demos": 1},
        trm=EXACT,
        llama={"dtype": "float64"},
        adapter={"lr": 1e-2},
        training={"lr": 1e-3, "puzzle_lr": 0.1, "act_steps": 2, "lr_warmup_steps": 0},
    )
    prepare(config.data, config.data_folder, lambda line: None)
    checkpoint = joint(config, LocalContext(torch.device("cpu"))).checkpoint
    change_weights(checkpoint, randomize_halt_head)
    change_weights(checkpoint, randomize_puzzle_table, ["puzzle_table"])
    return config


@pytest.fixture
def make_hybrid_config(hybrid: Config, tmp_path: Path) -> Callable[..., Config]:
    """make_hybrid_config(run, section={key: value}): config that evaluates the hybrid."""
    step = hybrid.run_folder / "checkpoints" / "step_00000004"

    def make(run: str = "run", **sections: dict[str, Any]) -> Config:
        defaults: dict[str, dict[str, Any]] = {
            "data": CANVAS | {"hold_out_demos": 1},
            "paths": {"data": hybrid.paths.data, "runs": str(tmp_path / "runs")},
            "llama": {"dtype": "float64"},
            "evaluation": {"checkpoint": str(step)},
            "logging": {"run": run},
        }
        merged = {s: defaults.get(s, {}) | sections.get(s, {}) for s in defaults | sections}
        return hybrid_of(Path(hybrid.paths.root), **merged)

    return make
