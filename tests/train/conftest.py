"""Fixtures: a run of one step whose rows halt at different times."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    EVALUATED,
    TRAINED,
    change_weights,
    config_of,
    hybrid_of,
    randomize_halt_head,
    train_as_rank,
    write_tasks,
)

from hybrid.arc import Task
from hybrid.config import Config
from hybrid.context import LocalContext
from hybrid.dataset import prepare
from hybrid.train import Result, pretrain

CPU = LocalContext(torch.device("cpu"))


@pytest.fixture(scope="session")
def base_root(tmp_path_factory: pytest.TempPathFactory, arc1: dict[str, Task]) -> Path:
    """Root with a dataset and the run `base`: one step taken, random weights in the halt head."""
    root = tmp_path_factory.mktemp("base")
    write_tasks(root / "training", [arc1[task] for task in TRAINED])
    write_tasks(root / "evaluation", [arc1[task] for task in EVALUATED])
    config = config_of(root, training={"steps": 1}, logging={"run": "base"})
    prepare(config.data, config.data_folder, lambda line: None)
    change_weights(pretrain(config, CPU).checkpoint, randomize_halt_head)
    return root


@pytest.fixture
def copy_run(base_root: Path, request: pytest.FixtureRequest) -> Callable[..., Config]:
    """copy_run(name, section={key: value}) -> config of a copy of the run `base`, to be resumed."""

    def copy(name: str, **sections: dict[str, Any]) -> Config:
        logging = {**sections.pop("logging", {}), "run": f"{request.node.name}-{name}"}
        config = config_of(base_root, **sections, logging=logging)
        shutil.copytree(base_root / "runs" / "base", config.run_folder)
        return config

    return copy


@pytest.fixture
def hybrid_config(base_root: Path, request: pytest.FixtureRequest) -> Callable[..., Config]:
    """hybrid_config(name, section={key: value}) -> config of a new hybrid around the TRM of `base`.

    Its halt head has random weights, so rows stop after different attempts.
    """

    def make(name: str, **sections: dict[str, Any]) -> Config:
        sections["trm"] = {"init_from": "base"} | sections.get("trm", {})
        sections["logging"] = {"run": f"joint-{request.node.name}-{name}"}
        return hybrid_of(base_root, **sections)

    return make


@pytest.fixture
def train_on_two(start: Callable[..., BaseProcess], tmp_path: Path) -> Callable[..., None]:
    """train_on_two(config, loop, adamw): train in two processes joined over the loopback."""

    def run(config: Config, loop: Callable[..., Any] = pretrain, adamw: bool = False) -> None:
        store = tmp_path / f"store-{config.logging.run}"
        ranks = [start(train_as_rank, loop, rank, 2, store, config, adamw) for rank in range(2)]
        for process in ranks:
            process.join(120)
        assert [process.exitcode for process in ranks] == [0, 0]

    return run


@pytest.fixture(scope="session")
def train() -> Callable[[Config], Result]:
    """Pretrain in this process."""
    return partial(pretrain, context=CPU)
