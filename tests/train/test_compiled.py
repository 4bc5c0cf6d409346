"""Training and evaluation with compiled blocks (`cluster.compile`)."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_close, config_of, quietly

from hybrid.config import ClusterConfig, Config
from hybrid.context import LocalContext
from hybrid.dataset import prepare
from hybrid.errors import UserError
from hybrid.evaluate import Outcome
from hybrid.train import pretrain

CPU = LocalContext(torch.device("cpu"))


def config_on(root: Path, run: str, steps: int, **cluster: Any) -> Config:
    """Tasks on canvases of side 11 and 12."""
    config = config_of(
        root,
        data={
            "training": [],
            "evaluation": ["arc1-training"],
            "variants": 1,
            "max_side": 12,
            "canvas": "bucketed",
        },
        training={"batch_size": 6, "steps": steps, "save_every": 2, "lr": 1e-4, "puzzle_lr": 1e-3},
        evaluation={"limit": 6},
        cluster={"num_workers": 0, **cluster},
        logging={"run": run, "wandb": False},
    )
    prepare(config.data, config.data_folder, say=lambda line: None)
    return config


def test_compile_defaults_to_on_with_a_gpu() -> None:
    assert [ClusterConfig(use_gpu=gpu).compiles for gpu in (False, True)] == [False, True]
    assert ClusterConfig(compile=True).compiles
    assert not ClusterConfig(use_gpu=True, compile=False).compiles


def test_missing_compiler_raises_a_user_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = pretrain(config_on(tmp_path, "plain", 2), CPU)
    monkeypatch.setenv("CXX", "no-such-compiler")
    config = config_on(tmp_path, "compiled", 2, compile=True)
    with pytest.raises(UserError, match=r"^cluster\.compile: no-such-compiler not found"):
        pretrain(config, CPU)
    evaluated = replace(
        config, evaluation=replace(config.evaluation, checkpoint=str(plain.checkpoint))
    )
    with pytest.raises(UserError, match=r"^cluster\.compile: no-such-compiler not found"):
        quietly(evaluated)


@pytest.mark.slow
def test_compiled_training_resumes_bit_for_bit_and_matches_eager(
    tmp_path: Path,
) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    whole = pretrain(config_on(tmp_path, "whole", 4, compile=True), CPU).checkpoint
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 2
    pretrain(config_on(tmp_path, "parts", 2, compile=True), CPU)
    # A new process has an empty compile cache.
    torch._dynamo.reset()
    parts = pretrain(config_on(tmp_path, "parts", 4, compile=True), CPU).checkpoint
    assert_close(whole, parts, 0, 0)
    plain = pretrain(config_on(tmp_path, "plain", 4), CPU).checkpoint
    assert_close(whole, plain, 1e-5, 1e-4)
    outcomes = []
    for compiled in (False, True):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        config = config_on(tmp_path, "plain", 4, compile=compiled)
        outcomes.append(quietly(config))
        assert bool(torch._dynamo.utils.counters["stats"]["unique_graphs"]) == compiled
    one, other = outcomes
    assert one.folder != other.folder
    assert len(votes(one)) > 4 and votes(one) == votes(other)


def votes(outcome: Outcome) -> list[tuple[int, Any]]:
    """Empty views and grids with their votes, of every test; confidences differ by rounding."""
    files = sorted((outcome.folder / "predictions").glob("*.json"))
    return [
        (test["empty"], sorted((c["grid"], c["votes"]) for c in test["candidates"]))
        for path in files
        for test in json.loads(path.read_text())["tests"]
    ]
