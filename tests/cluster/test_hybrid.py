"""What only real Ray processes can show of the hybrid."""

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
Together = Callable[..., Config]

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def together(experiment: Experiment) -> Together:
    """together(run, section={key: value}): a tiny hybrid, its rows of two variants of three."""

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
def local_run(together: Together) -> Path:
    return joint(together("hybrid-local", cluster={"num_workers": 0})).checkpoint


def test_one_ray_worker_trains_the_same_hybrid_as_no_cluster(
    ray_cluster: None, together: Together, local_run: Path
) -> None:
    """Rows come from Ray Data, prompts from the worker: they must be of the same variants."""
    result = joint(together("hybrid-one"))
    assert_close(local_run, result.checkpoint, 0, 0)
    assert result.trained is not None


def test_actors_answer_as_one_process_does(
    ray_cluster: None, together: Together, local_run: Path
) -> None:
    evaluation = {"checkpoint": str(local_run), "limit": 6}
    alone = evaluate(together("alone", evaluation=evaluation, cluster={"num_workers": 0}))
    spread = evaluate(together("spread", evaluation=evaluation, cluster={"num_workers": 2}))
    assert len(predictions(alone.folder)) == 6
    assert predictions(spread.folder) == predictions(alone.folder)
    for key in ("scores", "curve", "protocol"):
        assert spread.results[key] == alone.results[key], key
    files = [(outcome.folder / "submission.json").read_bytes() for outcome in (alone, spread)]
    assert files[0] == files[1]


def test_what_an_actor_refuses_is_the_users_one_line(
    ray_cluster: None, together: Together, local_run: Path, tmp_path: Path
) -> None:
    model, tokenizer = tiny_random(torch.float32)
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(0.5)
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "other")
    evaluation = {"checkpoint": str(local_run), "limit": 2}
    other = together("other", evaluation=evaluation, llama={"model": str(tmp_path / "other")})
    with pytest.raises(UserError, match=r"^llama\.model: .* is not the model that"):
        evaluate(other)


def test_encodings_made_by_ray_data_are_those_of_one_process(
    ray_cluster: None, together: Together, tmp_path: Path
) -> None:
    def made(name: str, workers: int) -> tuple[str, dict[str, Path]]:
        folder = tmp_path / name
        config = together(
            "encode",
            paths={"prompt_cache": str(folder)},
            llama={"prompt_cache": True, "batch_size": 3},
            training={"variants": 1},
            cluster={"num_workers": workers},
        )
        said = cache_prompts(config)
        return said, {str(p.relative_to(folder)): p for p in folder.rglob("*") if p.is_file()}

    said, alone = made("alone", 0)
    said_by_ray, spread = made("spread", 2)
    assert alone.keys() == spread.keys() and len(alone) > 40
    assert f" {len(alone)} encoded now" in said and f" {len(alone)} encoded now" in said_by_ray
    for name, path in alone.items():
        ours, theirs = load_file(path), load_file(spread[name])
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            torch.testing.assert_close(theirs[key], value, rtol=1e-4, atol=1e-5, msg=key)
    written = {name: path.stat().st_mtime_ns for name, path in spread.items()}
    again, same = made("spread", 2)
    assert " 0 encoded now" in again
    assert {name: path.stat().st_mtime_ns for name, path in same.items()} == written
