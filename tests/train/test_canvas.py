"""Training batches with canvases of two sides."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    assert_close,
    change_weights,
    config_of,
    loader_of,
    metrics,
    next_batch,
    randomize_halt_head,
    tensors,
    write_tasks,
)
from safetensors.torch import load_file
from torch import Tensor

from hybrid.arc import Task
from hybrid.config import Config, EvaluationConfig
from hybrid.context import LocalContext
from hybrid.dataset import Dataset, Stream, prepare
from hybrid.errors import UserError
from hybrid.evaluate import predict_rows, predict_tokens
from hybrid.train import pretrain
from hybrid.train.loader import SlotLoader
from hybrid.train.preflight import check, training_stream
from hybrid.train.pretrain import train_step
from hybrid.train.state import TrainState, create_state
from hybrid.train.update import exploration
from hybrid.trm import TRM, act_loss

CPU = LocalContext(torch.device("cpu"))
TRAINED = ("0d3d703e", "74dd1130", "29c11459", "10fcaaa3")
"""Sides 3, 3, 11 and, with the answer, 12: half of the tasks on each canvas."""
EVALUATED = ("25ff71a9", "0962bcdd")
SECTIONS = ("trm", "training")
EXACT = {"forward_dtype": "float64", "halt_exploration_prob": 0.3}
STEPS = 12


def config_on(root: Path, canvas: str, run: str, **sections: dict[str, Any]) -> Config:
    fixed: dict[str, dict[str, Any]] = {
        "data": {"max_side": 12, "variants": 2, "canvas": canvas},
        "paths": {"data": str(root / canvas)},
        "logging": {"run": run},
    }
    merged = {s: fixed.get(s, {}) | sections.get(s, {}) for s in fixed | sections}
    return config_of(root, **merged)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, arc1: dict[str, Task]) -> Path:
    """Root with both datasets and, on bucketed canvases, the run `base`: one step taken."""
    root = tmp_path_factory.mktemp("canvas")
    write_tasks(root / "training", [arc1[task] for task in TRAINED])
    write_tasks(root / "evaluation", [arc1[task] for task in EVALUATED])
    for canvas in ("full", "bucketed"):
        prepare(config_on(root, canvas, "none").data, root / canvas, lambda line: None)
    base = config_on(root, "bucketed", "base", training={"steps": 1})
    change_weights(pretrain(base, CPU).checkpoint, randomize_halt_head)
    return root


@pytest.fixture
def copy_run(root: Path, request: pytest.FixtureRequest) -> Callable[..., Config]:
    """copy_run(name, section={key: value}) -> config of a copy of `base`, to be resumed."""

    def copy(name: str, canvas: str = "bucketed", **sections: dict[str, Any]) -> Config:
        config = config_on(root, canvas, f"{request.node.name}-{name}", **sections)
        shutil.copytree(root / "runs" / "base", config.run_folder)
        return config

    return copy


def state_of(config: Config, dataset: Dataset) -> tuple[TrainState, SlotLoader]:
    """A state whose rows halt at different times, and its loader."""
    state = create_state(config, dataset, range(config.training.batch_size), CPU.device)
    with torch.no_grad():
        randomize_halt_head(state.trm.state_dict())
        state.trm.puzzle_table.normal_(generator=torch.Generator().manual_seed(5))
    stream = training_stream(config, dataset)
    rounds = CPU.rounds(stream, state.slots, config.training.batch_size, 0)
    return state, loader_of(state, rounds)


class Alone:
    """Reference: every slot computed separately, on its own canvas and with its own states."""

    def __init__(self, model: TRM, config: Config, slots: int) -> None:
        self.config = config
        self.model = TRM(model.config)
        self.states: list[tuple[Tensor, Tensor, int] | None] = [None] * slots
        """z_H, z_L and steps taken by the row; None if the slot has halted."""

    def step(self, model: TRM, batch: dict[str, Tensor], number: int) -> dict[str, Any]:
        self.model.load_state_dict(model.state_dict())
        self.model.train().zero_grad()
        draws = exploration(self.config.training.seed, number, len(self.states), range(6))
        result: dict[str, Any] = {"rows": [], "loss": 0.0, "halted": []}
        for n, state in enumerate(self.states):
            cells = int(batch["side"][n]) ** 2
            row = {name: batch[name][n : n + 1, :cells] for name in ("inputs", "labels")} | {
                "puzzle_identifiers": batch["puzzle_identifiers"][n : n + 1]
            }
            z_H, z_L, taken = state or (*self.model.fresh_states(row["inputs"]), 0)
            z_H, z_L, outputs = self.model.recurse(row, z_H, z_L)
            steps = torch.tensor([taken + 1], dtype=torch.int32)
            halted = self.model._halt(
                steps, outputs.q_halt, (draws[0, n : n + 1], draws[1, n : n + 1])
            )
            loss, _ = act_loss(outputs.logits, outputs.q_halt, row["labels"], steps, halted)
            (loss / len(self.states)).backward()
            assert outputs.puzzle_rows is not None
            result["rows"].append(outputs.puzzle_rows.grad)
            result["loss"] += float(loss.detach())
            result["halted"].append(bool(halted))
            self.states[n] = None if halted else (z_H.detach(), z_L.detach(), taken + 1)
            result[n] = (z_H.detach()[0], z_L.detach()[0])
        return result


@pytest.mark.parametrize("positions", ["rope", "learned"])
def test_mixed_canvas_steps_match_slots_computed_separately(
    root: Path, positions: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compare gradients, puzzle row gradients, loss, halting and carry at every step."""
    config = config_on(root, "bucketed", "none", trm=EXACT | {"pos_encodings": positions})
    state, loader = state_of(config, Dataset.open(root / "bucketed"))
    puzzle_grads: list[Tensor] = []

    def record(table: Tensor, ids: Tensor, grads: Tensor, **keys: float) -> None:
        puzzle_grads.append(grads.clone())

    monkeypatch.setattr("hybrid.train.update.sign_sgd_", record)
    alone = Alone(state.trm, config, 6)
    mixed, transitions, uneven = 0, set(), 0
    before = torch.zeros(6, dtype=torch.int32)
    for number in range(1, STEPS + 1):
        batch = next_batch(loader, state)
        sides = batch["side"]
        mixed += len(set(sides.tolist())) == 2
        transitions |= {
            pair for pair in zip(before.tolist(), sides.tolist(), strict=True) if 0 not in pair
        }
        before = sides.clone()
        expected = alone.step(state.trm, batch, number)
        sums = train_step(state, batch, config.training, 100, CPU)
        for name, weight in state.trm.named_parameters():
            theirs = alone.model.get_parameter(name).grad
            torch.testing.assert_close(weight.grad, theirs, rtol=1e-5, atol=5e-8, msg=name)
        torch.testing.assert_close(
            puzzle_grads[-1], torch.cat(expected["rows"]), rtol=1e-5, atol=1e-9
        )
        loss = float(sums["lm_loss"] + 0.5 * sums["q_halt_loss"])
        assert loss == pytest.approx(expected["loss"], rel=1e-6)
        assert state.carry.halted.tolist() == expected["halted"]
        uneven += 0 < sum(expected["halted"]) < 6
        for n, side in enumerate(sides.tolist()):
            for z, theirs in zip(
                (state.carry.z_H[n], state.carry.z_L[n]), expected[n], strict=True
            ):
                torch.testing.assert_close(z[: len(theirs)], theirs, rtol=1e-9, atol=1e-9)
                assert len(theirs) == 1 + side**2 and not z[len(theirs) :].any()
            for name in ("inputs", "labels"):
                kept = state.carry.current[name][n]
                assert torch.equal(kept[: side**2], batch[name][n, : side**2].to(kept))
                assert not kept[side**2 :].any(), name
        assert torch.equal(state.carry.current["side"], sides)
    assert mixed > STEPS // 2 and uneven > 3, "the rows are too similar for this test"
    assert transitions == {(11, 11), (11, 12), (12, 11), (12, 12)}, "no slot changed its canvas"


@pytest.mark.parametrize("canvas", ["full", "bucketed"])
@pytest.mark.parametrize("micro", [1, 2, 4])
def test_micro_batches_match_the_full_batch(root: Path, canvas: str, micro: int) -> None:
    """Compare gradients, metric sums, table, weights and carry over steps with partial halting.

    The forward pass is float64, so that rounding does not change when a row halts.
    """
    config = config_on(root, canvas, "none", trm=EXACT)
    divided = replace(config.training, micro_batch_size=micro)
    dataset = Dataset.open(root / canvas)
    (one, loader), (other, other_loader) = (state_of(config, dataset) for _ in range(2))
    halted = set()
    for _ in range(6):
        sums = train_step(one, next_batch(loader, one), config.training, 100, CPU)
        parts = train_step(other, next_batch(other_loader, other), divided, 100, CPU)
        for name, value in sums.items():
            torch.testing.assert_close(parts[name], value, rtol=1e-6, atol=1e-9, msg=name)
        for name, weight in one.trm.named_parameters():
            found = other.trm.get_parameter(name)
            torch.testing.assert_close(found.grad, weight.grad, rtol=1e-5, atol=5e-8, msg=name)
            found.data.copy_(weight)  # AdamAtan2's sign-like steps amplify rounding
        assert torch.equal(other.trm.puzzle_table, one.trm.puzzle_table)
        for name, value in one.carry.to_tensors().items():
            torch.testing.assert_close(other.carry.to_tensors()[name], value, rtol=1e-9, atol=1e-9)
        assert torch.equal(one.halted, other.halted)
        halted |= set(one.halted.tolist())
    assert halted == {True, False}, "all rows halted in the same steps"


def test_tokens_and_states_outside_the_canvas_are_ignored(root: Path) -> None:
    """Garbage outside the canvas, in rows or in the carry, changes no weight or metric."""
    config = config_on(root, "bucketed", "none", trm=EXACT)
    results = []
    for garbage in (0, 7):
        state, loader = state_of(config, Dataset.open(root / "bucketed"))
        for _ in range(4):
            batch = {name: value.clone() for name, value in next_batch(loader, state).items()}
            for n, side in enumerate(batch["side"].tolist()):
                batch["inputs"][n, side**2 :] = garbage
                batch["labels"][n, side**2 :] = garbage
                state.carry.z_H[n, 1 + side**2 :] = garbage
                state.carry.z_L[n, 1 + side**2 :] = garbage
            sums = train_step(state, batch, config.training, 100, CPU)
        values = {k: float(v) for k, v in sums.items()}
        results.append((values, dict(state.trm.named_parameters())))
    assert results[0][0] == results[1][0]
    for name, weight in results[0][1].items():
        assert torch.equal(weight, results[1][1][name]), name


def test_bucketed_matches_full_when_all_tasks_are_large(
    tmp_path: Path, arc1: dict[str, Task]
) -> None:
    """The checkpoints are equal bit for bit."""
    write_tasks(tmp_path / "training", [arc1[task] for task in TRAINED[2:]])
    write_tasks(tmp_path / "evaluation", [arc1[EVALUATED[1]]])
    folders = []
    for canvas in ("full", "bucketed"):
        config = config_on(tmp_path, canvas, canvas)
        prepare(config.data, config.data_folder, lambda line: None)
        folders.append(pretrain(config, CPU).checkpoint)
    assert_close(*folders, rtol=0, atol=0)


def folder(config: Config, step: int) -> Path:
    return config.run_folder / "checkpoints" / f"step_{step:08d}"


def test_resumed_run_matches_uninterrupted_run(
    copy_run: Callable[..., Config],
) -> None:
    """Resume from the first checkpoint with unfinished rows on both canvases."""
    sections = {"training": {"steps": 12, "save_every": 1}}
    whole, again = (copy_run(name, **sections) for name in ("whole", "again"))
    pretrain(whole, CPU)
    middle = next(
        step for step in range(2, 11) if unfinished_sides(folder(whole, step)) == {11, 12}
    )
    shutil.rmtree(again.run_folder)
    shutil.copytree(whole.run_folder, again.run_folder)
    for step in range(middle + 1, 13):
        shutil.rmtree(folder(again, step))
    pretrain(again, CPU)
    for step in range(middle + 1, 13):
        assert_close(folder(whole, step), folder(again, step), rtol=0, atol=0)
    assert metrics(again.run_folder) == metrics(whole.run_folder)


def unfinished_sides(checkpoint: Path) -> set[int]:
    """Return the canvas sides of rows that have not halted."""
    slots = tensors(checkpoint)
    return set(slots["current.side"][~slots["halted"]].tolist())


def test_two_workers_match_one_worker(
    copy_run: Callable[..., Config], train_on_two: Callable[..., None]
) -> None:
    """The workers have slots on different canvases at different times."""
    training = {"steps": 8, "save_every": 1}
    one, two = (copy_run(name, training=training) for name in ("one", "two"))
    pretrain(one, CPU)
    train_on_two(two)
    assert len(list(folder(two, 8).glob("slots_*"))) == 2
    assert {11, 12} in [unfinished_sides(folder(one, step)) for step in range(2, 8)]
    for step in range(2, 9):
        assert_close(folder(one, step), folder(two, step))


def test_predict_rows_uses_the_canvas_of_each_row(root: Path) -> None:
    config = config_on(root, "bucketed", "none", trm=EXACT)
    dataset = Dataset.open(root / "bucketed")
    state, _ = state_of(config, dataset)
    with torch.no_grad():  # a new model predicts the same token everywhere
        state.trm.lm_head.weight.normal_(generator=torch.Generator().manual_seed(8))
    rows = Stream(dataset, 0).original_pairs(10**6)
    predicted = predict_rows(state.trm, rows, batch_size=4)
    assert set(rows["side"].tolist()) == {11, 12}
    state.trm.eval()
    varied = 0
    for n, side in enumerate(rows["side"].tolist()):
        puzzle_rows = state.trm.puzzle_table[[int(rows["puzzle_identifiers"][n])]]
        inputs = np.asarray(rows["inputs"][n : n + 1, : side**2], np.uint8)
        [tokens], _, _ = predict_tokens(state.trm, inputs, puzzle_rows, EvaluationConfig())
        assert np.array_equal(predicted[n, : side**2], tokens)
        assert not predicted[n, side**2 :].any()
        varied += len(set(tokens.tolist())) > 1
    assert varied > len(predicted) // 2


@pytest.mark.parametrize(("old_mode", "new_mode"), [("bucketed", "full"), ("full", "bucketed")])
def test_resuming_with_another_canvas_mode_is_rejected(
    root: Path, old_mode: str, new_mode: str
) -> None:
    """Both the check before the run and the run itself raise a one-line error."""
    run = f"base-{old_mode}"
    pretrain(config_on(root, old_mode, run, training={"steps": 1}), CPU)
    config = config_on(root, new_mode, run, training={"steps": 2})
    for call in (lambda: check(config, "trm", SECTIONS), lambda: pretrain(config, CPU)):
        with pytest.raises(UserError, match=f"data.canvas={old_mode}.*{new_mode}") as error:
            call()
        assert "\n" not in str(error.value) and run in str(error.value)
    check(config_on(root, old_mode, run, training={"steps": 2}), "trm", SECTIONS)


@pytest.fixture
def undeclared(root: Path, request: pytest.FixtureRequest) -> Iterator[Config]:
    """A run on the bucketed dataset (paths.data) whose config has data.canvas=full."""
    name = request.node.name
    config = config_on(root, "full", name, paths={"data": str(root / "bucketed")})
    config = replace(config, training=replace(config.training, steps=1))
    pretrain(config, CPU)
    yield replace(config, training=replace(config.training, steps=2))


def test_data_canvas_must_match_the_dataset(undeclared: Config) -> None:
    with pytest.raises(UserError, match=r"data\.canvas is 'bucketed' there, 'full' here"):
        check(undeclared, "trm", SECTIONS)
    check(replace(undeclared, data=replace(undeclared.data, canvas="bucketed")), "trm", SECTIONS)


def test_resuming_on_another_canvas_dataset_is_rejected(undeclared: Config, root: Path) -> None:
    full = replace(undeclared, paths=replace(undeclared.paths, data=str(root / "full")))
    with pytest.raises(UserError, match=r"holds a run with data\.canvas=bucketed"):
        check(full, "trm", SECTIONS)


@pytest.mark.parametrize(("canvas", "rejected"), [("bucketed", True), ("full", False)])
def test_mlp_t_needs_the_full_canvas(root: Path, canvas: str, rejected: bool) -> None:
    config = config_on(root, canvas, "mixing", trm={"mlp_t": True})
    if not rejected:
        check(config, "trm", SECTIONS)
        return
    with pytest.raises(UserError, match=r"^trm\.mlp_t: .*data\.canvas=full") as error:
        check(config, "trm", SECTIONS)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("canvas", ["full", "bucketed"])
def test_init_from_loads_weights_and_table_across_canvas_modes(
    root: Path, canvas: str, caplog: pytest.LogCaptureFixture
) -> None:
    other = {"full": "bucketed", "bucketed": "full"}[canvas]
    first = pretrain(config_on(root, other, f"first-{other}"), CPU).checkpoint
    config = config_on(root, canvas, f"then-{canvas}", trm={"init_from": f"first-{other}"})
    check(config, "trm", SECTIONS)
    trm = create_state(config, Dataset.open(root / canvas), range(6), CPU.device).trm
    table = load_file(first / "puzzle_table.safetensors")["puzzle_table"]
    assert torch.equal(trm.puzzle_table, table) and table.any()
    ema = load_file(first / "ema.safetensors")
    for name, weight in trm.named_parameters():
        assert torch.equal(weight, ema[name]), name
    assert "another dataset" not in caplog.text
    config = replace(config, training=replace(config.training, steps=1))
    assert pretrain(config, CPU).step == 1
