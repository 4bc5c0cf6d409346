"""Joint training batches with canvases of two sides."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import assert_close, hybrid_of, loader_of, next_batch, randomize_halt_head, write_tasks
from torch import Tensor

from hybrid.adapters import AdapterConfig, TextToLatentAdapter
from hybrid.arc import Task
from hybrid.config import Config
from hybrid.context import LocalContext
from hybrid.dataset import Dataset, prepare
from hybrid.solver import attempts
from hybrid.train import Joint, joint
from hybrid.train.preflight import training_stream
from hybrid.trm import act_loss

CPU = LocalContext(torch.device("cpu"))
TRAINED = ("0d3d703e", "74dd1130", "29c11459", "10fcaaa3")
"""Sides 3, 3, 11 and, with the answer, 12."""
SIX = range(6)


def config_on(root: Path, run: str, **sections: dict[str, Any]) -> Config:
    fixed: dict[str, dict[str, Any]] = {
        "data": {"max_side": 12, "variants": 2, "canvas": "bucketed", "evaluation": []},
        "trm": {"forward_dtype": "float64", "halt_exploration_prob": 0.5},
        "llama": {"dtype": "float64", "max_prompt_tokens": 250, "batch_size": 3},
        "adapter": {"inject": "both"},
        "training": {
            "max_attempts": 3,
            "bptt_attempts": 2,
            "steps": 2,
            "train_accuracy_pairs": 0,
            "seed": 28,  # three rows on each canvas, which explore differently
        },
        "logging": {"run": run},
    }
    return hybrid_of(root, **{s: fixed.get(s, {}) | sections.get(s, {}) for s in fixed | sections})


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, arc1: dict[str, Task]) -> Path:
    root = tmp_path_factory.mktemp("joint-canvas")
    write_tasks(root / "training", [arc1[task] for task in TRAINED])
    config = config_on(root, "none")
    prepare(config.data, config.data_folder, lambda line: None)
    return root


def module_of(config: Config) -> tuple[Joint, dict[str, Tensor]]:
    """Return a calibrated hybrid whose adapters output non-zero latents, and a batch."""
    module = Joint(config, Dataset.open(config.data_folder), CPU, SIX)
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, weight in module.solver.named_parameters():
            size = 0.02 if name.startswith("trm.") else 0.1
            weight.add_(size * torch.randn(weight.shape, generator=draw))
        randomize_halt_head({f"trm.{k}": v for k, v in module.state.trm.state_dict().items()})
        module.state.trm.puzzle_table.normal_(generator=draw)
    module.setup()
    stream = training_stream(config, Dataset.open(config.data_folder))
    loader = loader_of(module.state, CPU.rounds(stream, SIX, 6, 0))
    return module, next_batch(loader, module.state)


@pytest.mark.parametrize("micro", [1, 2])
def test_micro_batches_match_the_full_batch(root: Path, micro: int) -> None:
    config = config_on(root, "none", feedback={"source": "confidence", "threshold": 0.5})
    divided = replace(config, training=replace(config.training, micro_batch_size=micro))
    (one, batch), (other, same) = module_of(config), module_of(divided)
    sums, parts = one.step(batch, 100), other.step(same, 100)
    for name in sums.keys() - {"latent_variance", "compared"}:  # computed per micro-batch
        torch.testing.assert_close(parts[name].double(), sums[name].double(), rtol=1e-5, atol=1e-8)
    for name, weight in one.state.model.named_parameters():
        found = other.state.model.get_parameter(name)
        scale = float(weight.grad.abs().max()) if weight.grad is not None else 0.0
        torch.testing.assert_close(found.grad, weight.grad, rtol=1e-4, atol=1e-5 * scale, msg=name)


@pytest.mark.parametrize("source", ["confidence", "oracle"])
def test_mixed_canvas_step_matches_rows_computed_separately(
    root: Path, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compare gradients of TRM, adapters and puzzle rows, loss and number of attempts.

    With confidence, every row that does not explore stops after one attempt.
    """
    config = config_on(root, "none", feedback={"source": source, "threshold": 0.0})
    module, batch = module_of(config)
    alone, same = module_of(config)
    for name, value in module.solver.state_dict().items():
        assert torch.equal(value, alone.solver.state_dict()[name]), name
    assert all(torch.equal(value, same[name]) for name, value in batch.items())
    assert batch["side"].tolist() == [12, 12, 12, 11, 11, 11]
    puzzle_grads: list[Tensor] = []
    monkeypatch.setattr(
        "hybrid.train.update.sign_sgd_",
        lambda table, ids, grads, **keys: puzzle_grads.append(grads.clone()),
    )
    sums = module.step(batch, 100)

    alone.state.step += 1
    alone.solver.train()
    minimum = alone._min_attempts().tolist()
    assert alone.reader is not None
    problems = alone.stream.problems(np.array(SIX))
    rows, made, loss = [], 0, 0.0
    for n, side in enumerate(batch["side"].tolist()):
        row = {name: value[n : n + 1] for name, value in batch.items()}
        row |= {name: row[name][:, : side**2] for name in ("inputs", "labels")}
        ids = batch["puzzle_identifiers"][n : n + 1].long()
        puzzle_rows = alone.state.trm.puzzle_table[ids].requires_grad_()
        cache = alone.reader.prefill([alone.reader.prompt(problems[n])])
        window = torch.zeros(())
        for attempt in attempts(
            alone.solver,
            alone.solver.initial_state(row, puzzle_rows, cache),
            alone._feedback_source(row),
            max_attempts=3,
            history=config.feedback.history,
            min_attempts=[minimum[n]],
            bptt=2,
        ):
            part, _ = act_loss(
                attempt.outputs.logits,
                attempt.outputs.q_halt,
                row["labels"],
                torch.tensor([attempt.number], dtype=torch.int32),
                attempt.ended,
            )
            window = window + part / (6 * 3)
            loss += float(part.detach())
            made += 1
            if attempt.cut:
                window.backward()
                window = torch.zeros(())
        rows.append(puzzle_rows.grad)
    for name, weight in module.solver.named_parameters():
        theirs = alone.solver.get_parameter(name).grad
        assert theirs is not None and theirs.any(), name
        torch.testing.assert_close(weight.grad, theirs, rtol=1e-4, atol=1e-7, msg=name)
    torch.testing.assert_close(puzzle_grads[0], torch.cat(rows), rtol=1e-4, atol=1e-8)
    assert float(sums["attempts"]) == made
    assert 6 < made < 18 if source == "confidence" else made == 18
    assert float(sums["lm_loss"] + 0.5 * sums["q_halt_loss"]) == pytest.approx(loss, rel=1e-6)


def test_adapter_uses_the_position_rows_of_the_canvas() -> None:
    """Only the given rows of the position table are used and have a gradient."""
    full, small, prefix, D = 6, 4, 2, 8
    adapter = TextToLatentAdapter(24, prefix + full**2, D, AdapterConfig(hidden=16), 0)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        adapter.mlp.layers[-1].weight.normal_(generator=draw)
        adapter.positions.normal_(generator=draw)
    positions = [
        *range(prefix),
        *(prefix + full * r + c for r in range(small) for c in range(small)),
    ]
    hidden = torch.randn(3, 24, generator=draw)
    whole, few = adapter(hidden), adapter(hidden, torch.tensor(positions))
    for state, value in few.items():
        assert value.shape == (3, len(positions), D)
        assert torch.equal(value, whole[state][:, positions])
    sum(value.square().sum() for value in few.values()).backward()
    trained = adapter.positions.grad.any(-1).any(0).nonzero().flatten().tolist()
    assert trained == positions


def test_step_passes_each_canvas_its_own_positions(root: Path) -> None:
    """Check positions and shapes of the adapter's outputs in every attempt."""
    module, batch = module_of(config_on(root, "none", feedback={"source": "none"}))
    assert module.solver.to_latent is not None
    calls: list[tuple[Any, dict[str, Tensor]]] = []
    module.solver.to_latent.register_forward_hook(
        lambda module, inputs, made: calls.append((inputs[1], made))
    )
    module.step(batch, 100)
    small = [0, *(1 + 12 * r + c for r in range(11) for c in range(11))]
    seen = set()
    for positions, made in calls:
        cells = made["x"].shape[1] - 1
        assert made.keys() == {"z_H", "z_L", "x"}
        assert (positions.tolist() if cells == 121 else positions) == (
            small if cells == 121 else None
        )
        assert len(made["x"]) == int((batch["side"] ** 2 == cells).sum())
        seen.add(cells)
    assert seen == {121, 144}


def test_predict_training_pairs_uses_the_canvas_of_each_row(root: Path) -> None:
    """Batch size does not matter, and tokens outside the canvas are PAD."""
    results = []
    for size in (6, 1):
        config = config_on(root, "none", evaluation={"batch_size": size})
        module, _ = module_of(config)
        with torch.no_grad():
            module.state.trm.lm_head.weight.normal_(generator=torch.Generator().manual_seed(8))
        results.append(module.predict_training_pairs(module.stream, 9))
    assert set(results[0]["side"].tolist()) == {11, 12}
    predicted = results[0]["predicted"]
    assert np.array_equal(predicted, results[1]["predicted"])
    for n, side in enumerate(results[0]["side"].tolist()):
        assert not predicted[n, side**2 :].any()
        assert len(set(predicted[n, : side**2].tolist())) > 1


def test_calibration_reads_every_row_with_its_own_problem(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches of three rows on two canvases give the same statistics as single rows."""
    monkeypatch.setattr(sys.modules["hybrid.train.joint"], "CALIBRATION_ROWS", 18)
    found = []
    for size in (3, 1):
        module, _ = module_of(config_on(root, "none", llama={"batch_size": size}))
        assert module.solver.to_latent is not None
        found.append((module.solver.to_latent.mean, module.solver.to_latent.std))
    assert found[0][1].all()
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_resumed_run_matches_uninterrupted_run(root: Path) -> None:
    folders = []
    for run, lengths in (("whole", (4,)), ("halves", (2, 4))):
        for steps in lengths:
            config = config_on(root, run, training={"steps": steps, "save_every": 2})
            config = replace(config, training=replace(config.training, max_attempts=2))
            folders.append(joint(config, CPU).checkpoint)
    assert_close(folders[0], folders[2], rtol=0, atol=0)
