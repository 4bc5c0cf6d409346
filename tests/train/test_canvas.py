"""Rows on canvases of two sides share a batch, and each is trained as if it were alone."""

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
    """A root with both datasets and, on bucketed canvases, the run `begun`: one step taken."""
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
    """copy_run(name, section={key: value}) -> the config of a copy of `begun`, to be resumed."""

    def copy(name: str, canvas: str = "bucketed", **sections: dict[str, Any]) -> Config:
        config = config_on(root, canvas, f"{request.node.name}-{name}", **sections)
        shutil.copytree(root / "runs" / "base", config.run_folder)
        return config

    return copy


def state_of(config: Config, dataset: Dataset) -> tuple[TrainState, SlotLoader]:
    """A state whose rows halt when they like, and what it is fed."""
    state = create_state(config, dataset, range(config.training.batch_size), CPU.device)
    with torch.no_grad():
        randomize_halt_head(state.trm.state_dict())
        state.trm.puzzle_table.normal_(generator=torch.Generator().manual_seed(5))
    stream = training_stream(config, dataset)
    rounds = CPU.rounds(stream, state.slots, config.training.batch_size, 0)
    return state, loader_of(state, rounds)


class Alone:
    """Every slot by itself: a canvas of its own, states of its own, the loss of one row."""

    def __init__(self, model: TRM, config: Config, slots: int) -> None:
        self.config = config
        self.model = TRM(model.config)
        self.states: list[tuple[Tensor, Tensor, int] | None] = [None] * slots
        """z_H, z_L and the steps that the row has had; None for a slot that has halted."""

    def step(self, model: TRM, batch: dict[str, Tensor], number: int) -> dict[str, Any]:
        self.model.load_state_dict(model.state_dict())
        self.model.train().zero_grad()
        draws = exploration(self.config.training.seed, number, len(self.states), range(6))
        found: dict[str, Any] = {"rows": [], "loss": 0.0, "halted": []}
        for n, state in enumerate(self.states):
            cells = int(batch["side"][n]) ** 2
            row = {name: batch[name][n : n + 1, :cells] for name in ("inputs", "labels")} | {
                "puzzle_identifiers": batch["puzzle_identifiers"][n : n + 1]
            }
            z_H, z_L, had = state or (*self.model.fresh_states(row["inputs"]), 0)
            z_H, z_L, outputs = self.model.recurse(row, z_H, z_L)
            steps = torch.tensor([had + 1], dtype=torch.int32)
            halted = self.model._halt(
                steps, outputs.q_halt, (draws[0, n : n + 1], draws[1, n : n + 1])
            )
            loss, _ = act_loss(outputs.logits, outputs.q_halt, row["labels"], steps, halted)
            (loss / len(self.states)).backward()
            assert outputs.puzzle_rows is not None
            found["rows"].append(outputs.puzzle_rows.grad)
            found["loss"] += float(loss.detach())
            found["halted"].append(bool(halted))
            self.states[n] = None if halted else (z_H.detach(), z_L.detach(), had + 1)
            found[n] = (z_H.detach()[0], z_L.detach()[0])
        return found


@pytest.mark.parametrize("positions", ["rope", "learned"])
def test_twelve_steps_on_mixed_canvases_are_those_of_every_slot_alone(
    root: Path, positions: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients, puzzle rows' gradients, loss, halting and carry, at every step."""
    config = config_on(root, "bucketed", "none", trm=EXACT | {"pos_encodings": positions})
    state, loader = state_of(config, Dataset.open(root / "bucketed"))
    given: list[Tensor] = []

    def spy(table: Tensor, ids: Tensor, grads: Tensor, **keys: float) -> None:
        given.append(grads.clone())

    monkeypatch.setattr("hybrid.train.update.sign_sgd_", spy)
    alone = Alone(state.trm, config, 6)
    mixed, turned, uneven = 0, set(), 0
    before = torch.zeros(6, dtype=torch.int32)
    for number in range(1, STEPS + 1):
        batch = next_batch(loader, state)
        sides = batch["side"]
        mixed += len(set(sides.tolist())) == 2
        turned |= {
            pair for pair in zip(before.tolist(), sides.tolist(), strict=True) if 0 not in pair
        }
        before = sides.clone()
        expected = alone.step(state.trm, batch, number)
        sums = train_step(state, batch, config.training, 100, CPU)
        for name, weight in state.trm.named_parameters():
            theirs = alone.model.get_parameter(name).grad
            torch.testing.assert_close(weight.grad, theirs, rtol=1e-5, atol=5e-8, msg=name)
        torch.testing.assert_close(given[-1], torch.cat(expected["rows"]), rtol=1e-5, atol=1e-9)
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
    assert mixed > STEPS // 2 and uneven > 3, "the rows were all alike: nothing was tried"
    assert turned == {(11, 11), (11, 12), (12, 11), (12, 12)}, "no slot changed its canvas"


@pytest.mark.parametrize("canvas", ["full", "bucketed"])
@pytest.mark.parametrize("micro", [1, 2, 4])
def test_micro_batches_add_up_to_the_undivided_step(root: Path, canvas: str, micro: int) -> None:
    """Gradients, sums for metrics, table, weights and carry, over steps whose rows halt apart.

    The forward pass is float64, so that no row halts elsewhere because of rounding.
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
    assert halted == {True, False}, "rows halted all train_on_two: nothing was tried"


def test_labels_beyond_a_canvas_are_no_labels(root: Path) -> None:
    """Whatever lies there, in a row or in a carry, it is not scored and not seen."""
    config = config_on(root, "bucketed", "none", trm=EXACT)
    said = []
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
        said.append(({k: float(v) for k, v in sums.items()}, dict(state.trm.named_parameters())))
    assert said[0][0] == said[1][0]
    for name, weight in said[0][1].items():
        assert torch.equal(weight, said[1][1][name]), name


def test_where_all_tasks_are_large_bucketed_is_full(tmp_path: Path, arc1: dict[str, Task]) -> None:
    """Bit for bit, checkpoints included."""
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


def test_from_a_checkpoint_in_the_middle_the_rest_is_the_same(
    copy_run: Callable[..., Config],
) -> None:
    """From the first one whose rows on both canvases go on."""
    sections = {"training": {"steps": 12, "save_every": 1}}
    whole, again = (copy_run(name, **sections) for name in ("whole", "again"))
    pretrain(whole, CPU)
    middle = next(step for step in range(2, 11) if sides_going_on(folder(whole, step)) == {11, 12})
    shutil.rmtree(again.run_folder)
    shutil.copytree(whole.run_folder, again.run_folder)
    for step in range(middle + 1, 13):
        shutil.rmtree(folder(again, step))
    pretrain(again, CPU)
    for step in range(middle + 1, 13):
        assert_close(folder(whole, step), folder(again, step), rtol=0, atol=0)
    assert metrics(again.run_folder) == metrics(whole.run_folder)


def sides_going_on(checkpoint: Path) -> set[int]:
    """Of the rows that have not halted."""
    slots = tensors(checkpoint)
    return set(slots["current.side"][~slots["halted"]].tolist())


def test_two_workers_train_the_run_that_one_does(
    copy_run: Callable[..., Config], train_on_two: Callable[..., None]
) -> None:
    """Their slots are on different canvases at different times."""
    training = {"steps": 8, "save_every": 1}
    one, two = (copy_run(name, training=training) for name in ("one", "two"))
    pretrain(one, CPU)
    train_on_two(two)
    assert len(list(folder(two, 8).glob("slots_*"))) == 2
    assert {11, 12} in [sides_going_on(folder(one, step)) for step in range(2, 8)]
    for step in range(2, 9):
        assert_close(folder(one, step), folder(two, step))


def test_a_probe_asks_each_row_on_its_own_canvas(root: Path) -> None:
    config = config_on(root, "bucketed", "none", trm=EXACT)
    dataset = Dataset.open(root / "bucketed")
    state, _ = state_of(config, dataset)
    with torch.no_grad():  # a new model says the same of every cell
        state.trm.lm_head.weight.normal_(generator=torch.Generator().manual_seed(8))
    rows = Stream(dataset, 0).original_pairs(10**6)
    said = predict_rows(state.trm, rows, batch_size=4)
    assert set(rows["side"].tolist()) == {11, 12}
    state.trm.eval()
    varied = 0
    for n, side in enumerate(rows["side"].tolist()):
        puzzle_rows = state.trm.puzzle_table[[int(rows["puzzle_identifiers"][n])]]
        inputs = np.asarray(rows["inputs"][n : n + 1, : side**2], np.uint8)
        [tokens], _, _ = predict_tokens(state.trm, inputs, puzzle_rows, EvaluationConfig())
        assert np.array_equal(said[n, : side**2], tokens) and not said[n, side**2 :].any()
        varied += len(set(tokens.tolist())) > 1
    assert varied > len(said) // 2


@pytest.mark.parametrize(("old_mode", "new_mode"), [("bucketed", "full"), ("full", "bucketed")])
def test_a_run_does_not_change_its_canvas(root: Path, old_mode: str, new_mode: str) -> None:
    """Refused in one line, before a run and in it."""
    run = f"base-{old_mode}"
    pretrain(config_on(root, old_mode, run, training={"steps": 1}), CPU)
    config = config_on(root, new_mode, run, training={"steps": 2})
    for refuse in (lambda: check(config, "trm", SECTIONS), lambda: pretrain(config, CPU)):
        with pytest.raises(UserError, match=f"data.canvas={old_mode}.*{new_mode}") as error:
            refuse()
        assert "\n" not in str(error.value) and run in str(error.value)
    check(config_on(root, old_mode, run, training={"steps": 2}), "trm", SECTIONS)


@pytest.fixture
def untold(root: Path, request: pytest.FixtureRequest) -> Iterator[Config]:
    """A run on the bucketed dataset whose config was not told so: paths.data alone says it."""
    name = request.node.name
    config = config_on(root, "full", name, paths={"data": str(root / "bucketed")})
    config = replace(config, training=replace(config.training, steps=1))
    pretrain(config, CPU)
    yield replace(config, training=replace(config.training, steps=2))


def test_the_canvas_of_a_run_is_its_datasets_and_the_config_must_say_so(untold: Config) -> None:
    with pytest.raises(UserError, match=r"data\.canvas is 'bucketed' there, 'full' here"):
        check(untold, "trm", SECTIONS)
    check(replace(untold, data=replace(untold.data, canvas="bucketed")), "trm", SECTIONS)


def test_another_dataset_is_refused_whatever_the_config_says(untold: Config, root: Path) -> None:
    full = replace(untold, paths=replace(untold.paths, data=str(root / "full")))
    with pytest.raises(UserError, match=r"holds a run with data\.canvas=bucketed"):
        check(full, "trm", SECTIONS)


@pytest.mark.parametrize(("canvas", "refused"), [("bucketed", True), ("full", False)])
def test_a_weight_for_every_cell_needs_the_full_canvas(
    root: Path, canvas: str, refused: bool
) -> None:
    config = config_on(root, canvas, "mixing", trm={"mlp_t": True})
    if not refused:
        check(config, "trm", SECTIONS)
        return
    with pytest.raises(UserError, match=r"^trm\.mlp_t: .*data\.canvas=full") as error:
        check(config, "trm", SECTIONS)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("canvas", ["full", "bucketed"])
def test_a_run_begins_with_the_weights_and_puzzles_of_another_canvas(
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
