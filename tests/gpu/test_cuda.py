"""The product on a CUDA device: pytest -m gpu."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import count
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_close, metrics, train_as_rank
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from benchmarks import golden
from benchmarks.gpu import parity, resume
from benchmarks.gpu.joint import SMALL, SMALL_TRM, hybrid_config, random_reader
from benchmarks.gpu.session import cudnn_attention, experiment
from hybrid.config import Config
from hybrid.context import LocalContext
from hybrid.llm import LlamaConfig
from hybrid.llm.load import load_backbone
from hybrid.llm.tiny import tiny_random
from hybrid.train import Joint, pretrain, update
from hybrid.train.loader import SlotLoader
from hybrid.train.loop import train
from hybrid.train.pretrain import Pretraining

pytestmark = pytest.mark.gpu
BUCKETED_MICRO_BATCHES = {
    "data": {"canvas": "bucketed", "max_side": 12},
    "training": {"micro_batch_size": 3},
}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", golden.LIMITS)
def test_act_steps_are_the_published_ones(cuda: torch.device, name: str, compiled: bool) -> None:
    found = parity.act_steps(name, cuda, compiled)
    assert found["ok"], found


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_training_follows_the_published_trajectory(cuda: torch.device, compiled: bool) -> None:
    found = parity.trajectory(cuda, compiled)
    assert found["ok"], found


@pytest.mark.parametrize(
    ("compiled", "sections"),
    [
        pytest.param(False, {}, id="eager"),
        pytest.param(True, {}, id="compiled"),
        pytest.param(False, BUCKETED_MICRO_BATCHES, id="bucketed canvases in micro-batches"),
    ],
)
def test_run_repeats_and_resumes_exactly(
    cuda: torch.device,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    compiled: bool,
    sections: dict[str, Any],
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        found = resume.differences(tmp_path, cuda, 10, compiled, **sections)
    finally:
        torch.use_deterministic_algorithms(False)
    assert not any(found.values()), found


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"recompute": False}, id="kept activations"),
        pytest.param({"recompute": True}, id="recompute"),
        pytest.param({"data": {"canvas": "bucketed", "max_side": 12}}, id="bucketed canvases"),
        pytest.param({"micro_batch_size": 2}, id="micro-batches"),
        pytest.param(
            {"llama": {"frozen": False, "lr": 1e-3}, "lr_warmup_steps": 0},
            id="learning language model",
        ),
    ],
)
def test_joint_step_in_bfloat16_is_finite(
    cuda: torch.device, tmp_path: Path, changes: dict[str, Any]
) -> None:
    config = hybrid_config(
        tmp_path, cuda, tiny=True, run="run", compiled=True, batch_size=4, **changes
    )
    reader = random_reader(SMALL, config.llama, torch.bfloat16, cuda)
    weights = dict(reader.backbone.model.named_parameters())
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    result = train(config, LocalContext(cuda), partial(Joint, reader=reader))
    assert result.step == config.training.steps
    losses = [line["loss"] for line in metrics(config.run_folder)]
    assert all(0 < loss < 10 for loss in losses), losses
    same = all(torch.equal(weight, before[name]) for name, weight in weights.items())
    assert same == config.llama.frozen


@pytest.mark.parametrize(
    "sections",
    [
        pytest.param({}, id="full canvas"),
        pytest.param(BUCKETED_MICRO_BATCHES, id="bucketed canvases in micro-batches"),
    ],
)
def test_training_step_waits_for_the_device_once(
    cuda: torch.device,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    sections: dict[str, dict[str, Any]],
) -> None:
    """Everything from the refill of slots to the update of weights, except one read of a flag."""
    read_flag, reads = update.read_flag, 0

    def allowed(flag: torch.Tensor) -> bool:
        nonlocal reads
        reads += 1
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("default")
        found = read_flag(flag)
        torch.cuda.set_sync_debug_mode(before)
        return found

    def guard(owner: type, name: str) -> None:
        original, calls = getattr(owner, name), count()

        def guarded(*arguments: Any) -> Any:
            # The first calls start libraries and allocate.
            torch.cuda.set_sync_debug_mode("error" if next(calls) >= 2 else "default")
            try:
                return original(*arguments)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        monkeypatch.setattr(owner, name, guarded)

    monkeypatch.setattr(update, "read_flag", allowed)
    guard(SlotLoader, "refill")
    guard(Pretraining, "step")
    config = experiment(
        tmp_path,
        cuda,
        {
            "training": ["arc1-training"],
            "evaluation": [],
            "variants": 3,
            "max_side": 6,
            **sections.get("data", {}),
        },
        trm={**SMALL_TRM, "halt_max_steps": 3},
        training={"batch_size": 8, "steps": 8, **sections.get("training", {})},
        cluster={"compile": False},
    )
    pretrain(config, LocalContext(cuda))
    assert reads == config.training.steps


def test_cudnn_switch_changes_compiled_attention(cuda: torch.device) -> None:
    heads = torch.randn(2, 8, 128, 64, device=cuda, dtype=torch.bfloat16)

    def operations() -> str:
        attention = torch.compile(lambda x: 2 * F.scaled_dot_product_attention(x, x, x))
        attention(heads)
        with profile(activities=[ProfilerActivity.CPU]) as found:
            attention(heads)
        return " ".join(event.key for event in found.key_averages())

    with cudnn_attention(True):
        if "cudnn_attention" not in operations():
            pytest.skip("torch prefers another backend on this device")
    with cudnn_attention(False):
        assert "cudnn_attention" not in operations()


def test_model_is_loaded_on_its_device(cuda: torch.device, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    for part in tiny_random(torch.float32):
        part.save_pretrained(tmp_path / "model")
    config = LlamaConfig(model=str(tmp_path / "model"))
    backbone = load_backbone(config, cuda, tmp_path)
    assert {weight.device.type for weight in backbone.model.parameters()} == {"cuda"}


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
