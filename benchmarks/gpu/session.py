"""The environment of one part of the GPU check: results file, sizes, time limit, data."""

from __future__ import annotations

import json
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import release_memory, seconds_of
from hybrid.config import Config, from_dict
from hybrid.context import LocalContext, Signal
from hybrid.dataset import prepare

RESULTS = "gpu_check.jsonl"
CHECKS = ("parity", "resume")
"""Parts that must finish. The others only measure, and a slow GPU may not finish them."""


def append(out: Path, part: str, what: str, **found: Any) -> None:
    """Append one result to the results file in `out` as a JSON line."""
    line = {"part": part, "what": what, **found}
    with (out / RESULTS).open("a") as file:
        file.write(json.dumps(line) + "\n")


def unfinished(part: str) -> dict[str, bool]:
    """Return the result key that marks a check as not finished; empty for a measurement."""
    return {"finished": False} if part in CHECKS else {}


@dataclass(frozen=True, kw_only=True)
class Session:
    """One part of the check, in its own process."""

    part: str
    device: torch.device
    tiny: bool
    """Run the same code at sizes for a CPU."""
    out: Path
    scratch: Path
    """Folder for data and runs; the parent process removes it."""
    deadline: float
    """Time at which the part must end, in seconds since the epoch (`time.time()`)."""

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.time()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that models compute in on the device."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    def record(self, what: str, **found: Any) -> None:
        """Write a result at once. `ok` is for checks, `predicted` for predictions for an H100."""
        append(self.out, self.part, what, **found)

    def predicted(self, value: float | str | None) -> float | str:
        """Return a prediction for an H100; empty if there is none, and at tiny sizes."""
        return "" if value is None or self.tiny else value

    def has_time(self, what: str, seconds: float) -> bool:
        """Return whether `seconds` are left; if not, record `what` as skipped."""
        if self.left >= seconds:
            return True
        skipped = f"skipped: {max(0.0, self.left):.0f} s left of {seconds:.0f} s needed"
        self.record(what, failed=skipped, **unfinished(self.part))
        return False

    @contextmanager
    def measuring(self, what: str) -> Iterator[None]:
        """Start with free memory; record an error as the result of `what` and continue.

        Running out of memory leaves a check unfinished; any other error fails it.
        """
        release_memory()
        try:
            yield
        except torch.OutOfMemoryError as error:
            failed = f"out of memory: {_first_line(error)}"
            self.record(what, failed=failed, **unfinished(self.part))
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
    """Single-process context that stops training, with a checkpoint, after some seconds.

    Time counts from the end of the first step, because the first step compiles.
    """

    def __init__(
        self,
        device: torch.device,
        seconds: Callable[[], float],
        write: Callable[[float, Mapping[str, float]], None],
        points: int,
    ) -> None:
        """`seconds` is called once, after the first step, and returns the training time.

        `write` gets the seconds trained and the metrics, about `points` times; the last metrics of
        the run are always among them.
        """
        super().__init__(device)
        self.seconds, self.write, self.points = seconds, write, points
        self.start: float | None = None
        self.duration = self.next = 0.0

    def signal(self) -> Signal:
        """Return STOP once the time is over."""
        now = time.monotonic()
        if self.start is None:
            self.start, self.duration = now, self.seconds()
        return Signal.STOP if now - self.start >= self.duration else Signal.NONE

    def gauge(self, metrics: Mapping[str, float]) -> None:
        """Write metrics, at most once per interval."""
        trained = time.monotonic() - (self.start or time.monotonic())
        if trained >= min(self.next, self.duration):
            self.write(trained, metrics)
            self.next = trained + self.duration / self.points


@contextmanager
def cudnn_attention(on: bool) -> Iterator[None]:
    """Switch the cuDNN backend of attention on or off, for eager and compiled code.

    A compiled graph keeps the backend that was chosen when it was traced, and neither torch's
    guards nor its AOTAutograd cache look at this switch.
    """
    before = torch.backends.cuda.cudnn_sdp_enabled()
    if on == before:
        yield
        return
    torch._dynamo.reset()
    torch.backends.cuda.enable_cudnn_sdp(on)
    try:
        with torch._functorch.config.patch(enable_autograd_cache=False):
            yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
        torch._dynamo.reset()


def median_seconds(work: Callable[[], object], *, calls: int = 5, warm_up: int = 2) -> float:
    """Return the median time of a call after `warm_up` calls."""
    for _ in range(warm_up):
        work()
    return statistics.median(seconds_of(work) for _ in range(calls))
