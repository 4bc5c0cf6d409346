"""Time to save and load a checkpoint, relative to torch.save and torch.load of the same tensors.

    python -m benchmarks.checkpoints

The published model, 40 thousand puzzle embeddings, 16 slots. Our checkpoints are written atomically
and their hashes are verified on loading; torch's is a pickle without either. `bytes alone` writes
and reads the same bytes as one file. All sides flush to disk; all read from the page cache, because
the files were just written. Writes benchmarks/results/checkpoints.json.
"""

from __future__ import annotations

import os
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import faster, in_turns, record, table
from hybrid.checkpoint import newest
from hybrid.config import Config, load
from hybrid.context import LocalContext
from hybrid.dataset import Dataset, prepare
from hybrid.train.checkpointing import restore, save_checkpoint
from hybrid.train.state import TrainState, create_state

CPU = torch.device("cpu")
CONFIG = Path(__file__).parents[1] / "configs" / "trm_arc1.yaml"
ROUNDS = 10


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        rows = compare(Path(folder))
    print(table(rows))
    record("checkpoints", rows)


def compare(root: Path, *keys: str) -> list[dict[str, Any]]:
    """Return one line per way to save and to load; `keys` override the config."""
    folders = [f"paths.root={root / 'root'}", f"paths.data={root / 'data'}"]
    config = load(CONFIG, ["data.training=[]", "data.variants=100", *folders, *keys])
    prepare(config.data, config.data_folder, say=lambda line: None)
    dataset = Dataset.open(config.data_folder)
    state = create_state(config, dataset, range(16), CPU)
    return _compare(config, dataset, state, root)


def _compare(
    config: Config, dataset: Dataset, state: TrainState, root: Path
) -> list[dict[str, Any]]:
    config = replace(config, training=replace(config.training, batch_size=16))
    context, ours, torch_file = LocalContext(CPU), root / "ours", root / "torch.pt"
    raw = root / "raw"

    def save() -> None:
        state.step += 1
        save_checkpoint(state, {"kind": "trm"}, dataset, config, context, ours)

    def open_newest() -> None:
        found = newest(ours)
        assert found is not None
        restore(state, found)

    def save_torch() -> None:
        torch.save(tensors, torch_file)
        with torch_file.open("rb+") as file:
            os.fsync(file.fileno())

    def read_torch() -> None:
        for name, value in torch.load(torch_file).items():
            tensors[name].copy_(value)

    save()
    size = sum(path.stat().st_size for path in ours.glob("*/*.safetensors"))
    content = os.urandom(size)
    tensors = _tensors(state)
    rows = []
    for what, works in (
        (
            "save",
            {
                "torch": save_torch,
                "ours": save,
                "bytes alone": lambda: _write(raw, content),
            },
        ),
        (
            "load",
            {"torch": read_torch, "ours": open_newest, "bytes alone": raw.read_bytes},
        ),
    ):
        seconds = in_turns(works, rounds=ROUNDS)
        rows += [
            {
                "what": what,
                "side": side,
                "MB": round(size / 1e6, 1),
                "s": round(statistics.median(took), 3),
                "times torch": faster(seconds["torch"], took),
            }
            for side, took in seconds.items()
        ]
    return rows


def _tensors(state: TrainState) -> dict[str, torch.Tensor]:
    """Return all tensors of a checkpoint by name."""
    parts = {
        "model": state.model.state_dict(),
        "ema": state.ema.values,
        "m": state.optimizer.m,
        "v": state.optimizer.v,
        "carry": state.carry.to_tensors(),
    }
    return {f"{part}.{name}": value for part, of in parts.items() for name, value in of.items()}


def _write(path: Path, content: bytes) -> None:
    """Write and flush to disk, as our checkpoints do."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


if __name__ == "__main__":
    main()
