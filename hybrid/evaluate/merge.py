"""From answers to scores. Here, and only here, predictions meet the true outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hybrid.arc import Grid, Rate, Scores, Task, grid_hash, pair_hash, score, string_to_grid
from hybrid.checkpoint import Checkpoint
from hybrid.config import Config
from hybrid.dataset import Dataset
from hybrid.evaluate.solve import Prediction

COVERAGE = (1, 2, 5, 10, 100, 1000)


def merge(
    config: Config,
    dataset: Dataset,
    checkpoint: Checkpoint,
    tasks: Sequence[Task],
    answered: Mapping[str, Prediction],
    trained_on: Sequence[str],
) -> dict[str, Any]:
    """results.json. It depends on what was asked and answered, not on the order answers came in."""
    ranked = {task.id: _ranked(answered[task.id]) for task in tasks if task.id in answered}
    known = all(pair.output is not None for task in tasks for pair in task.test)
    missing = [task.id for task in tasks if task.id not in answered]
    notes = [f"no answer came back for {', '.join(missing)}: counted as wrong"] if missing else []
    results: dict[str, Any] = {
        "title": f"{config.logging.run}, {checkpoint.folder.name}",
        "oracle": False,
        "protocol": protocol(config, dataset, checkpoint, tasks, answered, trained_on),
        "spent": {
            key: sum(answered[task.id]["spent"][key] for task in tasks if task.id in answered)
            for key in ("rows", "act_steps", "seconds")
        },
        "notes": notes if known else [*notes, "the answers are not known: nothing is scored"],
        "tasks": [_task_result(task, ranked.get(task.id, [])) for task in tasks],
    }
    if known:
        results["scores"] = {f"pass@{k}": _plain(score(tasks, ranked, k)) for k in (1, 2)}
        results["coverage"] = {str(k): _rate(score(tasks, ranked, k).outputs) for k in COVERAGE}
    return results


def protocol(
    config: Config,
    dataset: Dataset,
    checkpoint: Checkpoint,
    tasks: Sequence[Task],
    answered: Mapping[str, Prediction],
    trained_on: Sequence[str],
) -> dict[str, Any]:
    """What a reader must know to compare the number with another one."""
    counts = dataset.meta["evaluation"]
    whole = len(tasks) == counts["of"]
    asked = f"{len(tasks)} of {counts['of']} tasks"
    halts = {
        "published": f"all {checkpoint.state['trm']['halt_max_steps']} ACT steps",
        "fixed": f"{config.evaluation.act_steps} ACT steps",
        "confident": "until the halt head says so",
    }
    same = checkpoint.state["dataset"]["fingerprint"] == dataset.fingerprint
    voting = [test["variants"] for p in answered.values() for test in p["tests"]] or [0]
    fewest, views = min(voting), max(voting)
    return {
        "sources": ", ".join(
            f"{name} ({dataset.meta['sources'][name]})"
            for name in dataset.meta["config"]["evaluation"]
        ),
        "asked": asked if whole else f"a subset: {asked} (canvas of side {dataset.canvas})",
        "test outputs asked": sum(len(task.test) for task in tasks),
        "training data": verdict(tasks, trained_on),
        "puzzle ids": "as trained" if same else "blank: the dataset is not the trained one",
        "attempts scored": "2 a test output",
        "views voting": views if fewest == views else f"{fewest} to {views}",
        "vote": "count, then mean halt probability; grids that are empty do not vote",
        "halting": halts[config.evaluation.halt],
        "weights": "moving average",
        "computed on": "a GPU" if config.cluster.use_gpu else "CPUs",
        "checkpoint": str(checkpoint.folder),
        "checkpoint digest": checkpoint.digest[:16],
        "dataset fingerprint": dataset.fingerprint[:16],
    }


def verdict(tasks: Sequence[Task], trained_on: Sequence[str]) -> str:
    """Whether the model has seen the tasks' demonstrations, or worse, their tests."""
    pairs = set(trained_on)
    inputs = {pair.split("|")[0] for pair in pairs}

    def seen(pair: Any) -> bool:
        return grid_hash(pair.input) in inputs if pair.output is None else pair_hash(pair) in pairs

    leaked = [task.id for task in tasks if any(seen(pair) for pair in task.test)]
    if leaked:
        named = ", ".join(leaked[:5]) + (", ..." if len(leaked) > 5 else "")
        return f"CONTAMINATED: {len(leaked)} tasks have a test among the training pairs ({named})"
    demonstrations = sum(any(seen(pair) for pair in task.train) for task in tasks)
    if demonstrations == 0:
        return "inductive: no pair of these tasks was trained on"
    return f"transductive: demonstrations of {demonstrations} of {len(tasks)} tasks were trained on"


def describe(results: Mapping[str, Any]) -> str:
    """The scores as lines for a terminal, each with numerator, denominator and interval."""
    lines = [f"{key}: {value}" for key, value in results["protocol"].items()]
    names = {"outputs": "test outputs", "task_mean": "mean over tasks", "tasks": "whole tasks"}
    for attempt, metrics in results.get("scores", {}).items():
        lines += [f"{attempt} {names[key]}: {_line(rate)}" for key, rate in metrics.items()]
    lines += [f"coverage@{k}: {_line(rate)}" for k, rate in results.get("coverage", {}).items()]
    spent = results["spent"]
    lines.append(
        f"spent: {spent['rows']} rows, {spent['act_steps']} ACT steps, {spent['seconds']:.1f} s"
    )
    return "\n".join([*lines, *results["notes"]])


def _line(rate: Mapping[str, Any]) -> str:
    return str(Rate(numerator=rate["numerator"], denominator=rate["denominator"]))


def _ranked(prediction: Prediction) -> list[list[Grid]]:
    return [
        [string_to_grid("\n".join(candidate["grid"])) for candidate in test["candidates"]]
        for test in prediction["tests"]
    ]


def _task_result(task: Task, ranked: Sequence[Sequence[Grid]]) -> dict[str, Any]:
    outputs = []
    for index, pair in enumerate(task.test):
        candidates = ranked[index] if index < len(ranked) else ()
        rank = None
        if pair.output is not None:
            hits = (n for n, grid in enumerate(candidates, 1) if np.array_equal(grid, pair.output))
            rank = next(hits, None)
        outputs.append(
            {
                "right@1": None if pair.output is None else rank == 1,
                "right@2": None if pair.output is None else rank in (1, 2),
                "right_rank": rank,
                "candidates": len(candidates),
            }
        )
    known = all(pair.output is not None for pair in task.test)
    solved = all(output["right@2"] for output in outputs) if known else None
    return {"id": task.id, "solved": solved, "outputs": outputs}


def _plain(scores: Scores) -> dict[str, Any]:
    return {key: _rate(getattr(scores, key)) for key in ("outputs", "task_mean", "tasks")}


def _rate(rate: Rate) -> dict[str, Any]:
    return {
        "numerator": rate.numerator,
        "denominator": rate.denominator,
        "value": rate.value,
        "low": rate.low,
        "high": rate.high,
    }
