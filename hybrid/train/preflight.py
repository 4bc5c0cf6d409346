"""What can be said of a run before it begins: its rows, its length, and why it may not."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from hybrid import storage
from hybrid.arc import pair_hash
from hybrid.checkpoint import Checkpoint, newest
from hybrid.config import Config, differences, to_dict
from hybrid.context import worker_slots
from hybrid.dataset import Dataset, Stream
from hybrid.errors import UserError
from hybrid.llm import check_model
from hybrid.llm.known import is_path
from hybrid.train.state import CHECKPOINTS, check_same_sizes, initial_checkpoint, model_config

MAY_CHANGE = {
    "training": (
        *("steps", "epochs", "save_every", "keep_checkpoints", "train_accuracy_pairs"),
        *("micro_batch_size", "recompute"),  # memory and speed, not results
    ),
    "llama": ("batch_size", "prompt_cache"),
    "trm": ("init_from",),  # a resumed run has begun already
}
"""Keys that a resumed run may have changed; of `data` none."""


def total_steps(config: Config, rows_per_epoch: int) -> int:
    """Optimiser steps of the whole run; an epoch is as many as offer each of its rows once."""
    training = config.training
    if training.steps is not None:
        return training.steps
    if training.epochs is None:
        raise UserError("training.steps or training.epochs must be given")
    return max(1, math.ceil(training.epochs * rows_per_epoch / training.batch_size))


def training_stream(config: Config, dataset: Dataset) -> Stream:
    """The rows of a run."""
    return Stream(dataset, config.training.seed, config.training.variants)


def check(config: Config, kind: str, sections: tuple[str, ...]) -> Config:
    """UserError for whatever a worker would refuse, before anything is started or written.

    Returns the config with `trm.init_from` as the checkpoint that it means now: a run that is still
    training would mean another one to each worker.
    """
    dataset = Dataset.open(config.data_folder)
    dataset.check_same_recipe(config.data)
    total_steps(config, len(training_stream(config, dataset)))
    if kind == "hybrid":
        check_feedback(config)
    if dataset.bucketed and config.trm.mlp_t:
        raise UserError(
            "trm.mlp_t: has a weight for every cell of the full canvas; prepare data.canvas=full"
        )
    worker_slots(config.training.batch_size, 0, max(1, config.cluster.num_workers))
    resumed = newest(config.run_folder / CHECKPOINTS)
    if resumed:
        check_unchanged(config, dataset, resumed, kind, sections)
    else:
        initial = initial_checkpoint(config)
        if initial:
            check_same_sizes(model_config(config, dataset), initial)
            _check_init_not_contaminated(initial, dataset)
            start = storage.uri(initial.folder)
            config = replace(config, trm=replace(config.trm, init_from=start))
    if kind == "hybrid" and config.adapter.inject != "none":
        check_model(config.llama, config.models_folder)
    return config


def check_feedback(config: Config) -> None:
    """UserError for feedback that training rows cannot have."""
    if config.feedback.source in ("vote", "demos"):
        raise UserError(
            f"feedback.source={config.feedback.source} is for evaluation: a training row has no"
            " other views and no held-out demonstration; train with none, confidence or oracle"
        )


def check_unchanged(
    config: Config, dataset: Dataset, checkpoint: Checkpoint, kind: str, sections: tuple[str, ...]
) -> None:
    """UserError if the run in the folder is another one than the config describes."""
    where = storage.uri(checkpoint.folder.parent.parent)
    if checkpoint.state["kind"] != kind:
        raise UserError(
            f"{where}: holds a run of kind {checkpoint.state['kind']}, not {kind};"
            " give this one another logging.run"
        )
    changed = differences(checkpoint.state["config"], to_dict(config), sections)
    may = dict(MAY_CHANGE)
    before = checkpoint.state["config"].get("llama", {}).get("model", "")
    if config.llama.frozen and is_path(before) and is_path(config.llama.model):
        # Its folder may have moved: `check_same_llm` sees whether it is the same.
        may["llama"] = (*may["llama"], "model")
    changed = [
        line
        for line in changed
        if line.split(":")[0].split(".")[1] not in may.get(line.split(".")[0], ())
    ]
    if changed:
        raise UserError(f"{where}: holds a run of another config ({'; '.join(changed)})")
    canvas_mode = checkpoint.state["dataset"]["canvas"]
    if canvas_mode != dataset.canvas_mode:
        raise UserError(
            f"{where}: holds a run with data.canvas={canvas_mode}, {dataset.folder} has"
            f" {dataset.canvas_mode}"
        )
    if checkpoint.state["dataset"]["fingerprint"] != dataset.fingerprint:
        raise UserError(f"{where}: holds a run on another dataset than {dataset.folder}")


def _check_init_not_contaminated(initial: Checkpoint, dataset: Dataset) -> None:
    """UserError if what a run starts from has seen the tests that are held out to judge it."""
    if not dataset.meta["config"]["hold_out_tasks"]:
        return
    answers = Dataset.open(dataset.folder, answers=True)
    seen = set(initial.trained_on)
    known = [
        answers.tasks[task].id
        for task in dataset.evaluated
        if any(pair_hash(pair) in seen for pair in answers.tasks[task].test)
    ]
    if known:
        raise UserError(
            f"trm.init_from: {storage.uri(initial.folder)} was trained on the tests of"
            f" {len(known)} of the {len(dataset.evaluated)} held-out tasks: pretrain with the same"
            f" data.training, data.hold_out_tasks={len(dataset.evaluated)} and data.evaluation=[]"
        )


def check_same_llm(config: Config, checkpoint: Checkpoint, now: dict[str, Any]) -> None:
    """UserError if the language model's name now means other weights than when the run began."""
    then, llama = checkpoint.state.get("llama"), now.get("llama")
    if then and llama and config.llama.frozen and then["fingerprint"] != llama["fingerprint"]:
        raise UserError(
            f"llama.model: {config.llama.model} is not the model that {checkpoint.folder} was"
            f" trained with (revision {then['revision']} then, {llama['revision']} now)"
        )
