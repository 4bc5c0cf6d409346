"""The cost model of docs/scale.md: what 1, 8, 64 and 512 GPUs would do.

    python benchmarks/scale_model.py            # prints the tables of docs/scale.md
    python benchmarks/scale_model.py --measure  # measures what a CPU can, under a minute

Inputs are of three kinds. Measured: benchmarks/results/scale_parts.json, written by --measure.
Published: rates of other people's code on an H100. Assumed: everything that hangs on a network or a
GPU that we do not have. Change them here and print again.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

PARTS = Path(__file__).parent / "results" / "scale_parts.json"
GPUS = (1, 8, 64, 512)

BATCH = 768
STEPS = 400_782
"""Of configs/trm_arc1.yaml."""
SAVE_EVERY = 5000

# Published.
RATE, BEST_RATE = 384, 981
"""Samples/s of one H100: the released code, the fastest fork. A sample is a row's ACT step."""
TRAINING_FLOP, ANSWER_FLOP = 398e9, 3.82e12
"""Of one sample, and of one view answered in 16 ACT steps."""

# Assumed.
FAST, SLOW = 50e9, 1.25e9
"""Bytes/s of a GPU's share of the network: 400 Gb/s InfiniBand, 10 Gb/s Ethernet."""
HOP = 20e-6
"""Seconds before the first byte of a message arrives."""
LAUNCH = 10e-6
"""Seconds that an operation costs however small it is: Python and the launch of its kernel."""
JOINT_ROW = 3.0
"""Seconds of a row with Llama-3.1-8B: a problem read once, 16 attempts one after the other."""
STORAGE = 1e9
"""Bytes/s that shared storage gives to all nodes together."""
START = 30.0
"""Seconds until Ray's workers train; 15 to 40 on two cores for one or two of them."""
TRIALS, TRIAL_HOURS = 32, 6


def ring(size: float, gpus: int, bandwidth: float) -> float:
    """Seconds of an all-reduce: each byte goes round twice, less one station."""
    return 2 * (gpus - 1) * (size / gpus / bandwidth + HOP)


def gather(size: float, gpus: int, bandwidth: float) -> float:
    """Seconds of an all-gather of `size` bytes in total."""
    return (gpus - 1) * (size / gpus / bandwidth + HOP)


class Pretraining:
    """An optimiser step on some GPUs, in seconds."""

    def __init__(
        self, parts: dict[str, Any], gpus: int, rate: float = RATE, bandwidth: float = FAST
    ) -> None:
        # All wait for the worker with the most rows.
        self.rows = math.ceil(BATCH / gpus)
        self.compute = self.rows / rate
        self.launches = parts["operations of a step"] * LAUNCH
        self.all_reduce = ring(4 * parts["trm parameters"], gpus, bandwidth)
        # An id and the gradient of its row, float32.
        self.puzzle_rows = gather(BATCH * 4 * (parts["puzzle row"] + 1), gpus, bandwidth)
        self.step = max(self.compute, self.launches) + self.all_reduce + self.puzzle_rows
        self.used = BATCH / rate / gpus / self.step


def pretraining(parts: dict[str, Any]) -> Iterable[Sequence[str]]:
    yield (
        *("GPUs", "rows at most", "compute ms", "launches ms", "all-reduce ms", "puzzle rows ms"),
        *("step ms", "used", "recipe", "at 981/s", "used at 10 Gb/s"),
    )
    for gpus in GPUS:
        fast, slow = Pretraining(parts, gpus), Pretraining(parts, gpus, bandwidth=SLOW)
        best = Pretraining(parts, gpus, BEST_RATE)
        yield (
            *(f"{gpus}", f"{fast.rows}"),
            *(ms(value) for value in (fast.compute, fast.launches, fast.all_reduce)),
            *(ms(fast.puzzle_rows), ms(fast.step), percent(fast.used)),
            *(span(STEPS * fast.step), span(STEPS * best.step), percent(slow.used)),
        )


def evaluation(parts: dict[str, Any]) -> Iterable[Sequence[str]]:
    answers = RATE * TRAINING_FLOP / ANSWER_FLOP
    yield "GPUs", "busy at most", "views each", "largest task", "whole vote"
    for gpus in GPUS:
        busy = min(gpus, parts["evaluation tasks"])
        each, largest = parts["views asked"] / busy, parts["views of the largest task"]
        wall = START + max(each, largest) / answers
        yield f"{gpus}", f"{busy}", f"{each:,.0f}", f"{largest:,}", span(wall)


def joint(parts: dict[str, Any]) -> Iterable[Sequence[str]]:
    yield "GPUs", "rows a step", "all-reduce s at 10 Gb/s", "step s", "used", "rows an hour"
    size = 4 * (parts["trm parameters"] + parts["adapter parameters"])
    for gpus in GPUS:
        wait = ring(size, gpus, SLOW)
        step = JOINT_ROW + wait
        yield (
            *(f"{gpus}", f"{gpus}", f"{wait:.2f}", f"{step:.2f}"),
            *(percent(JOINT_ROW / step), f"{3600 * gpus / step:,.0f}"),
        )


def sweep(parts: dict[str, Any]) -> Iterable[Sequence[str]]:
    yield "GPUs", "trials at once", "rounds", "wall", "used"
    for gpus in GPUS:
        rounds = math.ceil(TRIALS / gpus)
        wall = rounds * (3600 * TRIAL_HOURS + START)
        used = TRIALS * 3600 * TRIAL_HOURS / (gpus * wall)
        yield f"{gpus}", f"{min(gpus, TRIALS)}", f"{rounds}", span(wall), percent(used)


def storage(parts: dict[str, Any]) -> Iterable[Sequence[str]]:
    yield (
        *("GPUs", "rows/s wanted at most", "CPU cores for them", "checkpoint s"),
        *("of the time between two", "resuming reads GB", "seconds of it at 1 GB/s"),
    )
    shared = parts["checkpoint bytes, shared"]
    slots = BATCH * parts["checkpoint bytes, a slot"]
    for gpus in GPUS:
        step = Pretraining(parts, gpus).step
        wanted = BATCH / step
        # Rank 0 writes what all share and its own slots, then hashes the files of all.
        write = (shared + slots / gpus) / parts["write bytes/s"]
        seconds = write + (shared + slots) / parts["hash bytes/s"]
        reads = gpus * (shared + slots)
        yield (
            *(f"{gpus}", f"{wanted:,.0f}", f"{wanted / parts['stream rows/s a core']:.2f}"),
            *(f"{seconds:.1f}", percent(seconds / (SAVE_EVERY * step)), f"{reads / 1e9:,.0f}"),
            f"{reads / STORAGE:,.0f}",
        )


def inputs(parts: dict[str, Any]) -> Iterable[Sequence[str]]:
    yield "input", "value", "known how"
    for name, value in parts.items():
        yield name, f"{value:,}", "measured"
    for name, value in {
        "samples/s of an H100, released code": RATE,
        "samples/s of an H100, fastest fork": BEST_RATE,
        "GFLOP of a sample": TRAINING_FLOP / 1e9,
        "GFLOP of a view's answer, 16 ACT steps": ANSWER_FLOP / 1e9,
    }.items():
        yield name, f"{value:,g}", "published"
    for name, value in {
        "GB/s of a GPU's share of a fast network (400 Gb/s)": FAST / 1e9,
        "GB/s of a slow one (10 Gb/s Ethernet)": SLOW / 1e9,
        "us before a message's first byte": HOP * 1e6,
        "us of the smallest operation on a GPU": LAUNCH * 1e6,
        "s of a joint row with Llama-3.1-8B": JOINT_ROW,
        "GB/s of shared storage, all nodes together": STORAGE / 1e9,
        "s until Ray's workers train": START,
    }.items():
        yield name, f"{value:g}", "assumed"


TABLES = {
    "Inputs": inputs,
    "Pretraining": pretraining,
    "Evaluation": evaluation,
    "Joint training with Llama-3.1-8B": joint,
    f"A sweep of {TRIALS} trials, one GPU and {TRIAL_HOURS} hours each": sweep,
    "Data, checkpoints": storage,
}


def tables(parts: dict[str, Any]) -> str:
    """All tables, as Markdown."""
    return "\n\n".join(
        f"**{title}**\n\n{markdown(list(table(parts)))}" for title, table in TABLES.items()
    )


def markdown(rows: Sequence[Sequence[str]]) -> str:
    head, *body = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join((head, "|" + "---|" * len(rows[0]), *body))


def ms(seconds: float) -> str:
    return f"{1000 * seconds:.1f}"


def percent(part: float) -> str:
    return f"{100 * part:.0f}%"


def span(seconds: float) -> str:
    for name, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {name}"
    return f"{seconds:.0f} s"


def per_second(count: float, seconds: float) -> int:
    """Of two digits; a second measurement shares no more."""
    return int(float(f"{count / seconds:.2g}"))


def measure() -> dict[str, Any]:
    """What this machine can tell, on all of ARC-AGI-1 as configs/trm_arc1.yaml prepares it."""
    import tempfile

    import torch

    from hybrid.config import load
    from hybrid.dataset import Dataset, prepare

    torch.set_num_threads(1)
    config = load(Path(__file__).parents[1] / "configs/trm_arc1.yaml", ["cluster.use_gpu=false"])
    with tempfile.TemporaryDirectory() as folder:
        prepare(config.data, Path(folder) / "data", say=lambda _: None)
        dataset = Dataset.open(Path(folder) / "data")
        return {
            **_stream(dataset),
            **_evaluation(dataset),
            **_checkpoint(config, dataset, Path(folder) / "checkpoint"),
            **_operations(),
            **_adapters(),
        }


def _stream(dataset: Any) -> dict[str, Any]:
    import time

    from hybrid.dataset import Stream

    stream, rounds = Stream(dataset, 0), 20
    stream.rounds(0, 1, range(BATCH), BATCH)  # draws the first epoch
    started = time.process_time()
    stream.rounds(1, rounds, range(BATCH), BATCH)
    return {"stream rows/s a core": per_second(rounds * BATCH, time.process_time() - started)}


def _evaluation(dataset: Any) -> dict[str, Any]:
    first = dataset.first_variant
    views = [
        int(first[task + 1] - first[task]) * len(dataset.tasks[task].test) for task in dataset.asked
    ]
    return {
        "evaluation tasks": len(views),
        "views asked": sum(views),
        "views of the largest task": max(views),
    }


def _checkpoint(config: Any, dataset: Any, folder: Path) -> dict[str, Any]:
    """Bytes and seconds of what rank 0 of eight writes; the carry in bfloat16, as on a GPU."""
    import hashlib
    import os
    import time
    from dataclasses import replace

    import torch

    from hybrid.train.state import fresh, save

    config = replace(config, trm=replace(config.trm, forward_dtype="bfloat16"))
    slots = range(BATCH // 8)
    state = fresh(config, dataset, slots, torch.device("cpu"))
    started = time.perf_counter()
    save(state, folder, rank=0)
    files = {path.name: path for path in folder.iterdir()}
    for path in files.values():
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
    written = time.perf_counter() - started
    sizes = {name: path.stat().st_size for name, path in files.items()}
    started = time.perf_counter()
    for path in files.values():
        with path.open("rb") as file:
            hashlib.file_digest(file, "sha256")
    hashed = time.perf_counter() - started
    of_slots = sum(size for name, size in sizes.items() if name.startswith("slots_"))
    return {
        "trm parameters": sum(p.numel() for p in state.trm.parameters()),
        "puzzle table rows": dataset.num_identifiers,
        "puzzle row": config.trm.puzzle_emb_ndim,
        "checkpoint bytes, shared": sum(sizes.values()) - of_slots,
        "checkpoint bytes, a slot": of_slots // len(slots),
        "write bytes/s": per_second(sum(sizes.values()), written),
        "hash bytes/s": per_second(sum(sizes.values()), hashed),
    }


def _operations() -> dict[str, Any]:
    """Operations of a training step that are no views: a GPU launches at least one kernel each.

    Their number hangs on the recursion and not on the width, so the model is a narrow one.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    from hybrid.config import TrainingConfig
    from hybrid.context import LocalContext
    from hybrid.train.state import TrainState
    from hybrid.train.step import train_step
    from hybrid.trm import TRM, AdamAtan2, MovingAverage, TRMConfig

    class Counting(TorchDispatchMode):
        operations = 0

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            self.operations += not func.is_view
            return func(*args, **(kwargs or {}))

    cpu, rows, places = torch.device("cpu"), 4, 9
    trm = TRM(
        TRMConfig(
            hidden_size=16,
            num_heads=2,
            puzzle_emb_ndim=16,
            puzzle_emb_len=1,
            seq_len=places,
            L_cycles=4,
            H_cycles=3,
            L_layers=2,
        )
    )
    tokens = torch.full((rows, places), 2, dtype=torch.int32)
    batch = {
        "inputs": tokens,
        "labels": tokens.clone(),
        "puzzle_identifiers": torch.zeros(rows, dtype=torch.int32),
        "side": torch.full((rows,), 3, dtype=torch.int32),
    }
    named = dict(trm.named_parameters())
    state = TrainState(
        step=0,
        model=trm,
        optimizer=AdamAtan2(named),
        average=MovingAverage(named, 0.999),
        slots=range(rows),
        carry=trm.initial_carry(batch),
        taken=torch.zeros(rows, dtype=torch.int64),
        trained_on=[],
    )
    with Counting() as counting:
        train_step(state, batch, TrainingConfig(batch_size=rows, steps=9), 9, LocalContext(cpu))
    return {"operations of a step": counting.operations}


def _adapters() -> dict[str, Any]:
    """Parameters of the adapters of configs/joint_8b.yaml, around a hidden state of 4096."""
    from hybrid.adapters import LatentToTextAdapter, TextToLatentAdapter
    from hybrid.config import load

    config = load(Path(__file__).parents[1] / "configs/joint_8b.yaml")
    width = config.trm.hidden_size
    positions = config.trm.puzzle_emb_len + config.data.max_side**2
    both = (
        TextToLatentAdapter(4096, positions, width, config.adapter, seed=0),
        LatentToTextAdapter(width, 4096, 1.0, config.adapter, seed=0),
    )
    return {"adapter parameters": sum(p.numel() for made in both for p in made.parameters())}


def main() -> None:
    if sys.argv[1:] == ["--measure"]:
        PARTS.write_text(json.dumps(measure(), indent=1) + "\n")
        print(PARTS.read_text(), end="")
    else:
        print(tables(json.loads(PARTS.read_text())))


if __name__ == "__main__":
    main()
