"""Everything a training run is, in one dataclass, saved and restored by two functions.

There is no generator state in it: order, augmentation and exploration are functions of (seed, step)
or of the position in the stream.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from hybrid import storage
from hybrid.arc import pair_hash
from hybrid.checkpoint import Checkpoint, newest, read, write_tensors
from hybrid.config import Config
from hybrid.dataset import Dataset
from hybrid.device import fuse
from hybrid.errors import UserError
from hybrid.llm.reader import Reader
from hybrid.solver import HybridModel
from hybrid.trm import TRM, AdamAtan2, Carry, ExponentialMovingAverage, TRMConfig

log = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
"""Folder of a run that holds them."""


@dataclass(kw_only=True)
class TrainState:
    """One worker's state. All but `carry` and `taken` is the same on every worker."""

    step: int
    """Optimiser steps done."""
    model: TRM | HybridModel
    optimizer: AdamAtan2
    ema: ExponentialMovingAverage
    slots: range
    """The slots of the global batch that this worker computes."""
    carry: Carry
    """What the TRM keeps between steps; the hybrid begins a row and ends it in one step, and of its
    carry only `current` counts."""
    rows_consumed: Tensor
    """[slots] int64: rows each slot has taken, its place in the stream."""
    trained_on: list[str]
    """Content hashes of all pairs that the weights have seen, here or before they came here."""
    halted: Tensor = field(init=False)
    """[slots] bool on the host: slots that take a new row in the next step."""

    def __post_init__(self) -> None:
        self.halted = torch.ones(len(self.slots), dtype=torch.bool)

    @property
    def trm(self) -> TRM:
        """The TRM, alone or inside the hybrid."""
        return self.model if isinstance(self.model, TRM) else self.model.trm


def model_config(config: Config, dataset: Dataset) -> TRMConfig:
    """The model's config with the sizes that the dataset decides."""
    return replace(
        config.trm.model, seq_len=dataset.canvas**2, num_puzzle_identifiers=dataset.num_identifiers
    )


def fresh(
    config: Config,
    dataset: Dataset,
    slots: range,
    device: torch.device,
    reader: Reader | None = None,
    *,
    hybrid: bool = False,
) -> TrainState:
    """The state before the first step: of the TRM, or of the hybrid around it."""
    training = config.training
    trm = TRM(model_config(config, dataset), seed=training.seed)
    initial = initial_checkpoint(config)
    if initial:
        init_from(trm, initial, dataset)
    model: TRM | HybridModel = trm
    if hybrid:
        model = HybridModel(
            trm, reader, config.adapter, act_steps=training.act_steps, seed=training.seed
        )
    model.to(device)
    fuse(trm, config.cluster.compiles)
    parameters = dict(model.named_parameters())
    return TrainState(
        step=0,
        model=model,
        optimizer=AdamAtan2(
            parameters,
            betas=(training.beta1, training.beta2),
            weight_decay=training.weight_decay,
        ),
        ema=ExponentialMovingAverage(parameters, training.ema_rate),
        slots=slots,
        carry=trm.initial_carry(_no_rows(len(slots), dataset.canvas**2, device)),
        rows_consumed=torch.zeros(len(slots), dtype=torch.int64),
        trained_on=sorted({*trained_on(dataset), *(initial.trained_on if initial else ())}),
    )


def trained_on(dataset: Dataset) -> list[str]:
    """Content hashes of all training pairs, `input|output`, sorted."""
    pairs = {
        pair_hash(p) for task in range(len(dataset.tasks)) for p in dataset.training_pairs(task)
    }
    return sorted(pairs)


def initial_checkpoint(config: Config) -> Checkpoint | None:
    """What `trm.init_from` names; UserError if there is nothing of that name."""
    name = config.trm.init_from
    if name is None:
        return None
    if "/" in name:
        return read(storage.child(name))
    # The copy that its workers will read, who are told the place of the checkpoint.
    place = storage.uri(config.runs_folder / name / CHECKPOINTS)
    found = newest(storage.folder(place))
    if not found:
        raise UserError(
            f"trm.init_from: {name} is no run with a checkpoint in"
            f" {storage.uri(config.runs_folder)} (a checkpoint folder is written with a /)"
        )
    return found


def check_same_sizes(config: TRMConfig, checkpoint: Checkpoint) -> None:
    """UserError if a TRM of `config` cannot be filled from a checkpoint."""
    theirs = checkpoint.state["trm"]
    derived = ("num_puzzle_identifiers", "forward_dtype", "halt_max_steps", "halt_exploration_prob")
    wrong = [
        f"trm.{name} {theirs[name]!r} there, {value!r} here"
        for name, value in asdict(config).items()
        if name not in derived and theirs[name] != value
    ]
    if wrong:
        raise UserError(f"trm.init_from: {checkpoint.folder}: {'; '.join(wrong)}")


def init_from(trm: TRM, checkpoint: Checkpoint, dataset: Dataset) -> None:
    """Fill a TRM with the averaged weights of a checkpoint, and its puzzle table.

    The table is taken as it is where it belongs to the same dataset; elsewhere every row becomes
    the mean row, and the log says so. Raises UserError for a TRM of other sizes.
    """
    check_same_sizes(trm.config, checkpoint)
    tensors = checkpoint.tensors("model") | checkpoint.tensors("ema")
    inside = {
        name.removeprefix("trm."): value
        for name, value in tensors.items()
        if checkpoint.state["kind"] == "trm" or name.startswith("trm.")
    }
    load_weights(trm, inside)
    table = checkpoint.tensors("puzzle_table")["puzzle_table"]
    if checkpoint.state["dataset"]["fingerprint"] == dataset.fingerprint:
        trm.puzzle_table.copy_(table)
    elif table.numel():
        # Not the blank row, which nothing has trained.
        known = table[1:] if len(table) > 1 else table
        trm.puzzle_table.copy_(known.mean(0, keepdim=True).expand_as(trm.puzzle_table))
        log.warning(
            "%s: puzzle table of another dataset, every row starts as its mean", checkpoint.folder
        )


def save(state: TrainState, partial: Path, rank: int) -> None:
    """Write this worker's part of a checkpoint: its slots, and from rank 0 what all share."""
    write_tensors(partial, slots_name(state.slots), _slots(state))
    if rank:
        return
    write_tensors(partial, "model", weights(state.model))
    write_tensors(partial, "puzzle_table", {"puzzle_table": state.trm.puzzle_table})
    write_tensors(partial, "ema", state.ema.values)
    moments = {f"m.{name}": value for name, value in state.optimizer.m.items()}
    moments |= {f"v.{name}": value for name, value in state.optimizer.v.items()}
    write_tensors(partial, "optimizer", moments)


def restore(state: TrainState, checkpoint: Checkpoint) -> None:
    """Fill a fresh state from a checkpoint, written by any number of workers."""
    state.step = int(checkpoint.state["step"])
    load_weights(state.model, checkpoint.tensors("model"))
    state.trm.puzzle_table.copy_(checkpoint.tensors("puzzle_table")["puzzle_table"])
    moments = checkpoint.tensors("optimizer")
    state.optimizer.t = state.step
    values = checkpoint.tensors("ema")
    for name in state.optimizer.parameters:
        state.optimizer.m[name].copy_(moments[f"m.{name}"])
        state.optimizer.v[name].copy_(moments[f"v.{name}"])
        state.ema.values[name].copy_(values[name])
    _restore_slots(state, checkpoint)
    state.halted = state.carry.halted.cpu()
    # With what the run began from, which may be gone.
    state.trained_on = sorted({*state.trained_on, *checkpoint.trained_on})


def weights(model: nn.Module) -> dict[str, Tensor]:
    """The model's tensors without the puzzle table, which is large and has a file of its own."""
    return {
        name: value
        for name, value in model.state_dict().items()
        if not name.endswith("puzzle_table")
    }


def load_weights(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy `weights` back, by name; every one must be there."""
    own = weights(model)
    assert own.keys() == tensors.keys(), sorted(own.keys() ^ tensors.keys())
    for name, value in own.items():
        value.copy_(tensors[name])


def _restore_slots(state: TrainState, checkpoint: Checkpoint) -> None:
    """The carry of this worker's slots, wherever the workers of then have put them."""
    found = _slots(state)
    missing = set(state.slots)
    for path in checkpoint.files("slots_"):
        first, stop = (int(part) for part in path.stem.split("_")[1:])
        common = range(max(first, state.slots.start), min(stop, state.slots.stop))
        if not common:
            continue
        with safe_open(path, "pt") as file:
            for name, target in found.items():
                rows = file.get_slice(name)[common.start - first : common.stop - first]
                target[common.start - state.slots.start : common.stop - state.slots.start] = rows
        missing -= set(common)
    if missing:
        raise UserError(f"{checkpoint.folder}: has no carry for slots {min(missing)} and up")


def _slots(state: TrainState) -> dict[str, Any]:
    if not isinstance(state.model, TRM):
        return {"rows_consumed": state.rows_consumed}
    return {**state.carry.tensors(), "rows_consumed": state.rows_consumed}


def slots_name(slots: range) -> str:
    """Of the file that holds the carry of some slots."""
    return f"slots_{slots.start:06d}_{slots.stop:06d}"


def _no_rows(slots: int, positions: int, device: torch.device) -> dict[str, Tensor]:
    tokens = torch.zeros(slots, positions, dtype=torch.int32, device=device)
    identifiers = torch.zeros(slots, dtype=torch.int32, device=device)
    return {
        "inputs": tokens,
        "labels": tokens.clone(),
        "puzzle_identifiers": identifiers,
        "side": identifiers.clone(),
    }
