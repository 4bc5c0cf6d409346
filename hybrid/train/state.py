"""Everything a training run is, in one dataclass, saved and restored by two functions.

There is no generator state in it: order, augmentation and exploration are functions of (seed, step)
or of the position in the stream.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from hybrid.checkpoint import Checkpoint, write_tensors
from hybrid.config import Config
from hybrid.dataset import Dataset
from hybrid.errors import UserError
from hybrid.trm import TRM, AdamAtan2, Carry, MovingAverage, TRMConfig


@dataclass(kw_only=True)
class TrainState:
    """One worker's state. All but `carry` and `taken` is the same on every worker."""

    step: int
    """Optimiser steps done."""
    model: TRM
    optimizer: AdamAtan2
    average: MovingAverage
    slots: range
    """The slots of the global batch that this worker computes."""
    carry: Carry
    taken: Tensor
    """[slots] int64: rows each slot has taken, its place in the stream."""


def model_config(config: Config, dataset: Dataset) -> TRMConfig:
    """The model's config with the sizes that the dataset decides."""
    return replace(
        config.trm, seq_len=dataset.canvas**2, num_puzzle_identifiers=dataset.num_identifiers
    )


def fresh(config: Config, dataset: Dataset, slots: range, device: torch.device) -> TrainState:
    """The state before the first step."""
    model = TRM(model_config(config, dataset), seed=config.training.seed).to(device)
    parameters = dict(model.named_parameters())
    training = config.training
    return TrainState(
        step=0,
        model=model,
        optimizer=AdamAtan2(
            parameters,
            betas=(training.beta1, training.beta2),
            weight_decay=training.weight_decay,
        ),
        average=MovingAverage(parameters, training.ema_rate),
        slots=slots,
        carry=model.initial_carry(_no_rows(len(slots), dataset.canvas**2, device)),
        taken=torch.zeros(len(slots), dtype=torch.int64),
    )


def save(state: TrainState, partial: Path, rank: int) -> None:
    """Write this worker's part of a checkpoint: its slots, and from rank 0 what all share."""
    carry = state.carry
    write_tensors(
        partial,
        _slots_name(state.slots),
        {
            "z_H": carry.z_H,
            "z_L": carry.z_L,
            "steps": carry.steps,
            "halted": carry.halted,
            "taken": state.taken,
            **{f"current.{name}": value for name, value in carry.current.items()},
        },
    )
    if rank:
        return
    write_tensors(partial, "model", weights(state.model))
    write_tensors(partial, "puzzle_table", {"puzzle_table": state.model.puzzle_table})
    write_tensors(partial, "average", state.average.shadow)
    moments = {f"m.{name}": value for name, value in state.optimizer.m.items()}
    moments |= {f"v.{name}": value for name, value in state.optimizer.v.items()}
    write_tensors(partial, "optimizer", moments)


def restore(state: TrainState, checkpoint: Checkpoint) -> None:
    """Fill a fresh state from a checkpoint, written by any number of workers."""
    state.step = int(checkpoint.state["step"])
    load_weights(state.model, checkpoint.tensors("model"))
    state.model.puzzle_table.copy_(checkpoint.tensors("puzzle_table")["puzzle_table"])
    moments = checkpoint.tensors("optimizer")
    state.optimizer.t = state.step
    shadow = checkpoint.tensors("average")
    for name in state.optimizer.parameters:
        state.optimizer.m[name].copy_(moments[f"m.{name}"])
        state.optimizer.v[name].copy_(moments[f"v.{name}"])
        state.average.shadow[name].copy_(shadow[name])
    _restore_slots(state, checkpoint)


def weights(model: TRM) -> dict[str, Tensor]:
    """The model's tensors without the puzzle table, which is large and has a file of its own."""
    return {name: value for name, value in model.state_dict().items() if name != "puzzle_table"}


def load_weights(model: TRM, tensors: Mapping[str, Tensor]) -> None:
    """Copy `weights` back, by name; every one must be there."""
    own = weights(model)
    assert own.keys() == tensors.keys(), sorted(own.keys() ^ tensors.keys())
    for name, value in own.items():
        value.copy_(tensors[name])


def _restore_slots(state: TrainState, checkpoint: Checkpoint) -> None:
    """The carry of this worker's slots, wherever the workers of then have put them."""
    found: dict[str, Any] = {
        "z_H": state.carry.z_H,
        "z_L": state.carry.z_L,
        "steps": state.carry.steps,
        "halted": state.carry.halted,
        "taken": state.taken,
        **{f"current.{name}": value for name, value in state.carry.current.items()},
    }
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


def _slots_name(slots: range) -> str:
    return f"slots_{slots.start:06d}_{slots.stop:06d}"


def _no_rows(slots: int, positions: int, device: torch.device) -> dict[str, Tensor]:
    tokens = torch.zeros(slots, positions, dtype=torch.int32, device=device)
    identifiers = torch.zeros(slots, dtype=torch.int32, device=device)
    return {"inputs": tokens, "labels": tokens.clone(), "puzzle_identifiers": identifiers}
