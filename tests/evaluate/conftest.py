"""A model that has learned a little, and ways to ask it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    ASKED,
    change_weights,
    config_of,
    hybrid_of,
    scattered,
    undecided,
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
"""Without a margin to predict even a new model answers with grids."""
EXACT = {"forward_dtype": "float64"}
"""The best token is the same however rows are put into batches."""


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, arc1: dict[str, Task]) -> Config:
    """A run of 40 steps with a checkpoint half-way; its answers are many grids, none right."""
    root = tmp_path_factory.mktemp("trained")
    write_tasks(root / "training", [arc1[task] for task in TRAINED])
    write_tasks(root / "evaluation", [arc1[task] for task in ASKED])
    training = {"steps": 40, "save_every": 20, "batch_size": 12, "lr": 1e-3, "puzzle_lr": 0.1}
    config = config_of(root, data=CANVAS, trm=EXACT, training=training)
    prepare(config.data, config.data_folder, lambda line: None)
    pretrain(config, LocalContext(torch.device("cpu")))
    return config


@pytest.fixture
def checkpoint(trained: Config) -> Checkpoint:
    return read(trained.run_folder / "checkpoints" / "step_00000040")


@pytest.fixture
def select_questions(
    trained: Config, tmp_path: Path, checkpoint: Checkpoint
) -> Callable[..., Config]:
    """ask(tasks, evaluation keys): config to ask the trained model, of `tasks` where given."""

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
    """A hybrid of 4 steps, one demonstration of each task held out; rows stop when they like."""
    root = tmp_path_factory.mktemp("hybrid")
    write_tasks(root / "training", [arc1[task] for task in TRAINED])
    write_tasks(root / "evaluation", [arc1[task] for task in ASKED])
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
    change_weights(checkpoint, undecided)
    change_weights(checkpoint, scattered, ["puzzle_table"])
    return config


@pytest.fixture
def ask_hybrid(hybrid: Config, tmp_path: Path) -> Callable[..., Config]:
    """ask_hybrid(run, section={key: value}): config to ask that hybrid."""
    step = hybrid.run_folder / "checkpoints" / "step_00000004"

    def make(run: str = "run", **sections: dict[str, Any]) -> Config:
        fixed: dict[str, dict[str, Any]] = {
            "data": CANVAS | {"hold_out_demos": 1},
            "paths": {"data": hybrid.paths.data, "runs": str(tmp_path / "runs")},
            "llama": {"dtype": "float64"},
            "evaluation": {"checkpoint": str(step)},
            "logging": {"run": run},
        }
        given = {s: fixed.get(s, {}) | sections.get(s, {}) for s in fixed | sections}
        return hybrid_of(Path(hybrid.paths.root), **given)

    return make
