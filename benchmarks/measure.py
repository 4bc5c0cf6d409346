"""Timing of alternating runs, so that a slower machine slows all sides, and result files."""

from __future__ import annotations

import gc
import json
import os
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def seconds_of(work: Callable[[], object]) -> float:
    """Return the seconds of one call, including the GPU work that it starts."""
    _wait()
    started = time.perf_counter()
    work()
    _wait()
    return time.perf_counter() - started


def in_turns(
    sides: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    calls: int = 1,
    drop: Callable[[str], object] | None = None,
) -> dict[str, list[float]]:
    """Return seconds per call of each side: `rounds` values, each the mean of `calls` calls.

    The sides alternate. A side that runs out of memory is not in the result; `drop` gets its name
    and may free what the side holds.
    """

    def several(work: Callable[[], object]) -> None:
        for _ in range(calls):
            work()

    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name in list(seconds):
            try:
                seconds[name].append(seconds_of(partial(several, sides[name])) / calls)
                continue
            except torch.OutOfMemoryError:
                del seconds[name]
            # After the block: the exception's traceback holds the tensors of the failed call.
            if drop is not None:
                drop(name)
            release_memory()
    return seconds


def release_memory() -> None:
    """Return unused GPU memory to the device and restart counting its peak."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gib() -> float:
    """Return the peak GiB of GPU memory since `release_memory`; 0 without a GPU."""
    if not torch.cuda.is_available():
        return 0.0
    return round(torch.cuda.max_memory_allocated() / 2**30, 2)


def faster(base: Sequence[float], ours: Sequence[float]) -> dict[str, float]:
    """Return the speed-up of `ours` over `base` per round: median and interquartile range."""
    ratios = sorted(b / o for b, o in zip(base, ours, strict=True))
    low, middle, high = (
        statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    )
    return {"median": round(middle, 3), "from": round(low, 3), "to": round(high, 3)}


def machine() -> dict[str, Any]:
    """Return the date, commit, hardware and software versions of this measurement."""
    about: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "commit": commit(),
        "platform": platform.platform(),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if torch.cuda.is_available():
        about["gpu"] = torch.cuda.get_device_name()
        about["cuda"] = torch.version.cuda
    return about


def record(name: str, found: Any, folder: Path | None = None) -> dict[str, Any]:
    """Write {name}.json to `folder` (default benchmarks/results) and append to history.jsonl."""
    folder = folder or RESULTS
    report = {"benchmark": name, **machine(), "found": found}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
    with (folder / "history.jsonl").open("a") as history:
        history.write(json.dumps(report) + "\n")
    return report


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Format rows with the same keys as aligned text."""
    header = list(rows[0])
    cells = [header, *([_text(row[name]) for name in header] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    )


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Format rows with the same keys as a Markdown table."""
    lines = [list(rows[0]), ["---"] * len(rows[0])]
    lines += [[_text(value) for value in row.values()] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        same = value["from"] == value["to"]
        spread = "" if same else f" ({value['from']:.2f}-{value['to']:.2f})"
        return f"{value['median']:.2f}{spread}"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def commit() -> str:
    """Return $COMMIT, else the commit of the checkout, else `unknown`."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
        return done.stdout.strip()

    if given := os.environ.get("COMMIT"):
        return given
    if shutil.which("git") is None:
        return "unknown"
    # Benchmarks write to results/; that must not mark the checkout as dirty.
    changed = git(
        "status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results"
    )
    return f"{git('describe', '--always') or 'unknown'}{'-dirty' if changed else ''}"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor()
