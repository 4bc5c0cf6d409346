"""Outputs of a running run: metrics.jsonl, train_<rank>.log and W&B."""

from __future__ import annotations

import json
import logging
import netrc
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from hybrid import storage
from hybrid.arc import Grid, tokens_to_grid
from hybrid.config import Config, to_dict
from hybrid.dataset.stream import Rows
from hybrid.errors import UserError, make_folder

log = logging.getLogger(__name__)

WANDB_INIT_TIMEOUT_S = 20.0
"""wandb.init timeout, seconds."""
WANDB_FINISH_TIMEOUT_S = 120.0
"""wandb.finish timeout, seconds."""
MAX_IMAGES = 8
CELL = 12
"""Pixels of a grid cell in an image."""
COLOURS = "000000 0074d9 ff4136 2ecc40 ffdc00 aaaaaa f012be ff851b 7fdbff 870c25"
Metrics = Mapping[str, float | int | str]


class RunTracker:
    """Context manager that writes metrics and W&B on rank 0 and a log file on every rank."""

    def __init__(self, config: Config, *, project: str, rank: int, resumed_at: int | None) -> None:
        folder = config.run_folder
        make_folder(folder)
        try:
            self._open(config, folder, project, rank, resumed_at)
        except OSError as error:
            raise UserError(f"{storage.uri(folder)}: cannot be written to ({error})") from error

    def _open(
        self, config: Config, folder: Path, project: str, rank: int, resumed_at: int | None
    ) -> None:
        storage.download(folder / f"train_{rank}.log")
        self._files = [folder / f"train_{rank}.log"]
        self._handler = logging.FileHandler(folder / f"train_{rank}.log")
        self._handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        self._logger = logging.getLogger("hybrid")
        self._logger.setLevel(logging.INFO)
        self._logger.addHandler(self._handler)
        self._metrics = None
        self._wandb: Any = None
        if rank == 0:
            storage.download(folder / "metrics.jsonl")
            forget_after(folder / "metrics.jsonl", -1 if resumed_at is None else resumed_at)
            self._files.append(folder / "metrics.jsonl")
            self._metrics = (folder / "metrics.jsonl").open("a")
            if config.logging.wandb:
                self._wandb = _start_wandb(config, project)

    def __enter__(self) -> RunTracker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            log.info("stopped: %s: %s", type(error).__name__, error)
        if self._metrics:
            with suppress(OSError):  # `write` has logged it
                self._metrics.close()
        if self._wandb:
            self._wandb.finish(exit_code=int(error is not None))
        self._logger.removeHandler(self._handler)
        self._logger.setLevel(logging.NOTSET)
        self._handler.close()
        self.upload()

    def upload(self) -> None:
        """Upload the files if the run folder is in an object store."""
        try:
            for path in self._files:
                storage.upload(path)
        except UserError as error:  # only a checkpoint that cannot be uploaded ends a run
            log.warning("%s", error)

    def log_predictions(self, step: int, rows: Rows, correct: npt.NDArray[np.bool_]) -> None:
        """Log the first MAX_IMAGES training pairs with their predictions as images in W&B."""
        if not self._wandb:
            return
        import wandb

        names = ("inputs", "predicted", "labels")
        table = wandb.Table(columns=["input", "predicted", "answer", "correct"])
        for row in range(min(MAX_IMAGES, len(correct))):
            grids = [tokens_to_grid(np.asarray(rows[name][row])) for name in names]
            table.add_data(*(wandb.Image(grid_image(grid)) for grid in grids), bool(correct[row]))
        self._wandb.log({"training pairs": table}, step=step)

    def write(self, metrics: Metrics) -> None:
        """Write the metrics of a step to metrics.jsonl, the log and W&B."""
        if not self._metrics:
            return
        try:
            self._metrics.write(json.dumps(metrics) + "\n")
            self._metrics.flush()
        except OSError as error:  # only a checkpoint that cannot be written ends a run
            log.warning("metrics.jsonl: %s", error)
        log.info(" ".join(f"{key}={_short(value)}" for key, value in metrics.items()))
        if self._wandb:
            self._wandb.log(dict(metrics), step=int(metrics["step"]))


def grid_image(grid: Grid) -> npt.NDArray[np.uint8]:
    """Render a grid in ARC's colours, with lines between cells; returns [h, w, 3]."""
    colours = np.array([list(bytes.fromhex(c)) for c in COLOURS.split()], np.uint8)
    pixels = colours[grid if grid.size else np.zeros((1, 1), np.uint8)]
    pixels = pixels.repeat(CELL, axis=0).repeat(CELL, axis=1)
    pixels[::CELL] = pixels[:, ::CELL] = 85
    return pixels


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the complete lines of a metrics.jsonl file."""
    return parse_metrics(path.read_bytes())


def parse_metrics(data: bytes) -> list[dict[str, Any]]:
    """Return the complete lines among bytes of a metrics.jsonl file."""
    lines = []
    for line in data.splitlines():
        try:
            metrics = json.loads(line)
        except ValueError:
            continue  # incomplete: the writer was killed
        if isinstance(metrics, dict) and "step" in metrics:
            lines.append(metrics)
    return lines


def forget_after(path: Path, step: int) -> None:
    """Drop the lines after `step`, which a resumed run repeats, and an incomplete last line."""
    if not path.exists():
        return
    kept = "".join(json.dumps(m) + "\n" for m in read_metrics(path) if m["step"] <= step)
    if kept != path.read_text():
        storage.write(path, kept)


def _short(value: float | int | str) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _start_wandb(config: Config, project: str) -> Any:
    """Start a W&B run, offline without an API key; log a warning and return None on failure."""
    import wandb  # takes half a second

    try:
        return wandb.init(
            project=project,
            name=config.logging.run,
            dir=str(config.run_folder),
            config=to_dict(config),
            mode=None if _has_key() or "WANDB_MODE" in os.environ else "offline",
            settings=wandb.Settings(
                silent=True,
                init_timeout=WANDB_INIT_TIMEOUT_S,
                finish_timeout=WANDB_FINISH_TIMEOUT_S,
            ),
        )
    except (wandb.Error, OSError) as error:
        log.warning("W&B could not start, training continues without it: %s", error)
        return None


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False
