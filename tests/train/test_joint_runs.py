"""Joint runs: resuming, two workers, init_from, and rejected configs."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    ClippedAdamW,
    assert_close,
    change_weights,
    config_of,
    hybrid_of,
    metrics,
    tensors,
)
from torch import Tensor

from hybrid import launch
from hybrid.checkpoint import newest, read
from hybrid.config import Config
from hybrid.context import LocalContext
from hybrid.dataset import Dataset, prepare
from hybrid.errors import UserError
from hybrid.llm.backbone import Backbone
from hybrid.llm.tiny import tiny_random
from hybrid.train import Diverged, Joint, Result, joint, pretrain
from hybrid.train.loop import train as train_loop
from hybrid.train.state import create_state, initial_checkpoint, trained_on

HybridConfig = Callable[..., Config]
CPU = LocalContext(torch.device("cpu"))
EXACT = {"trm": {"forward_dtype": "float64"}, "llama": {"dtype": "float64"}}
"""Keeps rounding errors small, which a scale-free optimizer would turn into full steps."""


def folder(config: Config, step: int) -> Path:
    return config.run_folder / "checkpoints" / f"step_{step:08d}"


def losses(config: Config) -> list[dict[str, Any]]:
    return [line for line in metrics(config.run_folder) if "loss" in line]


def test_resumed_run_matches_uninterrupted_run(
    hybrid_config: HybridConfig, start: Callable[..., BaseProcess]
) -> None:
    """Use every random draw, and batches whose rows stop after different attempts."""
    training = {
        "save_every": 2,
        "blank_puzzle_prob": 0.5,
        "clip_norm": 1.0,
        "freeze_weights_fraction": 0.3,
    }
    sections = {"trm": {"halt_exploration_prob": 0.5}, "training": training}
    whole, halves = (hybrid_config(name, **sections) for name in ("whole", "halves"))
    joint(whole, CPU)
    shutil.copytree(whole.run_folder, halves.run_folder)
    shutil.rmtree(folder(halves, 4))
    process = start(joint, halves, CPU)
    process.join()
    assert process.exitcode == 0
    assert_close(folder(whole, 4), folder(halves, 4), 0, 0)
    assert metrics(halves.run_folder) == metrics(whole.run_folder)
    assert any(line["steps"] % 1 for line in losses(whole)), "all rows stopped at the same attempt"
    assert [m["step"] for m in metrics(whole.run_folder) if "loss" not in m] == [0, 4]


@pytest.mark.parametrize("adamw", [False, True])
def test_two_workers_match_one_worker(
    hybrid_config: HybridConfig,
    train_on_two: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    adamw: bool,
) -> None:
    """Clipped AdamW depends on the gradient scale, unlike Adam-atan2 and sign-SGD."""
    rate = {"adapter": {"lr": 1e-4}, "training": {"save_every": 1, "blank_puzzle_prob": 0.3}}
    sections = {**EXACT, **rate, "feedback": {"history": 2}}
    one, two = (hybrid_config(name, **sections) for name in ("one", "two"))
    train_on_two(two, joint, adamw)
    if adamw:
        monkeypatch.setattr("hybrid.train.state.AdamAtan2", ClippedAdamW)
    joint(one, CPU)
    for step in (1, 2, 4):
        assert_close(folder(one, step), folder(two, step), atol=1e-6)
    for ours, theirs in zip(metrics(one.run_folder), metrics(two.run_folder), strict=True):
        # The variance is computed per worker.
        ours.pop("latent_variance", None), theirs.pop("latent_variance", None)
        assert ours == pytest.approx(theirs, rel=1e-5)
    if adamw:
        grads = [g.norm() for n, g in tensors(folder(one, 4)).items() if "optimizer.m." in n]
        assert torch.stack(grads).norm() > 0.05, "gradients too small to tell"


def test_training_from_the_prompt_cache_matches_and_prefills_nothing(
    hybrid_config: HybridConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    sections: dict[str, dict[str, Any]] = {**EXACT, "adapter": {"lr": 1e-4}}
    sections["training"] = {"steps": 3, "variants": 1}
    now = hybrid_config("now", **sections)
    sections["llama"] = {**EXACT["llama"], "prompt_cache": True}
    before = hybrid_config("before", **sections)
    summary = launch.cache_prompts(replace(before, cluster=replace(before.cluster, num_workers=0)))
    torch.set_num_threads(1)
    assert " 0 added to the cache" not in summary
    joint(now, CPU)
    monkeypatch.setattr(Backbone, "_prefill", None)  # a call would raise
    joint(before, CPU)
    assert_close(folder(now, 3), folder(before, 3), atol=1e-6)
    again = launch.cache_prompts(replace(before, cluster=replace(before.cluster, num_workers=0)))
    assert " 0 added to the cache" in again


@pytest.fixture
def other(base_root: Path, tmp_path: Path) -> dict[str, Any]:
    """Paths of another dataset with the same tasks."""
    config = config_of(base_root, data={"seed": 1}, paths={"data": str(tmp_path / "other")})
    prepare(config.data, config.data_folder, lambda line: None)
    return {"data": str(tmp_path / "other")}


def initial_tensors(config: Config) -> dict[str, Tensor]:
    """Return the TRM's tensors before the first step."""
    dataset = Dataset.open(config.data_folder)
    return dict(create_state(config, dataset, range(6), CPU.device).trm.state_dict())


def test_init_from_loads_ema_weights_and_puzzle_table(
    hybrid_config: HybridConfig, base_root: Path, other: dict[str, Any]
) -> None:
    found = newest(base_root / "runs/base/checkpoints")
    assert found is not None
    model, ema, table = (found.tensors(n) for n in ("model", "ema", "puzzle_table"))
    assert not torch.equal(model["embed_tokens"], ema["embed_tokens"])
    new = initial_tensors(hybrid_config("a"))
    by_path = initial_tensors(hybrid_config("b", trm={"init_from": str(found.folder)}))
    elsewhere = initial_tensors(hybrid_config("c", paths=other, data={"seed": 1}))
    for name, value in (model | ema).items():
        for state in (new, by_path, elsewhere):
            assert torch.equal(state[name], value), name
    for state in (new, by_path):
        assert torch.equal(state["puzzle_table"], table["puzzle_table"])
    mean = table["puzzle_table"][1:].mean(0)
    assert mean.abs().sum() > 0
    for row in elsewhere["puzzle_table"]:
        assert torch.equal(row, mean)


def test_init_from_without_a_slash_is_a_run_not_a_folder(
    hybrid_config: HybridConfig, base_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run named like a folder of the working directory, e.g. `docs`, must be found."""
    (base_root / "base").mkdir()
    monkeypatch.chdir(base_root)
    config = hybrid_config("a", trm={"init_from": "base"})
    found = initial_checkpoint(config)
    assert found is not None and found.folder.parents[1] == base_root / "runs/base"
    with pytest.raises(UserError, match=f"{base_root / 'base'}: no checkpoint here"):
        initial_checkpoint(hybrid_config("a", trm={"init_from": "./base"}))


def test_trained_on_includes_the_pairs_of_init_from(
    hybrid_config: HybridConfig, base_root: Path, other: dict[str, Any]
) -> None:
    """Held-out demonstrations and the contamination statement of reports depend on it."""
    known = newest(base_root / "runs/base/checkpoints").trained_on
    fewer = {"data": str(Path(other["data"]).parent / "fewer")}
    data = {"evaluation": []}
    config = hybrid_config("fewer", paths=fewer, data=data, training={"steps": 1})
    prepare(config.data, config.data_folder, lambda line: None)
    assert set(trained_on(Dataset.open(config.data_folder))) < set(known)
    assert read(joint(config, CPU).checkpoint).trained_on == known
    longer = replace(config, training=replace(config.training, steps=2))
    assert read(joint(longer, CPU).checkpoint).trained_on == known
    later = hybrid_config("later", trm={"init_from": config.logging.run}, paths=fewer, data=data)
    assert read(joint(later, CPU).checkpoint).trained_on == known


def test_check_resolves_init_from_to_one_checkpoint(
    hybrid_config: HybridConfig, base_root: Path
) -> None:
    """Workers that resolve a run's name could find different checkpoints while it trains."""
    config = launch.check(hybrid_config("a"), "hybrid", launch.Joint.sections)
    assert config.trm.init_from == str(newest(base_root / "runs/base/checkpoints").folder)


def test_resume_accepts_a_moved_frozen_model(hybrid_config: HybridConfig, tmp_path: Path) -> None:
    model, tokenizer = tiny_random(torch.float32)
    for folder in ("one", "two"):
        model.save_pretrained(tmp_path / folder)
        tokenizer.save_pretrained(tmp_path / folder)
    first = hybrid_config("a", llama={"model": str(tmp_path / "one")}, training={"steps": 1})
    joint(first, CPU)
    moved = hybrid_config("a", llama={"model": str(tmp_path / "two")}, training={"steps": 2})
    assert joint(moved, CPU).step == 2
    with torch.no_grad():
        model.model.embed_tokens.weight.add_(1)
    model.save_pretrained(tmp_path / "two")
    longer = replace(moved, training=replace(moved.training, steps=3))
    with pytest.raises(UserError, match=r"llama\.model: .* is not the model that"):
        joint(longer, CPU)


def test_init_from_a_hybrid_loads_its_trm(hybrid_config: HybridConfig) -> None:
    first = hybrid_config("first", training={"steps": 2})
    ema = read(joint(first, CPU).checkpoint).tensors("ema")
    state = initial_tensors(hybrid_config("second", trm={"init_from": first.logging.run}))
    for name, value in ema.items():
        if name.startswith("trm."):
            assert torch.equal(state[name.removeprefix("trm.")], value), name


@pytest.mark.parametrize("loop", [pretrain, joint])
@pytest.mark.parametrize(
    ("trm", "expected"),
    [
        ({"hidden_size": 16, "puzzle_emb_ndim": 16}, "trm.hidden_size 32 there, 16 here"),
        ({"L_cycles": 2}, "trm.L_cycles 1 there, 2 here"),
        ({"puzzle_emb_ndim": 0}, "trm.puzzle_emb_ndim 32 there, 0 here"),
        ({"init_from": "basse"}, "trm.init_from: basse is no run with a checkpoint in"),
    ],
)
def test_unusable_init_from_is_rejected_before_anything_is_written(
    hybrid_config: HybridConfig,
    loop: Any,
    trm: dict[str, Any],
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The case puzzle_emb_ndim=0 would silently drop the puzzle embeddings."""
    many = {"training": {"batch_size": 1000}, "cluster": {"num_workers": 1000}}
    monkeypatch.setattr("hybrid.cluster.trainer.fit", None)  # called, it would raise
    config = hybrid_config("a", trm=trm, **many)
    with pytest.raises(UserError, match=r"trm\.init_from") as error:
        getattr(launch, loop.__name__)(config)
    assert expected in str(error.value)
    assert not config.run_folder.exists()


def test_resume_works_after_init_from_was_deleted(
    hybrid_config: HybridConfig, base_root: Path
) -> None:
    shutil.copytree(base_root / "runs/base", base_root / "runs/deleted")
    config = hybrid_config("a", trm={"init_from": "deleted"}, training={"steps": 1})
    whole = hybrid_config("whole", training={"steps": 2})
    joint(config, CPU)
    joint(whole, CPU)
    shutil.rmtree(base_root / "runs/deleted")
    longer = replace(config, training=replace(config.training, steps=2))
    assert_close(folder(whole, 2), joint(longer, CPU).checkpoint, 0, 0)


@pytest.mark.parametrize("kind", ["trm", "hybrid"])
def test_frozen_weights_stay_equal_while_puzzle_rows_train(
    hybrid_config: HybridConfig, kind: str
) -> None:
    training = {"steps": 8, "save_every": 1, "freeze_weights_fraction": 0.25, "lr_warmup_steps": 0}
    config = hybrid_config("a", training=training)
    loop: Callable[..., Result] = joint if kind == "hybrid" else pretrain
    loop(config, CPU)
    new = initial_tensors(config)

    def weights(step: int, name: str = "model") -> dict[str, Tensor]:
        found = read(folder(config, step)).tensors(name)
        return {key.removeprefix("trm."): value for key, value in found.items()}

    for step in (1, 2):
        for name, value in weights(step).items():
            before = new.get(name, weights(1)[name])
            assert torch.equal(value, before), f"{name} changed in step {step}"
            if name in weights(step, "ema"):
                assert torch.equal(weights(step, "ema")[name], before), name
    tables = [new, *(weights(step, "puzzle_table") for step in (1, 2, 3))]
    for earlier, later in pairwise(tables):
        assert not torch.equal(earlier["puzzle_table"], later["puzzle_table"])
    unchanged = {n for n, v in weights(3).items() if torch.equal(v, weights(2)[n])}
    assert not {name for name in unchanged & weights(3, "ema").keys() if name in new}


@pytest.mark.parametrize("source", ["vote", "demos"])
def test_evaluation_only_feedback_is_rejected_in_training(
    hybrid_config: HybridConfig, source: str
) -> None:
    config = hybrid_config("a", feedback={"source": source})
    with pytest.raises(UserError, match=rf"feedback\.source={source} is for evaluation"):
        launch.joint(config)
    assert not config.run_folder.exists()


def test_resuming_a_run_of_the_other_kind_is_rejected(
    hybrid_config: HybridConfig, base_root: Path
) -> None:
    hybrid = hybrid_config("a", training={"steps": 1})
    joint(hybrid, CPU)
    trm = hybrid_of(base_root, logging={"run": "base"})
    for loop, config, expected in (
        (launch.joint, trm, "holds a run of kind trm, not hybrid"),
        (launch.pretrain, hybrid, "holds a run of kind hybrid, not trm"),
    ):
        with pytest.raises(UserError, match=expected):
            loop(config)


def test_resuming_with_another_reader_config_is_rejected(hybrid_config: HybridConfig) -> None:
    config = hybrid_config("a", training={"steps": 1})
    joint(config, CPU)
    for section, change in (
        ("llama", {"max_prompt_tokens": 99}),
        ("adapter", {"lr": 0.5}),
        ("feedback", {"source": "none"}),
    ):
        other = replace(config, **{section: replace(getattr(config, section), **change)})
        [name] = change
        with pytest.raises(UserError, match=rf"holds a run of another config \({section}\.{name}"):
            launch.joint(other)


def test_resuming_with_other_llm_weights_is_rejected(
    hybrid_config: HybridConfig, tmp_path: Path
) -> None:
    model, tokenizer = tiny_random(torch.float32)
    tokenizer.save_pretrained(tmp_path / "model")
    model.save_pretrained(tmp_path / "model")
    config = hybrid_config("a", llama={"model": str(tmp_path / "model")}, training={"steps": 1})
    joint(config, CPU)
    longer = replace(config, training=replace(config.training, steps=2))
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(0.5)
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match=r"llama\.model: .* is not the model that .* trained with"):
        joint(longer, CPU)
    assert not folder(config, 2).exists()


def test_diverged_step_changes_nothing(hybrid_config: HybridConfig) -> None:
    config = hybrid_config("a", training={"steps": 1})
    good = joint(config, CPU).checkpoint

    def blow_up(found: dict[str, Tensor]) -> None:
        found["trm.lm_head.weight"].fill_(1e38)

    change_weights(good, blow_up)
    made: list[Joint] = []

    def make(*args: Any) -> Joint:
        made.append(Joint(*args))
        return made[0]

    longer = replace(config, training=replace(config.training, steps=2))
    with pytest.raises(Diverged, match=rf"step 2: .* last good checkpoint: {good}"):
        train_loop(longer, CPU, make)
    saved = read(good).tensors("model") | read(good).tensors("puzzle_table")
    state = made[0].state
    assert state.step == 1
    for name, value in state.model.state_dict().items():
        before = saved["puzzle_table" if name == "trm.puzzle_table" else name]
        assert torch.equal(value, before), name
    for name, value in read(good).tensors("ema").items():
        assert torch.equal(state.ema.values[name], value), name
    for name, value in read(good).tensors("optimizer").items():
        which, _, key = name.partition(".")
        assert torch.equal(getattr(state.optimizer, which)[key], value), name
