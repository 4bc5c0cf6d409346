"""Rows per second and memory of the training stream.

    python -m benchmarks.stream [--synthetic TASKS]

Measures ARC-AGI-2's 1,120 tasks with 1,000 variants each, and synthetic tasks of similar size (by
default 10,000) with ten. Each dataset has its own process: memory after opening the dataset and
after 40,000 more rows, which should be equal. Writes benchmarks/results/stream.json.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.measure import record, table
from hybrid.dataset import DataConfig, Dataset, Stream, prepare

ROWS = 256
ROUNDS = 160


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--synthetic", type=int, default=10_000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        challenges = root / "synthetic_challenges.json"
        challenges.write_text(json.dumps(synthetic(arguments.synthetic)))
        arc = DataConfig(
            training=("arc2-training",),
            evaluation=("arc2-evaluation",),
            variants=1000,
            on_overlap="drop",
        )
        sets = {
            "ARC-AGI-2": arc,
            "ARC-AGI-2, bucketed": replace(arc, canvas="bucketed"),
            "synthetic": DataConfig(training=(str(challenges),), evaluation=(), variants=10),
        }
        start = multiprocessing.get_context("spawn")
        with start.Pool(1, maxtasksperchild=1) as pool:
            rows = []
            for name, config in sets.items():
                data = root / name
                seconds = pool.apply(timed_prepare, (config, data))
                rows.append(
                    {"set": name, "prepare s": seconds, **pool.apply(measure_stream, (data,))}
                )
    print(table(rows))
    record("stream", rows)


def synthetic(count: int) -> dict[str, Any]:
    """Return tasks of four pairs with sides 3 to 20, in the format of a Kaggle file."""
    rng = np.random.default_rng(0)

    def pair() -> dict[str, Any]:
        shape = rng.integers(3, 21, 2)
        return {name: rng.integers(0, 10, shape).tolist() for name in ("input", "output")}

    return {
        f"s{n:06d}": {"train": [pair() for _ in range(3)], "test": [pair()]} for n in range(count)
    }


def timed_prepare(config: DataConfig, folder: Path) -> float:
    started = time.perf_counter()
    prepare(config, folder, say=lambda line: None)
    return round(time.perf_counter() - started, 1)


def measure_stream(folder: Path) -> dict[str, Any]:
    """Return the time and memory of opening a dataset and of reading rows, in this process."""
    started = time.perf_counter()
    before = resident()
    dataset = Dataset.open(folder)
    stream = Stream(dataset, 0)
    stream.rows(np.arange(ROWS))
    opened, memory = time.perf_counter() - started, resident()
    rates = []
    for number in range(ROUNDS):
        positions = np.arange(number * ROWS, (number + 1) * ROWS)
        started = time.perf_counter()
        stream.rows(positions)
        rates.append(ROWS / (time.perf_counter() - started))
    return {
        "tasks": len(dataset.tasks),
        "variants": len(dataset.task_of),
        "open s": round(opened, 1),
        "rows/s": round(float(np.median(rates))),
        "open MiB": round(memory - before),
        "after rows MiB": round(resident() - before),
        "peak MiB": round(peak() - before),
    }


def resident() -> float:
    """Return the resident memory of this process in MiB."""
    mebibytes: float = psutil.Process().memory_info().rss / 2**20
    return mebibytes


def peak() -> float:
    """Return the peak resident memory in MiB; getrusage may include the parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    [kibibytes] = [line.split()[1] for line in lines if line.startswith("VmHWM")]
    return int(kibibytes) / 1024


if __name__ == "__main__":
    main()
