"""What a run leaves behind while it runs: metrics.jsonl, train_<rank>.log, W&B."""

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

WANDB_WAITS_S = 20.0
"""So long a run is held up by a W&B that does not answer."""
WANDB_ENDS_S = 120.0
"""And so long by what is still to be sent at its end."""
PICTURES = 8
CELL = 12
COLOURS = "000000 0074d9 ff4136 2ecc40 ffdc00 aaaaaa f012be ff851b 7fdbff 870c25"
Metrics = Mapping[str, float | int | str]


class RunTracker:
    """Rank 0 writes metrics and W&B, every rank its log file. Use as a context manager."""

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
            with suppress(OSError):  # it has been said when the line was written
                self._metrics.close()
        if self._wandb:
            self._wandb.finish(exit_code=int(error is not None))
        self._logger.removeHandler(self._handler)
        self._logger.setLevel(logging.NOTSET)
        self._handler.close()
        self.upload()

    def upload(self) -> None:
        """Send the files to where the run folder is, if that is a store."""
        try:
            for path in self._files:
                storage.upload(path)
        except UserError as error:  # a checkpoint that cannot be sent ends a run, not this
            log.warning("%s", error)

    def show(self, step: int, rows: Rows, right: npt.NDArray[np.bool_]) -> None:
        """The first few of some training pairs and of what was said to them, as pictures in W&B."""
        if not self._wandb:
            return
        import wandb

        names = ("inputs", "said", "labels")
        table = wandb.Table(columns=["input", "said", "answer", "right"])
        for row in range(min(PICTURES, len(right))):
            grids = [tokens_to_grid(np.asarray(rows[name][row])) for name in names]
            table.add_data(*(wandb.Image(picture(grid)) for grid in grids), bool(right[row]))
        self._wandb.log({"training pairs": table}, step=step)

    def write(self, metrics: Metrics) -> None:
        """One line of metrics.jsonl, one of the log, one point in W&B."""
        if not self._metrics:
            return
        try:
            self._metrics.write(json.dumps(metrics) + "\n")
            self._metrics.flush()
        except OSError as error:  # a checkpoint that cannot be written ends a run, not this
            log.warning("metrics.jsonl: %s", error)
        log.info(" ".join(f"{key}={_short(value)}" for key, value in metrics.items()))
        if self._wandb:
            self._wandb.log(dict(metrics), step=int(metrics["step"]))


def picture(grid: Grid) -> npt.NDArray[np.uint8]:
    """[h, w, 3]: a grid in ARC's colours, cells of CELL pixels with a line between them."""
    colours = np.array([list(bytes.fromhex(c)) for c in COLOURS.split()], np.uint8)
    pixels = colours[grid if grid.size else np.zeros((1, 1), np.uint8)]
    pixels = pixels.repeat(CELL, axis=0).repeat(CELL, axis=1)
    pixels[::CELL] = pixels[:, ::CELL] = 85
    return pixels


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics.jsonl."""
    return parse_metrics(path.read_bytes())


def parse_metrics(data: bytes) -> list[dict[str, Any]]:
    """The whole lines among the bytes of a metrics.jsonl."""
    found = []
    for line in data.splitlines():
        try:
            metrics = json.loads(line)
        except ValueError:
            continue  # torn: its writer was killed
        if isinstance(metrics, dict) and "step" in metrics:
            found.append(metrics)
    return found


def forget_after(path: Path, step: int) -> None:
    """Drop the lines of steps that a resumed run is about to take again, and a torn last line."""
    if not path.exists():
        return
    kept = [json.dumps(m) + "\n" for m in read_metrics(path) if m["step"] <= step]
    if "".join(kept) == path.read_text():
        return
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept))
    os.replace(temporary, path)


def _short(value: float | int | str) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _start_wandb(config: Config, project: str) -> Any:
    """A W&B run, offline where there is no key; None, and a line in the log, if it cannot start."""
    import wandb  # half a second that runs without it should not pay

    try:
        return wandb.init(
            project=project,
            name=config.logging.run,
            dir=str(config.run_folder),
            config=to_dict(config),
            mode=None if _has_key() or "WANDB_MODE" in os.environ else "offline",
            settings=wandb.Settings(
                silent=True, init_timeout=WANDB_WAITS_S, finish_timeout=WANDB_ENDS_S
            ),
        )
    except (wandb.Error, OSError) as error:
        log.warning("W&B could not start, going on without: %s", error)
        return None


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False
