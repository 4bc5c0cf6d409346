"""What the parts of the GPU check share: their results, their sizes, their data."""

from __future__ import annotations

import json
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import release_memory, seconds_of
from hybrid.config import Config, from_dict
from hybrid.context import LocalContext, Signal
from hybrid.dataset import prepare

RESULTS = "gpu_check.jsonl"


def append(out: Path, part: str, what: str, **found: Any) -> None:
    """Write one result as a JSON line to the results file in `out`, at once."""
    line = {"part": part, "what": what, **found}
    with (out / RESULTS).open("a") as file:
        file.write(json.dumps(line) + "\n")


@dataclass(frozen=True, kw_only=True)
class Session:
    """One part of the check in a process of its own."""

    part: str
    device: torch.device
    tiny: bool
    """Run the same code at sizes for a CPU."""
    out: Path
    scratch: Path
    """A folder for data and runs, removed when the part ends."""
    seconds: float
    """Time limit of the part."""
    started: float = field(default_factory=time.monotonic)

    @property
    def left(self) -> float:
        """Seconds until the time limit."""
        return self.seconds - (time.monotonic() - self.started)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that models compute in on the device."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    def record(self, what: str, **found: Any) -> None:
        """Write a result at once. `ok` is for checks, `predicted` for what an H100 should give."""
        append(self.out, self.part, what, **found)

    def predicted(self, value: float | str | None) -> float | str:
        """What is predicted for an H100; empty without a prediction and at tiny sizes."""
        return "" if value is None or self.tiny else value

    @contextmanager
    def measuring(self, what: str) -> Iterator[None]:
        """Start with free memory; record an error as the result of `what` and go on.

        Running out of memory is not a failed check, any other error is.
        """
        release_memory()
        try:
            yield
        except torch.OutOfMemoryError as error:
            self.record(what, failed=f"out of memory: {_first_line(error)}")
        except Exception as error:
            traceback.print_exc()
            self.record(what, failed=f"{type(error).__name__}: {_first_line(error)}", ok=False)

    def config(self, data: dict[str, Any], **sections: dict[str, Any]) -> Config:
        """Build the config of a run in `scratch` and prepare its data there."""
        return experiment(self.scratch, self.device, data, **sections)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:150]


def experiment(
    root: Path, device: torch.device, data: dict[str, Any], **sections: dict[str, Any]
) -> Config:
    """Build the config of a run under `root` without Ray and W&B, and prepare its data."""
    defaults: dict[str, dict[str, Any]] = {
        "training": {
            "steps": 10**6,
            "save_every": 10**6,
            "keep_checkpoints": 1,
            "train_accuracy_pairs": 0,
        },
        "cluster": {"num_workers": 0, "use_gpu": device.type == "cuda"},
        "logging": {"run": "run", "every": 1, "wandb": False},
    }
    raw = {name: keys | sections.pop(name, {}) for name, keys in defaults.items()}
    folder = root / f"data-{data.get('canvas', 'full')}-{data['max_side']}"
    paths = {"root": str(root), "data": str(folder)}
    config = from_dict({"paths": paths, "data": data, **raw, **sections})
    prepare(config.data, config.data_folder, say=lambda line: None)
    return config


class TimedContext(LocalContext):
    """One process that stops training, with a checkpoint, when its time is over."""

    def __init__(self, device: torch.device, seconds: float) -> None:
        super().__init__(device)
        self.end = time.monotonic() + seconds

    def signal(self) -> Signal:
        """STOP when the time is over."""
        return Signal.STOP if time.monotonic() >= self.end else Signal.NONE


def median_seconds(work: Callable[[], object], *, calls: int = 5, warm_up: int = 2) -> float:
    """Median time of a call after `warm_up` calls."""
    for _ in range(warm_up):
        work()
    return statistics.median(seconds_of(work) for _ in range(calls))
