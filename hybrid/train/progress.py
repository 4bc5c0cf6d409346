"""Show a run's progress from its metrics.jsonl, which works wherever the workers run."""

from __future__ import annotations

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
from hybrid.train.tracking import parse_metrics

PLAIN_EVERY_S = 15.0
"""Seconds between lines if stderr is not a terminal."""


@contextmanager
def show_progress(config: Config) -> Iterator[None]:
    """Show a progress bar, or plain lines without a terminal, while the run trains."""
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
    shown = _last(path)  # written by an earlier process
    every = max(show.every, PLAIN_EVERY_S) if storage.is_cached(path) else show.every
    while not stop.wait(every):
        metrics = _last(path)
        if metrics and metrics != shown:
            show(metrics)
            shown = metrics


def _last(path: Path) -> dict[str, Any] | None:
    """Return the newest complete line that has a loss."""
    try:
        if storage.is_cached(path):  # no download: this process may be its writer
            data = storage.read(path) or b""
        else:
            with path.open("rb") as file:
                file.seek(max(0, path.stat().st_size - 4096))
                data = file.read()
    except (OSError, UserError):
        return None
    return next((m for m in reversed(parse_metrics(data)) if "loss" in m), None)
