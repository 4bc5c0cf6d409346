"""Save and restore a `TrainState`: every worker writes its slots, rank 0 the rest and the seal."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open

from hybrid import __version__, storage
from hybrid.checkpoint import (
    TRAINED_ON,
    Checkpoint,
    Fingerprint,
    fingerprint,
    newest,
    prune,
    seal,
    write_tensors,
)
from hybrid.config import Config, dump, to_dict
from hybrid.context import RunContext
from hybrid.dataset import Dataset
from hybrid.errors import CollectiveUserError, UserError
from hybrid.train.state import TrainState, load_weights, weights
from hybrid.trm import TRM

log = logging.getLogger(__name__)
T = TypeVar("T")


def step_folder(checkpoints: Path, step: int) -> Path:
    """Return the checkpoint folder of a step."""
    return checkpoints / f"step_{step:08d}"


def save_checkpoint(
    state: TrainState,
    metadata: Mapping[str, Any],
    dataset: Dataset,
    config: Config,
    context: RunContext,
    folder: Path,
) -> None:
    """Write the checkpoint of the current step into `folder`; every worker must call it.

    `metadata`: entries of state.json in addition to those of every run. If a worker cannot write,
    raises CollectiveUserError on all workers and leaves older checkpoints as they are.
    """
    final = step_folder(folder, state.step)
    partial = final.with_suffix(".partial")

    def write_part() -> tuple[str, Fingerprint]:
        path = save(state, partial, context.rank)
        if context.rank:
            storage.upload(final / path.name, path)
        return path.name, fingerprint(path)

    def finish() -> None:
        texts = {"config.yaml": dump(config), TRAINED_ON: json.dumps(state.trained_on)}
        entries = {**_metadata(state, dataset, config, context), **metadata}
        seal(partial, final, entries, texts, other_parts)
        prune(final, config.training.keep_checkpoints)

    try:
        _run_on_all(context, lambda: None if context.rank else _clear(partial, final))
        other_parts = dict(_run_on_all(context, write_part)[1:])
        _run_on_all(context, lambda: None if context.rank else finish())
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        good = newest(folder)
        raise CollectiveUserError(
            f"{storage.uri(final)}: the checkpoint cannot be written ({error}); the newest complete"
            f" one is {good.folder.name if good else 'none'}; run the same command again to resume"
        ) from error
    if context.rank and storage.is_cached(final):
        shutil.rmtree(partial, ignore_errors=True)  # this worker's node is not rank 0's


def save(state: TrainState, partial: Path, rank: int) -> Path:
    """Write a worker's slots, on rank 0 also the shared tensors; return the file of the slots."""
    name = f"slots_{state.slots.start:06d}_{state.slots.stop:06d}"
    path = partial / f"{name}.safetensors"
    write_tensors(partial, name, _slots(state))
    if rank:
        return path
    write_tensors(partial, "model", weights(state.model))
    write_tensors(partial, "puzzle_table", {"puzzle_table": state.trm.puzzle_table})
    write_tensors(partial, "ema", state.ema.values)
    moments = {f"m.{name}": value for name, value in state.optimizer.m.items()}
    moments |= {f"v.{name}": value for name, value in state.optimizer.v.items()}
    write_tensors(partial, "optimizer", moments)
    return path


def restore(state: TrainState, checkpoint: Checkpoint) -> None:
    """Load a checkpoint, written by any number of workers, into a newly created state."""
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
    # The checkpoint's list covers trm.init_from, which may have been deleted since.
    state.trained_on = sorted({*state.trained_on, *checkpoint.trained_on})


def _restore_slots(state: TrainState, checkpoint: Checkpoint) -> None:
    """Load this worker's slots from the files of all workers that wrote the checkpoint."""
    targets = _slots(state)
    missing = set(state.slots)
    for path in checkpoint.files("slots_"):
        first, stop = (int(part) for part in path.stem.split("_")[1:])
        common = range(max(first, state.slots.start), min(stop, state.slots.stop))
        if not common:
            continue
        with safe_open(path, "pt") as file:
            for name, target in targets.items():
                rows = file.get_slice(name)[common.start - first : common.stop - first]
                target[common.start - state.slots.start : common.stop - state.slots.start] = rows
        missing -= set(common)
    if missing:
        raise UserError(f"{checkpoint.folder}: has no carry for slots {min(missing)} and up")


def _slots(state: TrainState) -> dict[str, Any]:
    if not isinstance(state.model, TRM):
        return {"rows_consumed": state.rows_consumed}
    return {**state.carry.to_tensors(), "rows_consumed": state.rows_consumed}


def _clear(partial: Path, final: Path) -> None:
    """Create an empty `partial` and remove what a killed run left of the same step."""
    shutil.rmtree(partial, ignore_errors=True)
    if storage.is_cached(final):
        storage.remove(final)
    partial.mkdir(parents=True)


def _run_on_all(context: RunContext, work: Callable[[], T]) -> list[T]:
    """Call `work` on every worker; return the results in rank order.

    If it fails on one worker, raises OSError on all of them.
    """
    result, problem = None, None
    try:
        result = work()
    except (OSError, UserError) as error:
        problem = str(error)
    results, problems = zip(*context.gather_objects((result, problem)), strict=True)
    for problem in problems:
        if problem is not None:
            log.info("checkpoint not written: %s", problem)
            raise OSError(problem)
    return list(results)


def _metadata(
    state: TrainState, dataset: Dataset, config: Config, context: RunContext
) -> dict[str, Any]:
    """Return the entries of state.json that every run has."""
    return {
        "step": state.step,
        "world_size": context.world_size,
        "trm": asdict(state.trm.config),
        "config": to_dict(config),
        "dataset": {
            **{key: dataset.meta[key] for key in ("fingerprint", "counts", "sources")},
            "canvas": dataset.canvas_mode,
        },
        "versions": {"arc-hybrid": __version__, "torch": torch.__version__},
    }
