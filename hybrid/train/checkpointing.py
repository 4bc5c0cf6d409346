"""Writing a checkpoint: every worker its part, then one of them the seal."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from hybrid import __version__, storage
from hybrid.checkpoint import TRAINED_ON, Fingerprint, fingerprint, newest, prune, seal
from hybrid.config import Config, dump, to_dict
from hybrid.context import RunContext, worker_slots
from hybrid.dataset import Dataset
from hybrid.errors import CollectiveUserError, UserError
from hybrid.train.state import TrainState, save, slots_name

log = logging.getLogger(__name__)


def step_folder(checkpoints: Path, step: int) -> Path:
    """The checkpoint folder of a step."""
    return checkpoints / f"step_{step:08d}"


def save_checkpoint(
    state: TrainState,
    described: Mapping[str, Any],
    dataset: Dataset,
    config: Config,
    context: RunContext,
    folder: Path,
) -> None:
    """Write the checkpoint of a step to `folder`, by all workers together.

    `described`: what state.json says beside what it says of every run. UserError on every worker
    if one of them cannot write; what is there already stays as it is.
    """
    final = step_folder(folder, state.step)
    partial = final.with_suffix(".partial")

    def begin() -> None:
        shutil.rmtree(partial, ignore_errors=True)
        if storage.is_cached(final):
            storage.remove(final)  # what a killed run has left of it
        partial.mkdir(parents=True)

    name = f"{slots_name(state.slots)}.safetensors"
    mine: list[Fingerprint] = []

    def write() -> None:
        save(state, partial, context.rank)
        mine.append(fingerprint(partial / name))
        if context.rank:
            storage.upload(final / name, partial / name)

    def end() -> None:
        texts = {"config.yaml": dump(config), TRAINED_ON: json.dumps(state.trained_on)}
        whole = {**_describe(state, dataset, config, context), **described}
        seal(partial, final, whole, texts, parts)
        prune(final, config.training.keep_checkpoints)

    try:
        _together(context, begin if context.rank == 0 else None)
        _together(context, write)
        parts = _other_parts(mine[0], config.training.batch_size, context)
        _together(context, end if context.rank == 0 else None)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        good = newest(folder)
        raise CollectiveUserError(
            f"{storage.uri(final)}: the checkpoint cannot be written ({error}); the newest whole"
            f" one is {good.folder.name if good else 'none'}; run the same command again to resume"
        ) from error
    if context.rank and storage.is_cached(final):
        shutil.rmtree(partial, ignore_errors=True)  # on another machine than rank 0's


def _together(context: RunContext, work: Callable[[], None] | None) -> None:
    """Do it, and wait for the others; OSError on every worker if it failed on one."""
    problem: Exception | None = None
    try:
        if work:
            work()
    except (OSError, UserError) as error:
        problem = error
    failed = torch.tensor([float(problem is not None)], device=context.device)
    # Read, because on a GPU the sum is only enqueued: the files must wait, not the stream.
    if context.sum_(failed).item():
        log.info("checkpoint not written: %s", problem or "another worker failed")
        raise OSError(str(problem) if problem else "another worker failed, see its log")


def _other_parts(mine: Fingerprint, batch_size: int, context: RunContext) -> dict[str, Fingerprint]:
    """Names and fingerprints of the files that other workers have just written."""
    size, digest = mine
    packed = size.to_bytes(8) + bytes.fromhex(digest)
    told = torch.tensor([list(packed)], dtype=torch.uint8, device=context.device)
    every = context.gather(told, context.world_size).tolist()
    parts = {}
    for rank in range(1, context.world_size):
        name = slots_name(worker_slots(batch_size, rank, context.world_size))
        size, digest = int.from_bytes(every[rank][:8]), bytes(every[rank][8:]).hex()
        parts[f"{name}.safetensors"] = [size, digest]
    return parts


def _describe(
    state: TrainState, dataset: Dataset, config: Config, context: RunContext
) -> dict[str, Any]:
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
