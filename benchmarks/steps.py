"""Time of a training step and of an evaluation of the TRM: plain and ours, eager and compiled.

    python -m benchmarks.steps [--device cuda] [--sizes golden,demo,medium,full]
                               [--sides "plain,eager,compiled,compiled bfloat16"]
                               [--rounds N] [--batch N] [--out FOLDER]

Needs no Ray, data, git or network. All sides alternate on random rows of the same sizes. The table
has the median time, samples per second (a sample is one row in one ACT step), the ratio to the
plain trainer, eager and compiled, and the ratio of floor to time. The floor is the time of the
matrix products at the rate this machine reaches for the model's largest one in that dtype; in
training it includes copying the optimizer's bytes. A side that runs out of memory is listed as
such. `plain compiled` compiles the model and its loss as one graph, as the published trainer does
on a GPU; `compiled static` compiles ours for fixed shapes. Writes steps-<device>.json to FOLDER
(default benchmarks/results).
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle
from math import isqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import (
    faster,
    in_turns,
    peak_gib,
    record,
    release_memory,
    seconds_of,
    table,
)
from benchmarks.plain import PlainTrainer, PlainTRM
from hybrid.config import EvaluationConfig, TrainingConfig, load
from hybrid.context import LocalContext
from hybrid.evaluate.trm_predictor import predict_tokens
from hybrid.train.pretrain import train_step
from hybrid.train.state import TrainState
from hybrid.trm import TRM, TRMConfig

DEMO = Path(__file__).parents[1] / "configs" / "demo.yaml"
KINDS = ("train", "evaluate")
OUT_OF_MEMORY = "out of memory"


@dataclass(frozen=True, kw_only=True)
class Size:
    model: TRMConfig
    batch: Mapping[str, int]
    """Rows per step by device type."""
    rounds: int
    calls: int = 1


FULL = TRMConfig(num_puzzle_identifiers=1000)
SMALL = replace(FULL, seq_len=100, halt_max_steps=4)
GOLDEN = replace(
    SMALL, hidden_size=64, num_heads=2, puzzle_emb_ndim=64, puzzle_emb_len=4, H_cycles=2, L_cycles=3
)
"""Config of the golden training trajectory."""

SIZES = {
    "golden": Size(model=GOLDEN, batch={"cpu": 4, "cuda": 4096}, rounds=12, calls=5),
    "demo": Size(
        model=replace(load(DEMO).trm.model, seq_len=36, num_puzzle_identifiers=1000),
        batch={"cpu": 16, "cuda": 2048},
        rounds=12,
        calls=5,
    ),
    "medium": Size(
        model=replace(SMALL, hidden_size=256, puzzle_emb_ndim=256),
        batch={"cpu": 8, "cuda": 768},
        rounds=3,
    ),
    # Two ACT steps instead of sixteen: each takes the same time.
    "full": Size(model=replace(FULL, halt_max_steps=2), batch={"cpu": 1, "cuda": 192}, rounds=3),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sizes", default=",".join(SIZES))
    parser.add_argument("--sides")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    sides = arguments.sides.split(",") if arguments.sides else sides_on(device)
    rows: list[dict[str, Any]] = []
    try:
        for name in arguments.sizes.split(","):
            size = SIZES[name]
            rows += compare(
                name,
                size.model,
                arguments.batch or size.batch[device.type],
                device,
                sides,
                arguments.rounds or size.rounds,
                size.calls,
            )
            print(table(rows[-2 * len(sides) :]), flush=True)
    finally:
        if rows:
            record(f"steps-{device.type}", rows, arguments.out)


def sides_on(device: torch.device) -> list[str]:
    """Return the default sides for a device.

    A GPU always computes in bfloat16. Few CPUs have bfloat16 units.
    """
    if device.type == "cuda":
        return ["compiled", "eager", "plain", "plain compiled"]
    sides = ["plain", "eager", "compiled", "plain compiled"]
    if torch.cpu._is_avx512_bf16_supported():
        sides += ["plain bfloat16", "compiled bfloat16", "plain compiled bfloat16"]
    return sides


@dataclass(frozen=True, kw_only=True)
class WarmedUp:
    """A side after its first steps."""

    side: Side
    seconds: dict[str, float]
    """Time of the first two calls by kind."""
    gib: dict[str, float]
    """Peak GPU memory by kind, minus the memory allocated before."""


def compare(
    name: str,
    config: TRMConfig,
    batch_size: int,
    device: torch.device,
    sides: list[str],
    rounds: int,
    calls: int,
) -> list[dict[str, Any]]:
    """Measure all sides; return a line for each, first of training, then of evaluation."""
    batches = [random_rows(config, batch_size, seed, device) for seed in range(4)]
    warm: dict[str, WarmedUp] = {}
    for side in sides:
        release_memory()
        with suppress(torch.OutOfMemoryError):
            warm[side] = _warm_up(side, config, batch_size, device, batches[:2])
    release_memory()
    rates = {
        dtype: matmul_flops(config, batch_size, dtype, device)
        for dtype in {each.side.dtype for each in warm.values()}
    }
    optimizer = optimizer_seconds(config, device)
    columns = _columns(sides, device)
    lines = []
    for kind in KINDS:
        turns = {side: _cycling(warm, side, kind, batches) for side in warm}
        seconds = in_turns(turns, rounds=rounds, calls=calls, drop=warm.pop)
        train = kind == "train"
        steps = batch_size * (1 if train else config.halt_max_steps)
        operations = steps * flops(config, train=train)
        for side in sides:
            line = {"size": name, "what": kind, "side": side, "rows": batch_size}
            if side in seconds:
                floor = operations / rates[warm[side].side.dtype] + (optimizer if train else 0)
                line |= _times(kind, side, warm[side], seconds, steps, floor)
            else:
                line["ms"] = OUT_OF_MEMORY
            lines.append({column: line.get(column, "") for column in columns})
    return lines


def _times(
    kind: str,
    name: str,
    warm: WarmedUp,
    seconds: Mapping[str, list[float]],
    steps: int,
    floor: float,
) -> dict[str, Any]:
    """Return the columns of a measured side. `steps` is rows x ACT steps, `floor` in seconds."""
    median = statistics.median(seconds[name])
    return {
        "dtype": str(warm.side.dtype).removeprefix("torch."),
        "ms": round(1000 * median, 2),
        "samples/s": round(steps / median, 2),
        "floor ms": round(1000 * floor, 2),
        "floor / time": round(floor / median, 3),
        "first two s": round(warm.seconds[kind], 1),
        "GiB": round(warm.gib[kind], 2),
        **_ratios(name, seconds),
    }


def _warm_up(
    name: str,
    config: TRMConfig,
    batch_size: int,
    device: torch.device,
    batches: list[dict[str, Tensor]],
) -> WarmedUp:
    before = peak_gib()
    side = Side(name, config, batch_size, device)
    seconds, gib = {}, {}
    for kind in KINDS:
        release_memory()
        seconds[kind] = sum(seconds_of(partial(side.step(kind), batch)) for batch in batches)
        gib[kind] = peak_gib() - before
    return WarmedUp(side=side, seconds=seconds, gib=gib)


def _columns(sides: list[str], device: torch.device) -> list[str]:
    compiled = any(side.startswith("plain compiled") for side in sides)
    return [
        *("size", "what", "side", "dtype", "rows", "ms", "samples/s", "times plain"),
        *(("times plain compiled",) if compiled else ()),
        *("floor ms", "floor / time", "first two s"),
        *(("GiB",) if device.type == "cuda" else ()),
    ]


def _ratios(side: str, seconds: Mapping[str, list[float]]) -> dict[str, Any]:
    """Return speed-ups over plain and, for compiled sides, over plain compiled in that dtype."""
    base = "plain compiled" + (" bfloat16" if "bfloat16" in side else "")
    bases = {
        "times plain": "plain",
        "times plain compiled": base if "compiled" in side else "",
    }
    return {
        column: faster(seconds[base], seconds[side]) if base in seconds else ""
        for column, base in bases.items()
    }


class Side:
    """The plain trainer, or ours with the same weights."""

    def __init__(
        self,
        side: str,
        config: TRMConfig,
        batch: int,
        device: torch.device,
        *,
        micro_batch_size: int | None = None,
    ) -> None:
        self.device = device
        self.plain: PlainTrainer | None = None
        words = side.split()
        if "bfloat16" in words:
            config = replace(config, forward_dtype="bfloat16")
        ours = TRM(config, seed=0).to(device)
        self.dtype = ours.dtype
        rows = random_rows(config, batch, 0, device)
        if "plain" in words:
            plain = PlainTRM(config, ours.dtype).to(device)
            plain.load_state_dict(ours.state_dict())
            compiled = "compiled" in words
            self.plain = PlainTrainer(plain, batch_size=batch, compiled=compiled)
            return
        if "compiled" in words:
            ours.compile_recursion(dynamic="static" not in words)
        self.config = TrainingConfig(
            batch_size=batch, micro_batch_size=micro_batch_size, lr_warmup_steps=0
        )
        self.sides = rows["side"].cpu()
        """Canvas sides on the host, as in training: reading them must not wait for the device."""
        carry = ours.initial_carry(rows)
        self.state = TrainState.create(ours, self.config, range(batch), carry, trained_on=[])

    def step(self, kind: str) -> Callable[[dict[str, Tensor]], None]:
        """Return the function that runs a batch."""
        return self.train if kind == "train" else self.evaluate

    def train(self, batch: dict[str, Tensor]) -> None:
        if self.plain:
            self.plain.step(batch, 1e-4, 1e-2)
        else:
            batch = {**batch, "side": self.sides}
            train_step(self.state, batch, self.config, 10**6, LocalContext(self.device))

    def evaluate(self, batch: dict[str, Tensor]) -> None:
        if self.plain:
            self.plain.evaluate(batch)
            return
        trm = self.state.trm.eval()
        tokens = batch["inputs"].to(torch.uint8).cpu().numpy()
        rows = trm.puzzle_table[batch["puzzle_identifiers"].long()]
        with self.state.ema.applied():
            predict_tokens(trm, tokens, rows, EvaluationConfig(batch_size=len(tokens)))


def random_rows(config: TRMConfig, rows: int, seed: int, device: torch.device) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=generator, dtype=torch.int32).to(device)

    return {
        "inputs": draw(config.vocab_size, rows, config.seq_len),
        "labels": draw(config.vocab_size, rows, config.seq_len),
        "puzzle_identifiers": draw(config.num_puzzle_identifiers, rows),
        "side": torch.full((rows,), isqrt(config.seq_len), dtype=torch.int32, device=device),
    }


def flops(config: TRMConfig, *, train: bool) -> float:
    """Return the FLOP of one row and one ACT step: two per multiply-add of a matrix product."""
    model = TRM(replace(config, num_puzzle_identifiers=1))
    weights = sum(parameter.numel() for parameter in model.blocks.parameters())
    N = config.positions
    net = 2 * weights * N + 4 * N * N * config.hidden_size * config.L_layers
    nets = config.H_cycles * (config.L_cycles + 1)
    return net * (nets + (2 * (config.L_cycles + 1) if train else 0))


def matmul_flops(config: TRMConfig, rows: int, dtype: torch.dtype, device: torch.device) -> float:
    """Return the best measured FLOP/s of the model's largest product (gate and up)."""
    model = TRM(replace(config, num_puzzle_identifiers=1))
    weight = model.get_parameter("blocks.0.mlp.gate_up_proj.weight").detach().to(device, dtype)
    x = torch.randn(rows * config.positions, config.hidden_size, device=device, dtype=dtype)
    with torch.inference_mode():
        best = min(seconds_of(lambda: x @ weight.T) for _ in range(20))
    return 2 * x.numel() * len(weight) / best


def optimizer_seconds(config: TRMConfig, device: torch.device) -> float:
    """Return the minimum time of the optimizer, from the measured rate of a copy of that size.

    It reads weights, gradients, two moments and the EMA, and writes all but the gradients, in
    float32.
    """
    model = TRM(replace(config, num_puzzle_identifiers=1))
    numbers = sum(parameter.numel() for parameter in model.parameters())
    source = torch.ones(5 * numbers, device=device)
    target = torch.zeros_like(source)
    copy_seconds = min(seconds_of(lambda: target.copy_(source)) for _ in range(10))
    return copy_seconds * (5 + 4) / (5 + 5)


def _cycling(
    warm: Mapping[str, WarmedUp], name: str, kind: str, batches: list[dict[str, Tensor]]
) -> Callable[[], None]:
    """Return a function that runs the next batch; it does not keep a side that `warm` dropped."""
    following = cycle(batches)
    return lambda: warm[name].side.step(kind)(next(following))


if __name__ == "__main__":
    main()
