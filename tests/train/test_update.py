"""One optimizer step: agreement with the published trainer, divergence, updated tensors."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import loader_of, next_batch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.golden import unpack
from hybrid.config import Config, TrainingConfig
from hybrid.context import LocalContext
from hybrid.dataset import Dataset, Stream
from hybrid.train import Result, TrainState, update
from hybrid.train.loader import SlotLoader
from hybrid.train.pretrain import train_step
from hybrid.train.state import create_state
from hybrid.train.update import Diverged
from hybrid.trm import TRM, TRMConfig, upstream

CopyRun = Callable[..., Config]
Train = Callable[[Config], Result]
CPU = LocalContext(torch.device("cpu"))


def test_six_steps_match_the_published_trainer(golden: Path) -> None:
    """Compare golden C with `train_step`: order, loss scale, learning rates and EMA."""
    info = json.loads((golden / "C_train_traj_tiny.json").read_text())
    file = np.load(golden / "C_train_traj_tiny.npz")
    recorded = {name: torch.from_numpy(file[name]) for name in file if file[name].ndim}
    hyper = info["hyper"]
    config = TrainingConfig(
        batch_size=4,
        puzzle_lr=hyper["puzzle_emb_lr"],
        puzzle_weight_decay=hyper["puzzle_emb_weight_decay"],
        **{name: hyper[name] for name in ("lr", "weight_decay", "beta1", "beta2", "ema_rate")},
        **{name: hyper[name] for name in ("lr_warmup_steps", "lr_min_ratio")},
    )
    batches = [
        {k.removeprefix("batch."): v[i] for k, v in recorded.items() if k.startswith("batch.")}
        | {"side": torch.full((4,), 10, dtype=torch.int32)}
        for i in range(6)
    ]
    state = state_of(upstream.load(unpack(file), **info["config"]), config, batches[0])
    for i, batch in enumerate(batches):
        sums = train_step(state, batch, config, hyper["total_steps"], CPU)
        for name, value in sums.items():
            theirs = recorded[f"step.metric.{name}"][i]
            torch.testing.assert_close(value.double(), theirs, rtol=2e-6, atol=1e-12, msg=name)
        assert torch.equal(state.carry.halted, recorded["step.halted"][i].bool())
        table = recorded["step.puzzle_emb_weights"][i]
        torch.testing.assert_close(state.model.puzzle_table, table, rtol=0, atol=5e-6)
    for name, weight in state.model.named_parameters():
        theirs = "model." + upstream.published_name(name)
        torch.testing.assert_close(weight, recorded[f"final.{theirs}"], rtol=0, atol=5e-6)
        ema = state.ema.values[name].flatten()[::4]
        torch.testing.assert_close(ema, recorded[f"ema.{theirs}"], rtol=0, atol=5e-6)


def state_of(model: TRM, config: TrainingConfig, batch: dict[str, Tensor]) -> TrainState:
    slots = range(len(batch["inputs"]))
    return TrainState.create(model, config, slots, model.initial_carry(batch), trained_on=[])


@pytest.mark.parametrize("micro", [None, 3])
def test_a_step_reads_the_device_once(monkeypatch: pytest.MonkeyPatch, micro: int | None) -> None:
    """Run steps on meta tensors, which raise an error when the host reads a value.

    Mixing them with CPU tensors raises one, too. The rows are on two canvases.
    """
    monkeypatch.setattr(update, "read_flag", lambda flag: flag.is_meta)
    monkeypatch.setattr(Tensor, "to", to_anywhere)
    meta = LocalContext(torch.device("meta"))
    sizes = {"hidden_size": 16, "num_heads": 2, "puzzle_emb_ndim": 16, "halt_max_steps": 3}
    trm = TRM(TRMConfig(seq_len=9, num_puzzle_identifiers=5, puzzle_emb_len=1, **sizes))
    tokens = torch.zeros(4, 9, dtype=torch.int32, device="meta")
    rows = torch.zeros(4, dtype=torch.int32, device="meta")
    batch = {"inputs": tokens, "labels": tokens, "puzzle_identifiers": rows, "side": rows}
    config = TrainingConfig(batch_size=4, micro_batch_size=micro)
    state = state_of(trm.to("meta"), config, batch)
    loader = SlotLoader(
        iter(blank_rounds()), 0, state.rows_consumed, torch.zeros(4, dtype=torch.int32)
    )
    for _ in range(2):
        sums = train_step(state, next_batch(loader, state), config, 9, meta)
    assert state.step == 2 and state.carry.halted.is_meta
    assert all(value.is_meta for value in sums.values())
    with pytest.raises(NotImplementedError):
        torch.unique(rows)


def blank_rounds() -> Iterator[dict[str, Any]]:
    tokens = np.ones((4, 9), np.uint8)
    while True:
        yield {
            "inputs": tokens,
            "labels": tokens,
            "puzzle_identifiers": np.zeros(4, np.int32),
            "side": np.array([3, 2, 3, 2], np.uint8),
        }


PLAIN_TO = Tensor.to


def to_anywhere(tensor: Tensor, *args: Any, **keys: Any) -> Tensor:
    """Replace Tensor.to: a meta tensor copied to the CPU without waiting becomes ones."""
    if tensor.is_meta and "cpu" in args:
        assert keys == {"non_blocking": True}, "the host waits for this copy"
        return torch.ones(tensor.shape, dtype=tensor.dtype)
    return PLAIN_TO(tensor, *args, **keys)


@pytest.fixture
def state(base_root: Path, copy_run: CopyRun) -> tuple[TrainState, dict[str, Tensor], Config]:
    """A state before its first step, that step's batch, and the config."""
    config = copy_run("state")
    dataset = Dataset.open(config.data_folder)
    state = create_state(config, dataset, range(6), CPU.device)
    rounds = CPU.rounds(Stream(dataset, 0), range(6), 6, 0)
    return (
        state,
        next_batch(loader_of(state, rounds), state),
        config,
    )


def to_nan(grad: Tensor) -> Tensor:
    return grad * float("nan")


def all_tensors(state: TrainState) -> dict[str, Tensor]:
    found = {f"model.{name}": value for name, value in state.model.state_dict().items()}
    for part in ("m", "v"):
        found |= {f"{part}.{n}": v for n, v in getattr(state.optimizer, part).items()}
    found |= {f"ema.{name}": value for name, value in state.ema.values.items()}
    return {name: value.clone() for name, value in found.items()}


@pytest.mark.parametrize("infinite", ["loss", "gradient", "puzzle gradient"])
def test_diverged_step_changes_nothing(
    state: tuple[TrainState, dict[str, Tensor], Config], infinite: str
) -> None:
    """Make one value not finite: the loss, a weight's gradient or a puzzle row's gradient."""
    before, batch, config = state
    if infinite == "loss":
        with torch.no_grad():
            before.model.lm_head.weight.fill_(1e38)
    elif infinite == "gradient":
        before.model.embed_tokens.register_hook(to_nan)
    else:
        embed = before.model._embed

        def poisoned(current: dict[str, Tensor], rows: Tensor | None) -> tuple[Tensor, Tensor]:
            x, found = embed(current, rows)
            assert found is not None
            found.register_hook(to_nan)
            return x, found

        before.model._embed = poisoned  # type: ignore[method-assign, assignment]
    untouched, carry = all_tensors(before), before.carry
    ids = sorted(set(batch["puzzle_identifiers"].tolist()))
    with pytest.raises(Diverged) as error:
        train_step(before, batch, config.training, 4, CPU)
    assert str(error.value).startswith("step 1: the loss or a gradient is not finite")
    assert str(ids) in str(error.value)
    assert before.step == 0 and before.carry is carry and before.optimizer.t == 0
    for name, value in all_tensors(before).items():
        assert torch.equal(value, untouched[name]), f"{name} has changed"


def test_training_changes_only_trained_weights_and_the_puzzle_rows_used(
    copy_run: CopyRun, train: Train, base_root: Path
) -> None:
    config = copy_run("a", training={"steps": 3})
    folder = train(config).checkpoint
    first = config.run_folder / "checkpoints" / "step_00000001"
    after, before = (load_file(path / "model.safetensors") for path in (folder, first))
    for name, value in after.items():
        assert torch.equal(value, before[name]) == (name in ("H_init", "L_init")), name
    table = load_file(folder / "puzzle_table.safetensors")["puzzle_table"]
    rows_consumed = load_file(folder / "slots_000000_000006.safetensors")["rows_consumed"]
    stream = Stream(Dataset.open(config.data_folder), config.training.seed)
    positions = [6 * k + slot for slot in range(6) for k in range(int(rows_consumed[slot]))]
    seen = set(stream.rows(np.array(positions))["puzzle_identifiers"].tolist())
    assert set(table.any(dim=1).nonzero().flatten().tolist()) == seen
    assert 0 < len(seen) < len(table) - 1, "every row was used"


def test_ema_follows_the_weights_at_its_rate(
    state: tuple[TrainState, dict[str, Tensor], Config],
) -> None:
    trained, batch, config = state
    old = all_tensors(trained)
    train_step(trained, batch, replace(config.training, lr_warmup_steps=0), 4, CPU)
    for name, weight in trained.model.named_parameters():
        expected = 0.9 * old[f"ema.{name}"] + 0.1 * weight.detach()
        torch.testing.assert_close(trained.ema.values[name], expected)
        assert not torch.equal(weight, old[f"model.{name}"]), f"{name} is not trained"
