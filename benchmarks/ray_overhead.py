"""Overhead of Ray in training: the same steps in one process and with one and two Ray workers.

    python -m benchmarks.ray_overhead [FOLDER]

All sides alternate on the demo's tasks, with the demo's model and with one of hidden size 512 on
the full canvas; workers share the batch. Compares the median step time in metrics.jsonl, without
the first lines, and the share of a step spent on waiting for rows: one process computes them
itself, a worker waits for Ray Data. The overhead of a run is its time outside the steps. Writes
benchmarks/results/ray_overhead.json.
"""

from __future__ import annotations

import shutil
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.measure import faster, record, table
from hybrid.config import Config, load
from hybrid.dataset import prepare
from hybrid.launch import pretrain
from hybrid.train.tracking import read_metrics

SKIPPED_LINES = 2
SIDES = {0: "one process", 1: "one Ray worker", 2: "two Ray workers"}
DEMO = Path(__file__).parents[1] / "configs" / "demo.yaml"
LARGE = (
    *("trm.hidden_size=512", "trm.num_heads=8", "trm.expansion=4", "trm.puzzle_emb_ndim=512"),
    *("trm.puzzle_emb_len=16", "data.max_side=30", "training.batch_size=2"),
)


@dataclass(frozen=True, kw_only=True)
class Size:
    name: str
    steps: int
    every: int
    rounds: int
    keys: tuple[str, ...] = ()


SIZES = (
    Size(name="demo: 0.33 M, 6 x 6, batch 16", steps=200, every=20, rounds=2),
    Size(name="7 M, 30 x 30, batch 2", steps=10, every=2, rounds=1, keys=LARGE),
)


def main() -> None:
    root = Path(sys.argv[1] if len(sys.argv) > 1 else "out/ray_overhead").absolute()
    shutil.rmtree(root, ignore_errors=True)
    rows: list[dict[str, Any]] = []
    for number, size in enumerate(SIZES):
        runs: dict[int, list[dict[str, float]]] = {workers: [] for workers in SIDES}
        for turn in range(size.rounds):
            for workers, timings in runs.items():
                timings.append(timed(config(root, number, size, workers, turn)))
        rows += compare(size.name, runs)
    print(table(rows))
    record("ray_overhead", rows)


def config(root: Path, number: int, size: Size, workers: int, turn: int) -> Config:
    loaded = load(
        DEMO,
        [
            f"paths.root={root}/{number}",
            f"training.steps={size.steps}",
            f"training.save_every={size.steps}",
            "training.train_accuracy_pairs=0",
            f"cluster.num_workers={workers}",
            "cluster.cpus_per_worker=0.5",  # two workers and the data stream, on two cores
            f"logging.run=turn{turn}-workers{workers}",
            f"logging.every={size.every}",
            "logging.wandb=false",
            *size.keys,
        ],
    )
    prepare(loaded.data, loaded.data_folder, say=lambda line: None)
    return loaded


def timed(config: Config) -> dict[str, float]:
    """Return seconds per step, seconds outside steps, and the share of a step spent on rows."""
    started = time.perf_counter()
    pretrain(config)
    wall = time.perf_counter() - started
    lines = [m for m in read_metrics(config.run_folder / "metrics.jsonl") if "loss" in m]
    steady = lines[SKIPPED_LINES:]
    step = statistics.median(m["seconds_per_step"] for m in steady)
    waiting = statistics.median(m["waiting_for_rows"] for m in steady)
    return {"step": step, "overhead": wall - step * lines[-1]["step"], "waiting": waiting}


def compare(name: str, runs: dict[int, list[dict[str, float]]]) -> list[dict[str, Any]]:
    """Return one line per side with medians over the rounds."""
    return [
        {
            "model": name,
            "side": SIDES[workers],
            "ms a step": round(1000 * statistics.median(r["step"] for r in found), 2),
            "times one process": faster([r["step"] for r in runs[0]], [r["step"] for r in found]),
            "getting rows": round(statistics.median(r["waiting"] for r in found), 3),
            "s beside steps": round(statistics.median(r["overhead"] for r in found), 1),
        }
        for workers, found in runs.items()
    ]


if __name__ == "__main__":
    main()
