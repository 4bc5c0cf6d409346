"""Shows a run's progress by reading its metrics.jsonl, wherever the workers are."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from hybrid import storage
from hybrid.config import Config
from hybrid.dataset import Dataset, Stream
from hybrid.errors import UserError
from hybrid.train.preflight import total_steps

PLAIN_EVERY_S = 15.0
"""Seconds between lines where there is no terminal to draw a bar on."""


@contextmanager
def watch(config: Config) -> Iterator[None]:
    """Inside, a bar (or plain lines without a terminal) follows the run."""
    dataset = Dataset.open(config.data_folder)
    total = total_steps(config, len(Stream(dataset, config.training.seed)))
    console = Console(stderr=True)
    show = _Bar(console, total) if console.is_terminal else _Lines(console, total)
    stop = threading.Event()
    thread = threading.Thread(
        target=_follow, args=(config.run_folder / "metrics.jsonl", show, stop), daemon=True
    )
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        show.close()


class _Lines:
    every = PLAIN_EVERY_S

    def __init__(self, console: Console, total: int) -> None:
        self.console = console
        self.total = total

    def __call__(self, metrics: dict[str, Any]) -> None:
        left = (self.total - metrics["step"]) * metrics["seconds_per_step"]
        self.console.print(
            f"step {metrics['step']}/{self.total} {_text(metrics)} {left / 60:.1f} min left",
            highlight=False,
        )

    def close(self) -> None:
        pass


class _Bar:
    every = 0.5

    def __init__(self, console: Console, total: int) -> None:
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[text]}"))
        self.progress = Progress(*columns, TimeRemainingColumn(), console=console)
        self.task = self.progress.add_task("train", total=total, text="")
        self.progress.start()

    def __call__(self, metrics: dict[str, Any]) -> None:
        self.progress.update(self.task, completed=metrics["step"], text=_text(metrics))

    def close(self) -> None:
        self.progress.stop()


def _text(metrics: dict[str, Any]) -> str:
    return (
        f"loss {metrics['loss']:.3f} exact {metrics['exact_accuracy']:.1%}"
        f" {metrics['samples_per_s']:.0f} samples/s"
    )


def _follow(path: Path, show: _Bar | _Lines, stop: threading.Event) -> None:
    # What an earlier run has written is not progress of this one.
    shown = _last(path)
    every = max(show.every, PLAIN_EVERY_S) if storage.is_cached(path) else show.every
    while not stop.wait(every):
        metrics = _last(path)
        if metrics and metrics != shown:
            show(metrics)
            shown = metrics


def _last(path: Path) -> dict[str, Any] | None:
    """The newest whole line that has a loss in it."""
    try:
        if storage.is_cached(path):  # whose writer may be in this very process
            lines = (storage.read(path) or b"").split(b"\n")[:-1]
        else:
            with path.open("rb") as file:
                file.seek(max(0, path.stat().st_size - 4096))
                lines = file.read().split(b"\n")[:-1]
    except (OSError, UserError):
        return None
    for line in reversed(lines):
        try:
            metrics: dict[str, Any] = json.loads(line)
        except ValueError:
            continue
        if "loss" in metrics:
            return metrics
    return None
