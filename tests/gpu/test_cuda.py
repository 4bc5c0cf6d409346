"""The product on a CUDA device: pytest -m gpu."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from helpers import assert_close, metrics, train_as_rank

from benchmarks import golden
from benchmarks.gpu import parity, resume
from benchmarks.gpu.joint import SMALL, SMALL_TRM, hybrid_config, random_reader
from benchmarks.gpu.session import experiment
from hybrid.config import Config
from hybrid.context import LocalContext
from hybrid.train import Joint, pretrain
from hybrid.train.loop import train

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", golden.LIMITS)
def test_act_steps_are_the_published_ones(cuda: torch.device, name: str, compiled: bool) -> None:
    found = parity.act_steps(name, cuda, compiled)
    assert found["ok"], found


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_training_follows_the_published_trajectory(cuda: torch.device, compiled: bool) -> None:
    found = parity.trajectory(cuda, compiled)
    assert found["ok"], found


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_run_repeats_and_resumes_exactly(
    cuda: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiled: bool
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        found = resume.differences(tmp_path, cuda, 10, compiled)
    finally:
        torch.use_deterministic_algorithms(False)
    assert not any(found.values()), found


@pytest.mark.parametrize("recompute", [False, True])
def test_a_joint_step_in_bfloat16_is_finite(
    cuda: torch.device, tmp_path: Path, recompute: bool
) -> None:
    config = hybrid_config(
        tmp_path, cuda, tiny=True, run="run", compiled=True, batch_size=4, recompute=recompute
    )
    reader = random_reader(SMALL, config.llama, torch.bfloat16, cuda)
    result = train(config, LocalContext(cuda), partial(Joint, reader=reader))
    assert result.step == config.training.steps
    losses = [line["loss"] for line in metrics(config.run_folder)]
    assert all(0 < loss < 10 for loss in losses), losses


def test_two_gpus_train_the_same_run_as_one(
    cuda: torch.device, tmp_path: Path, start: Callable[..., BaseProcess]
) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")

    def configure(run: str) -> Config:
        return experiment(
            tmp_path,
            cuda,
            {"training": ["arc1-training"], "evaluation": [], "variants": 3, "max_side": 5},
            trm={**SMALL_TRM, "forward_dtype": "float32"},
            training={"batch_size": 6, "steps": 4},
            cluster={"compile": False},
            logging={"run": run},
        )

    one = pretrain(configure("one"), LocalContext(cuda)).checkpoint
    two = configure("two")
    ranks = [
        start(train_as_rank, pretrain, rank, 2, tmp_path / "store", two, False, cuda.type)
        for rank in range(2)
    ]
    for process in ranks:
        process.join(120)
    assert [process.exitcode for process in ranks] == [0, 0]
    assert_close(one, two.run_folder / "checkpoints" / one.name)
