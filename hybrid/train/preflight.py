"""Checks before a training run starts, and its rows and length."""

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
        *("micro_batch_size", "recompute"),  # change memory and speed, not results
    ),
    "llama": ("batch_size", "prompt_cache"),
    "trm": ("init_from",),  # unused by a resumed run
}
"""Keys that may change when a run is resumed; no key of `data` may."""


def total_steps(config: Config, rows_per_epoch: int) -> int:
    """Return the optimizer steps of the whole run; an epoch offers each of its rows once."""
    training = config.training
    if training.steps is not None:
        return training.steps
    if training.epochs is None:
        raise UserError("training.steps or training.epochs must be given")
    return max(1, math.ceil(training.epochs * rows_per_epoch / training.batch_size))


def training_stream(config: Config, dataset: Dataset) -> Stream:
    """Return the stream of the run's training rows."""
    return Stream(dataset, config.training.seed, config.training.variants)


def check(config: Config, kind: str, sections: tuple[str, ...]) -> Config:
    """Check before anything is started or written that workers will accept the run.

    Returns the config with `trm.init_from` resolved to one checkpoint, because each worker could
    see another newest one of a run that is still training. Raises UserError.
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
            uri = storage.uri(initial.folder)
            config = replace(config, trm=replace(config.trm, init_from=uri))
    if kind == "hybrid" and config.adapter.inject != "none":
        check_model(config.llama, config.models_folder)
    return config


def check_feedback(config: Config) -> None:
    """Raise UserError for a source of feedback that training does not support."""
    if config.feedback.source in ("vote", "demos"):
        raise UserError(
            f"feedback.source={config.feedback.source} is for evaluation: training rows have no"
            " other variants and no held-out demonstration; train with none, confidence or oracle"
        )


def check_unchanged(
    config: Config, dataset: Dataset, checkpoint: Checkpoint, kind: str, sections: tuple[str, ...]
) -> None:
    """Raise UserError if the run in the run folder does not match kind, config and dataset."""
    where = storage.uri(checkpoint.folder.parent.parent)
    if checkpoint.state["kind"] != kind:
        raise UserError(
            f"{where}: holds a run of kind {checkpoint.state['kind']}, not {kind};"
            " choose another logging.run"
        )
    changed = differences(checkpoint.state["config"], to_dict(config), sections)
    may_change = dict(MAY_CHANGE)
    old_model = checkpoint.state["config"].get("llama", {}).get("model", "")
    if config.llama.frozen and is_path(old_model) and is_path(config.llama.model):
        # The folder may have moved; `check_same_llm` compares the weights.
        may_change["llama"] = (*may_change["llama"], "model")
    changed = [
        line
        for line in changed
        if line.split(":")[0].split(".")[1] not in may_change.get(line.split(".")[0], ())
    ]
    if changed:
        raise UserError(
            f"{where}: holds a run of another config ({'; '.join(changed)});"
            " choose another logging.run"
        )
    canvas_mode = checkpoint.state["dataset"]["canvas"]
    if canvas_mode != dataset.canvas_mode:
        raise UserError(
            f"{where}: holds a run with data.canvas={canvas_mode}, but {dataset.folder} has"
            f" data.canvas={dataset.canvas_mode}; choose another logging.run"
        )
    if checkpoint.state["dataset"]["fingerprint"] != dataset.fingerprint:
        raise UserError(
            f"{where}: holds a run on another dataset than {dataset.folder};"
            " choose another logging.run"
        )


def _check_init_not_contaminated(initial: Checkpoint, dataset: Dataset) -> None:
    """Raise UserError if `trm.init_from` was trained on tests of the held-out tasks."""
    if not dataset.meta["config"]["hold_out_tasks"]:
        return
    answers = Dataset.open(dataset.folder, answers=True)
    seen = set(initial.trained_on)
    leaked = [
        answers.tasks[task].id
        for task in dataset.evaluated
        if any(pair_hash(pair) in seen for pair in answers.tasks[task].test)
    ]
    if leaked:
        raise UserError(
            f"trm.init_from: {storage.uri(initial.folder)} was trained on the tests of"
            f" {len(leaked)} of the {len(dataset.evaluated)} held-out tasks: pretrain with the same"
            f" data.training, data.hold_out_tasks={len(dataset.evaluated)} and data.evaluation=[]"
        )


def check_same_llm(config: Config, checkpoint: Checkpoint, metadata: dict[str, Any]) -> None:
    """Raise UserError if a frozen llama.model has other weights than when the run started."""
    then, now = checkpoint.state.get("llama"), metadata.get("llama")
    if then and now and config.llama.frozen and then["fingerprint"] != now["fingerprint"]:
        raise UserError(
            f"llama.model: {config.llama.model} is not the model that {checkpoint.folder} was"
            f" trained with (revision {then['revision']} then, {now['revision']} now)"
        )
