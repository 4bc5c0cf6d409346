"""Hybrid training, evaluation and prompt caching on real Ray processes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_close, predictions
from safetensors.torch import load_file

from hybrid.config import Config
from hybrid.errors import UserError
from hybrid.launch import cache_prompts, evaluate, joint
from hybrid.llm.tiny import tiny_random

Experiment = Callable[..., Config]
Hybrid = Callable[..., Config]

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def hybrid(experiment: Experiment) -> Hybrid:
    """hybrid(run, section={key: value}) returns a tiny hybrid config with two training variants."""

    def make(run: str, **sections: dict[str, Any]) -> Config:
        keys: dict[str, dict[str, Any]] = {
            "llama": {"model": "tiny-random"},
            "adapter": {"hidden": 16, "prefix_tokens": 2},
            "training": {"steps": 3, "variants": 2, "max_attempts": 2, "blank_puzzle_prob": 0.2},
            "evaluation": {"limit": 6},
        }
        return experiment(
            run, **{s: keys.get(s, {}) | sections.get(s, {}) for s in keys | sections}
        )

    return make


@pytest.fixture(scope="module")
def local_run(hybrid: Hybrid) -> Path:
    return joint(hybrid("hybrid-local", cluster={"num_workers": 0})).checkpoint


def test_one_ray_worker_trains_the_same_hybrid_as_no_cluster(
    ray_cluster: None, hybrid: Hybrid, local_run: Path
) -> None:
    """Rows from Ray Data and prompts from the worker must belong to the same variants."""
    result = joint(hybrid("hybrid-one"))
    assert_close(local_run, result.checkpoint, 0, 0)
    assert result.train_accuracy_after is not None


def test_actors_give_the_same_predictions_as_one_process(
    ray_cluster: None, hybrid: Hybrid, local_run: Path
) -> None:
    evaluation = {"checkpoint": str(local_run), "limit": 6}
    local = evaluate(hybrid("alone", evaluation=evaluation, cluster={"num_workers": 0}))
    on_ray = evaluate(hybrid("spread", evaluation=evaluation, cluster={"num_workers": 2}))
    assert len(predictions(local.folder)) == 6
    assert predictions(on_ray.folder) == predictions(local.folder)
    for key in ("scores", "curve", "protocol"):
        assert on_ray.results[key] == local.results[key], key
    files = [(outcome.folder / "submission.json").read_bytes() for outcome in (local, on_ray)]
    assert files[0] == files[1]


def test_user_error_of_an_actor_reaches_the_driver(
    ray_cluster: None, hybrid: Hybrid, local_run: Path, tmp_path: Path
) -> None:
    model, tokenizer = tiny_random(torch.float32)
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(0.5)
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "other")
    evaluation = {"checkpoint": str(local_run), "limit": 2}
    other = hybrid("other", evaluation=evaluation, llama={"model": str(tmp_path / "other")})
    with pytest.raises(UserError, match=r"^llama\.model: .* is not the model that"):
        evaluate(other)


def test_prompt_cache_filled_by_ray_data_matches_one_process(
    ray_cluster: None, hybrid: Hybrid, tmp_path: Path
) -> None:
    def fill(name: str, workers: int) -> tuple[str, dict[str, Path]]:
        folder = tmp_path / name
        config = hybrid(
            "encode",
            paths={"prompt_cache": str(folder)},
            llama={"prompt_cache": True, "batch_size": 3},
            training={"variants": 1},
            cluster={"num_workers": workers},
        )
        line = cache_prompts(config)
        return line, {str(p.relative_to(folder)): p for p in folder.rglob("*") if p.is_file()}

    local_line, local = fill("alone", 0)
    ray_line, on_ray = fill("spread", 2)
    assert local.keys() == on_ray.keys() and len(local) > 40
    assert f" {len(local)} added" in local_line and f" {len(local)} added" in ray_line
    for name, path in local.items():
        expected, actual = load_file(path), load_file(on_ray[name])
        assert expected.keys() == actual.keys()
        for key, value in expected.items():
            torch.testing.assert_close(actual[key], value, rtol=1e-4, atol=1e-5, msg=key)
    written = {name: path.stat().st_mtime_ns for name, path in on_ray.items()}
    second_line, second = fill("spread", 2)
    assert " 0 added" in second_line
    assert {name: path.stat().st_mtime_ns for name, path in second.items()} == written
