"""Accuracy on bucketed canvases and on the full canvas: same tasks, same number of steps.

    python -m benchmarks.canvas [--tasks N] [--steps N] [FOLDER]

Trains the demo's model on demonstrations of ARC-1 training tasks: half of them fit a canvas of 11,
the others need one of 16, which is the full canvas here. Evaluates each of the two trained models
on both canvases, to separate the effect on training from the effect on evaluation. Takes half an
hour on two cores and is not part of `make bench`. Writes benchmarks/results/canvas.json.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measure import record, table
from hybrid.arc import Rate, Task, load_tasks, string_to_grid
from hybrid.config import Config, load
from hybrid.dataset import Dataset, prepare
from hybrid.launch import evaluate, pretrain
from hybrid.train.tracking import read_metrics

DEMO = Path(__file__).parents[1] / "configs" / "demo.yaml"
SIDE = 16
CANVASES = ("full", "bucketed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=Path("out/canvas"))
    parser.add_argument("--tasks", type=int, default=40)
    parser.add_argument("--steps", type=int, default=2500)
    arguments = parser.parse_args()
    root = arguments.folder.absolute()
    shutil.rmtree(root, ignore_errors=True)
    write_tasks(root / "tasks", arguments.tasks)
    rows = []
    for trained in CANVASES:
        config = demo_config(root, trained, arguments.steps)
        prepare(config.data, config.data_folder, say=lambda line: None)
        run = pretrain(config)
        lines = [m for m in read_metrics(config.run_folder / "metrics.jsonl") if "loss" in m]
        for on in CANVASES:
            other = demo_config(root, on, arguments.steps)
            prepare(other.data, other.data_folder, say=lambda line: None)
            evaluation = replace(config.evaluation, checkpoint=str(run.checkpoint))
            outcome = evaluate(replace(other, logging=config.logging, evaluation=evaluation))
            answers = Dataset.open(other.data_folder, answers=True)
            rows.append(
                {
                    "trained on": trained,
                    "asked on": on,
                    "steps": run.step,
                    "s a step": round(statistics.median(m["seconds_per_step"] for m in lines), 3),
                    "training rows right": round(
                        statistics.mean(m["exact_accuracy"] for m in lines[-10:]), 3
                    ),
                    **accuracy(outcome.folder, answers.tasks, outcome.results),
                }
            )
            print(table(rows), flush=True)
    record("canvas", rows)


def write_tasks(folder: Path, count: int) -> None:
    """Write `count` tasks, evenly spaced by id: half with known sides up to 10, half 11 to 15."""
    tasks = load_tasks("arc1-training")
    known = {task.id: known_side(task) for task in tasks}
    folder.mkdir(parents=True, exist_ok=True)
    for low, high in ((1, 10), (11, SIDE - 1)):
        fitting = [task for task in tasks if low <= known[task.id] <= high]
        for n in np.linspace(0, len(fitting) - 1, count // 2).astype(int):
            task = fitting[n]
            pairs = {
                name: [{"input": p.input.tolist(), "output": p.output.tolist()} for p in part]
                for name, part in (("train", task.train), ("test", task.test))
                if all(pair.output is not None for pair in part)
            }
            (folder / f"{task.id}.json").write_text(json.dumps(pairs))


def known_side(task: Task) -> int:
    """Return the largest side of the grids that a predictor sees."""
    grids = [grid for pair in task.train for grid in (pair.input, pair.output)]
    grids += [pair.input for pair in task.test]
    return max(int(side) for grid in grids if grid is not None for side in grid.shape)


def demo_config(root: Path, canvas: str, steps: int) -> Config:
    """Return the demo's config with these tasks and this canvas."""
    return load(
        DEMO,
        [
            f"paths.root={root}/{canvas}",
            f"data.evaluation=[{root}/tasks]",
            f"data.max_side={SIDE}",
            f"data.canvas={canvas}",
            f"training.steps={steps}",
            f"training.save_every={steps}",
            "training.train_accuracy_pairs=0",
            "cluster.num_workers=0",
            "logging.wandb=false",
            f"logging.run={canvas}",
        ],
    )


def accuracy(folder: Path, tasks: Sequence[Task], results: Mapping[str, Any]) -> dict[str, Any]:
    """Return the pass@2 rate of test outputs and the share of correct cells in first answers."""
    cells = []
    for task in tasks:
        prediction = json.loads((folder / "predictions" / f"{task.id}.json").read_text())
        for pair, test in zip(task.test, prediction["tests"], strict=True):
            assert pair.output is not None
            best = test["candidates"][:1]
            grid = string_to_grid("\n".join(best[0]["grid"])) if best else None
            same = grid is not None and grid.shape == pair.output.shape
            cells.append(float(np.mean(grid == pair.output)) if same else 0.0)
    rate = results["scores"]["pass@2"]["outputs"]
    right = Rate(numerator=rate["numerator"], denominator=rate["denominator"])
    return {"right": str(right), "cells": round(float(np.mean(cells)), 3)}


if __name__ == "__main__":
    main()
