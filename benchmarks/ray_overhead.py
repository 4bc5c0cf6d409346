"""What Ray adds to training: the same steps in one process and under Ray with one worker.

    python -m benchmarks.ray_overhead [FOLDER]

Both run in turns, on the demo's tasks, with the demo's model and with one of 512 units on the full
canvas. Of a step the medians are compared, as metrics.jsonl has them (the first lines, in which
everything is started, left out); start-up is what a run takes beside its steps. Writes
benchmarks/results/ray_overhead.json.
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.measure import record
from hybrid.cluster import pretrain
from hybrid.config import Config, load
from hybrid.dataset import prepare
from hybrid.train.runlog import read_metrics

ROUNDS = 3
SKIPPED_LINES = 2
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
    keys: tuple[str, ...] = ()


SIZES = (
    Size(name="demo: 0.33 M parameters, 6 x 6, batch 16", steps=600, every=50),
    Size(name="7 M parameters, 30 x 30, batch 2", steps=30, every=5, keys=LARGE),
)


def main() -> None:
    root = Path(sys.argv[1] if len(sys.argv) > 1 else "out/ray_overhead").absolute()
    shutil.rmtree(root, ignore_errors=True)
    found = []
    for number, size in enumerate(SIZES):
        runs: dict[int, list[dict[str, float]]] = {0: [], 1: []}
        for turn in range(ROUNDS):
            for workers in runs:
                runs[workers].append(timed(config(root, number, size, workers, turn)))
        found.append({"model": size.name, **compare(runs)})
    record("ray_overhead", {"rounds": ROUNDS, "sizes": found})
    print(json.dumps(found, indent=1))


def config(root: Path, number: int, size: Size, workers: int, turn: int) -> Config:
    made = load(
        DEMO,
        [
            f"paths.root={root}/{number}",
            f"training.steps={size.steps}",
            f"training.save_every={size.steps}",
            "training.probe_pairs=0",
            f"cluster.num_workers={workers}",
            f"logging.run=turn{turn}-workers{workers}",
            f"logging.every={size.every}",
            "logging.wandb=false",
            *size.keys,
        ],
    )
    prepare(made.data, made.data_folder, say=lambda line: None)
    return made


def timed(config: Config) -> dict[str, float]:
    started = time.perf_counter()
    pretrain(config)
    wall = time.perf_counter() - started
    lines = [m for m in read_metrics(config.run_folder / "metrics.jsonl") if "loss" in m]
    steady = [m["seconds_per_step"] for m in lines[SKIPPED_LINES:]]
    step = statistics.median(steady)
    return {"step": step, "start": wall - step * lines[-1]["step"], "wall": wall}


def compare(runs: dict[int, list[dict[str, float]]]) -> dict[str, Any]:
    """Medians over the rounds, and the ratio in each."""
    ratios = [there["step"] / here["step"] for here, there in zip(runs[0], runs[1], strict=True)]
    names = {0: "one process", 1: "one Ray worker"}
    return {
        "step, Ray / one process": {
            "median": round(statistics.median(ratios), 3),
            "rounds": [round(ratio, 3) for ratio in ratios],
        },
        **{
            name: {
                "ms a step": round(1000 * statistics.median(r["step"] for r in runs[workers]), 2),
                "s beside steps": round(statistics.median(r["start"] for r in runs[workers]), 1),
            }
            for workers, name in names.items()
        },
    }


if __name__ == "__main__":
    main()
