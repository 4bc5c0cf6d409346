"""Pretraining runs: length, metrics, output files, estimate and learning."""

from __future__ import annotations

import io
import json
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import config_of, metrics
from PIL import Image
from safetensors.torch import load_file

from hybrid.checkpoint import read
from hybrid.config import Config
from hybrid.context import LocalContext
from hybrid.dataset import Dataset, Stream, prepare
from hybrid.dataset.stream import Rows
from hybrid.errors import UserError
from hybrid.train import Pretraining, Result, estimate, pretrain, total_steps
from hybrid.train.progress import _last
from hybrid.train.state import trained_on
from hybrid.train.tracking import read_metrics
from hybrid.trm import TRM

CopyRun = Callable[..., Config]
Train = Callable[[Config], Result]

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "mlp_t": {"mlp_t": True},
    "learned": {"pos_encodings": "learned"},
    "no puzzle table": {"puzzle_emb_ndim": 0},
    "two prefix positions": {"puzzle_emb_len": 2, "puzzle_emb_ndim": 48},
    "one ACT step": {"halt_max_steps": 1},
    "explores": {"halt_exploration_prob": 0.9},
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_trains_and_resumes(base_root: Path, train: Train, name: str) -> None:
    def run(run: str, steps: int) -> Path:
        logged = {"run": f"{run} {name}"}
        config = config_of(
            base_root, trm=ARCHITECTURES[name], training={"steps": steps}, logging=logged
        )
        return train(config).checkpoint

    whole = run("whole", 4)
    run("halves", 2)
    halves = run("halves", 4)
    for path in whole.glob("*.safetensors"):
        a, b = load_file(path), load_file(halves / path.name)
        for key in a:
            assert torch.equal(a[key], b[key]), (path.name, key)


def test_epochs_are_enough_steps_to_offer_every_row(base_root: Path) -> None:
    dataset = Dataset.open(config_of(base_root).data_folder)
    rows = len(Stream(dataset, 0))
    assert rows == dataset.meta["counts"]["training_pairs"] == 27
    for epochs, steps in ((1, 5), (2, 9), (0.1, 1), (4, 18)):
        config = config_of(base_root, training={"steps": None, "epochs": epochs})
        assert total_steps(config, rows) == steps
    with pytest.raises(UserError, match=r"training\.steps or training\.epochs"):
        total_steps(config_of(base_root, training={"steps": None}), rows)


def test_metrics_are_means_over_finished_rows_and_losses_over_all_rows(
    copy_run: CopyRun, train: Train
) -> None:
    """A line is written every `logging.every` steps."""
    config = copy_run("a", training={"steps": 8, "save_every": 100}, logging={"every": 2})
    train(config)
    lines = [line for line in metrics(config.run_folder) if "loss" in line]
    assert [line["step"] for line in lines] == [1, 2, 4, 6, 8]
    for line in lines:
        assert line["loss"] == pytest.approx(line["lm_loss"] + 0.5 * line["q_halt_loss"])
        assert 1 < line["lm_loss"] < 4, "a mean over all rows is near log(12)"
        assert 0 <= line["exact_accuracy"] <= line["accuracy"] <= 1
        assert 0 <= line["q_halt_accuracy"] <= 1 and 0 <= line["steps"] <= 4
    rows_consumed = load_file(
        config.run_folder / "checkpoints" / "step_00000008" / "slots_000000_000006.safetensors"
    )["rows_consumed"]
    assert lines[-1]["epoch"] == pytest.approx(int(rows_consumed.sum()) / 27)


def test_train_accuracy_uses_ema_weights_and_training_does_not(
    copy_run: CopyRun, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, torch.Tensor]] = []

    def read_predictions(model: TRM, rows: Rows, batch_size: int) -> np.ndarray[Any, Any]:
        seen.append({name: p.detach().clone() for name, p in model.named_parameters()})
        return np.asarray(rows["inputs"], np.uint8)

    monkeypatch.setitem(
        Pretraining.predict_training_pairs.__globals__, "predict_rows", read_predictions
    )
    folder = train(copy_run("a", training={"steps": 3})).checkpoint
    ema, last = (load_file(folder / f"{name}.safetensors") for name in ("ema", "model"))
    assert len(seen) == 1
    for name, value in seen[0].items():
        assert torch.equal(value, ema[name]) and not torch.equal(value, last[name]), name


def test_state_json_describes_dataset_model_and_config(copy_run: CopyRun, train: Train) -> None:
    config = copy_run("a", training={"steps": 2})
    checkpoint = read(train(config).checkpoint)
    dataset = Dataset.open(config.data_folder)
    assert checkpoint.state["dataset"]["fingerprint"] == dataset.fingerprint
    assert checkpoint.state["trm"]["num_puzzle_identifiers"] == dataset.num_identifiers
    assert checkpoint.state["config"]["training"]["steps"] == 2
    pairs = json.loads((checkpoint.folder / "trained_on.json").read_text())
    assert pairs == trained_on(dataset) and len(pairs) == len(set(pairs)) == 27


def test_log_goes_to_the_run_folder_and_its_handler_is_removed(
    copy_run: CopyRun, train: Train
) -> None:
    config = copy_run("a", training={"steps": 2})
    handlers = list(logging.getLogger("hybrid").handlers)
    train(config)
    assert logging.getLogger("hybrid").handlers == handlers
    assert "step=2 loss=" in (config.run_folder / "train_0.log").read_text()
    assert {path.name for path in config.run_folder.iterdir()} == {
        "checkpoints",
        "metrics.jsonl",
        "train_0.log",
    }, "logging.wandb=false left a file"


def test_progress_is_the_newest_complete_line_with_a_loss(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert _last(path) is None
    lines = [{"step": n, "loss": 1.0, "padding": "x" * 90} for n in range(100)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    path.write_text(text + '{"step": 100, "train_accuracy/exact": 0}\n{"step": 101, "loss": 0')
    assert _last(path) == lines[-1]


def test_estimate_matches_the_trained_model(copy_run: CopyRun, train: Train) -> None:
    config = copy_run("a", training={"steps": 2})
    tensors = load_file(train(config).checkpoint / "ema.safetensors")
    trained = sum(value.numel() for value in tensors.values())
    text = estimate(config, "trm")
    assert f"parameters: {trained:,} trained in the TRM, puzzle table 37 x 32" in text
    assert "steps: 2 of 6 rows (27 rows per epoch)" in text
    unprepared = config_of(Path("/nowhere"))
    assert "not known yet: /nowhere/arc/processed: no dataset here" in estimate(unprepared, "trm")


@pytest.mark.slow
@pytest.mark.parametrize("mode", [None, "disabled"])
def test_wandb_is_offline_without_a_key_and_off_when_disabled(
    copy_run: CopyRun,
    train: Train,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    mode: str | None,
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))  # no ~/.netrc, so no key
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    if mode:
        monkeypatch.setenv("WANDB_MODE", mode)
    config = copy_run("a", training={"steps": 2}, logging={"wandb": True})
    train(config)
    written = list((config.run_folder / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(written) == (mode is None)
    parts = {b"arc-trm-pretrain", config.logging.run.encode(), b"lm_loss", b"train_accuracy/exact"}
    deadline = time.monotonic() + 30  # W&B's own process may still be writing
    for file in written:
        while parts and time.monotonic() < deadline:
            parts -= {part for part in parts if part in file.read_bytes()}
        assert not parts, f"{file.name} does not hold {parts}"
        [table] = file.parent.glob("files/media/table/training pairs_*.json")
        assert len(json.loads(table.read_text())["data"]) == 4, "one row per training pair"
        staged = [path.read_bytes() for path in tmp_path.glob(".local/share/wandb/**/tmp*")]
        images = [data for data in staged if data.startswith(b"\x89PNG")]
        assert len(images) >= 8, "inputs and answers differ"
        for data in images:
            with Image.open(io.BytesIO(data)) as image:
                assert image.width % 12 == image.height % 12 == 0


@pytest.mark.slow
def test_a_tiny_model_learns_its_training_pairs(tmp_path: Path, train: Train) -> None:
    """Train on the 15 ARC-1 tasks that fit 3 x 3: accuracy on 68 pairs rises from 0 to a third."""
    config = config_of(
        tmp_path,
        data={"training": [], "evaluation": ["arc1-training"], "variants": 0, "max_side": 3},
        trm={"halt_max_steps": 2},
        training={
            "batch_size": 16,
            "steps": 600,
            "save_every": 600,
            "lr": 1e-3,
            "puzzle_lr": 1e-2,
            "lr_warmup_steps": 10,
            "train_accuracy_pairs": 100,
        },
        logging={"every": 200},
    )
    prepare(config.data, config.data_folder, lambda line: None)
    result = train(config)
    assert result.train_accuracy_before == 0
    assert result.train_accuracy_after is not None and result.train_accuracy_after > 0.25
    accuracies = [m["exact_accuracy"] for m in metrics(config.run_folder) if "loss" in m]
    assert accuracies == sorted(accuracies) and accuracies[-1] > 0.2


def test_waiting_for_rows_covers_the_steps_of_its_line(base_root: Path) -> None:
    """Make rows slow; the metric counts the wait in the line of the steps that waited."""
    slow = 0.1
    waits: list[int] = []

    class Slow(LocalContext):
        def rounds(self, *args: Any) -> Iterator[Rows]:
            for made in super().rounds(*args):
                waits.append(1)
                time.sleep(slow)
                yield made

    config = config_of(
        base_root,
        training={"steps": 12, "save_every": 12, "train_accuracy_pairs": 0},
        logging={"run": "slow rows", "every": 3},
    )
    pretrain(config, Slow(torch.device("cpu")))
    lines = [m for m in read_metrics(config.run_folder / "metrics.jsonl") if "loss" in m]
    assert len(lines) == 4 and all(0 <= line["waiting_for_rows"] < 1 for line in lines)
    waited = sum(3 * line["seconds_per_step"] * line["waiting_for_rows"] for line in lines)
    assert len(waits) >= 3 and waited == pytest.approx(slow * len(waits), rel=0.3)
