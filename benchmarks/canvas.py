"""Small canvases against the full one: the same tasks, the same steps, asked on both.

    python -m benchmarks.canvas [--tasks N] [--steps N] [FOLDER]

ARC-1 training tasks, a half of them known to fit the canvas of 11, the others that of 16, with the
demo's model on a full canvas of 16; demonstrations are trained on and test outputs asked. Each of
the two trained models is asked on both canvases, so that what training and what asking does is told
apart. Half an hour on two cores, not a part of `make bench`. Writes benchmarks/results/canvas.json.
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
    asked = parser.parse_args()
    root = asked.folder.absolute()
    shutil.rmtree(root, ignore_errors=True)
    choose(root / "tasks", asked.tasks)
    rows = []
    for trained in CANVASES:
        config = of(root, trained, asked.steps)
        prepare(config.data, config.data_folder, say=lambda line: None)
        run = pretrain(config)
        lines = [m for m in read_metrics(config.run_folder / "metrics.jsonl") if "loss" in m]
        for on in CANVASES:
            other = of(root, on, asked.steps)
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
                    **scored(outcome.folder, answers.tasks, outcome.results),
                }
            )
            print(table(rows), flush=True)
    record("canvas", rows)


def choose(folder: Path, count: int) -> None:
    """Evenly by id, as task files: a half with known grids of up to 10, a half of 11 to 15."""
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
    """Of the largest grid that is known when the test is asked."""
    grids = [grid for pair in task.train for grid in (pair.input, pair.output)]
    grids += [pair.input for pair in task.test]
    return max(int(side) for grid in grids if grid is not None for side in grid.shape)


def of(root: Path, canvas: str, steps: int) -> Config:
    """The demo's settings on these tasks."""
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


def scored(folder: Path, tasks: Sequence[Task], results: Mapping[str, Any]) -> dict[str, Any]:
    """Test outputs right in two answers, and the share of cells that the first one has right."""
    cells = []
    for task in tasks:
        prediction = json.loads((folder / "predictions" / f"{task.id}.json").read_text())
        for pair, test in zip(task.test, prediction["tests"], strict=True):
            assert pair.output is not None
            said = test["candidates"][:1]
            grid = string_to_grid("\n".join(said[0]["grid"])) if said else None
            same = grid is not None and grid.shape == pair.output.shape
            cells.append(float(np.mean(grid == pair.output)) if same else 0.0)
    found = results["scores"]["pass@2"]["outputs"]
    right = Rate(numerator=found["numerator"], denominator=found["denominator"])
    return {"right": str(right), "cells": round(float(np.mean(cells)), 3)}


if __name__ == "__main__":
    main()
