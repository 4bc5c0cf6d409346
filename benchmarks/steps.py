"""A training step and an evaluation of the TRM: plain, ours, ours compiled, and in bfloat16.

    python -m benchmarks.steps [--device cuda] [--sizes golden,demo,medium,full]
                               [--sides "eager,compiled,plain bfloat16,compiled bfloat16"]
                               [--rounds N] [--batch N]

Needs no Ray, no data and no network. All sides take random rows of the same sizes in turns; of each
the median time, samples a second (a sample is one row through one ACT step), how many times faster
than the plain one, and the floor's share of the time. The floor is what cannot be left out: the
matrix products at the rate this machine reaches on the model's largest one in that dtype, and in
training the optimiser's bytes at the rate it copies so many. Writes
benchmarks/results/steps-<device>.json.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import isqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import faster, in_turns, record, seconds_of, table
from benchmarks.plain import PlainTrainer, PlainTRM
from hybrid.config import EvaluationConfig, TrainingConfig, load
from hybrid.context import LocalContext
from hybrid.evaluate.solve import predict
from hybrid.train.state import TrainState
from hybrid.train.step import train_step
from hybrid.trm import TRM, AdamAtan2, MovingAverage, TRMConfig

DEMO = Path(__file__).parents[1] / "configs" / "demo.yaml"
KINDS = ("train", "evaluate")


@dataclass(frozen=True, kw_only=True)
class Size:
    model: TRMConfig
    batch: Mapping[str, int]
    """Rows of a step on each kind of device."""
    rounds: int
    calls: int = 1


FULL = TRMConfig(num_puzzle_identifiers=1000)
SMALL = replace(FULL, seq_len=100, halt_max_steps=4)
GOLDEN = replace(
    SMALL, hidden_size=64, num_heads=2, puzzle_emb_ndim=64, puzzle_emb_len=4, H_cycles=2, L_cycles=3
)
"""That of the golden training file."""

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
    # Two ACT steps, not sixteen: each costs the same.
    "full": Size(model=replace(FULL, halt_max_steps=2), batch={"cpu": 1, "cuda": 192}, rounds=3),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sizes", default=",".join(SIZES))
    parser.add_argument("--sides")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--batch", type=int)
    asked = parser.parse_args()
    device = torch.device(asked.device)
    sides = ["plain", *(asked.sides.split(",") if asked.sides else sides_on(device))]
    rows = []
    for name in asked.sizes.split(","):
        size = SIZES[name]
        rows += compare(
            name,
            size.model,
            asked.batch or size.batch[device.type],
            device,
            sides,
            asked.rounds or size.rounds,
            size.calls,
        )
        print(table(rows[-2 * len(sides) :]), flush=True)
    record(f"steps-{device.type}", rows)


def sides_on(device: torch.device) -> list[str]:
    """Beside the plain one. A GPU computes in bfloat16 anyway, most CPUs have no units for it."""
    has_units = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    half = ["plain bfloat16", "compiled bfloat16"] if has_units else []
    return ["eager", "compiled", *half]


def compare(
    name: str,
    config: TRMConfig,
    batch_size: int,
    device: torch.device,
    sides: list[str],
    rounds: int,
    calls: int,
) -> list[dict[str, Any]]:
    """One line a side, of training and of evaluation."""
    batches = [random_rows(config, batch_size, seed, device) for seed in range(4)]
    trainers: dict[str, Side] = {}
    first: dict[tuple[str, str], float] = {}
    memory: dict[tuple[str, str], float] = {}
    for side in sides:
        before = _allocated(device)
        trainers[side] = trainer = Side(side, config, batch_size, device)
        for kind in KINDS:
            _allocated(device)
            work = trainer.of(kind)
            first[side, kind] = sum(seconds_of(partial(work, batch)) for batch in batches[:2])
            memory[side, kind] = _allocated(device, peak=True) - before
    rates = {
        dtype: matmul_flops(config, batch_size, dtype, device)
        for dtype in {trainer.dtype for trainer in trainers.values()}
    }
    moved = optimizer_seconds(config, device)
    lines = []
    for kind in KINDS:
        turns = {side: _cycling(trainer.of(kind), batches) for side, trainer in trainers.items()}
        seconds = in_turns(turns, rounds=rounds, calls=calls)
        train = kind == "train"
        steps = 1 if train else config.halt_max_steps
        operations = batch_size * steps * flops(config, train=train)
        for side in sides:
            median = statistics.median(seconds[side])
            floor = operations / rates[trainers[side].dtype] + (moved if train else 0)
            lines.append(
                {
                    "size": name,
                    "what": kind,
                    "side": side,
                    "dtype": str(trainers[side].dtype).removeprefix("torch."),
                    "rows": batch_size,
                    "ms": round(1000 * median, 2),
                    "samples/s": round(batch_size * steps / median, 2),
                    "times plain": faster(seconds[sides[0]], seconds[side]),
                    "floor ms": round(1000 * floor, 2),
                    "floor / time": round(floor / median, 3),
                    "first two s": round(first[side, kind], 1),
                    **({"GiB": round(memory[side, kind], 2)} if device.type == "cuda" else {}),
                }
            )
    return lines


class Side:
    """The plain trainer, or ours on the same weights."""

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
        kind, _, dtype = side.partition(" ")
        if dtype == "bfloat16":
            config = replace(config, forward_dtype="bfloat16")
        ours = TRM(config, seed=0).to(device)
        self.dtype = ours.dtype
        rows = random_rows(config, batch, 0, device)
        if kind == "plain":
            plain = PlainTRM(config, ours.dtype).to(device)
            plain.load_state_dict(ours.state_dict())
            self.plain = PlainTrainer(plain, batch_size=batch)
            return
        if kind == "compiled":
            ours.fuse()
        weights = dict(ours.named_parameters())
        self.config = TrainingConfig(
            batch_size=batch, micro_batch_size=micro_batch_size, lr_warmup_steps=0
        )
        self.state = TrainState(
            step=0,
            model=ours,
            optimizer=AdamAtan2(weights),
            average=MovingAverage(weights, 0.999),
            slots=range(batch),
            carry=ours.initial_carry(rows),
            taken=torch.zeros(batch, dtype=torch.int64),
            trained_on=[],
        )

    def of(self, kind: str) -> Callable[[dict[str, Tensor]], None]:
        """What it does with a batch."""
        return self.train if kind == "train" else self.evaluate

    def train(self, batch: dict[str, Tensor]) -> None:
        if self.plain:
            self.plain.step(batch, 1e-4, 1e-2)
        else:
            train_step(self.state, batch, self.config, 10**6, LocalContext(self.device))

    def evaluate(self, batch: dict[str, Tensor]) -> None:
        if self.plain:
            self.plain.evaluate(batch)
            return
        trm = self.state.trm.eval()
        tokens = batch["inputs"].to(torch.uint8).cpu().numpy()
        rows = trm.puzzle_table[batch["puzzle_identifiers"].long()]
        with self.state.average.applied():
            predict(trm, tokens, rows, EvaluationConfig(batch_size=len(tokens)))


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
    """Of one row and one ACT step: two for each multiply-add of a matrix product."""
    model = TRM(replace(config, num_puzzle_identifiers=1))
    weights = sum(parameter.numel() for parameter in model.blocks.parameters())
    N = config.positions
    net = 2 * weights * N + 4 * N * N * config.hidden_size * config.L_layers
    nets = config.H_cycles * (config.L_cycles + 1)
    return net * (nets + (2 * (config.L_cycles + 1) if train else 0))


def matmul_flops(config: TRMConfig, rows: int, dtype: torch.dtype, device: torch.device) -> float:
    """Operations a second of the model's largest product (gate and up), best of a few."""
    model = TRM(replace(config, num_puzzle_identifiers=1))
    weight = model.get_parameter("blocks.0.mlp.gate_up_proj.weight").detach().to(device, dtype)
    x = torch.randn(rows * config.positions, config.hidden_size, device=device, dtype=dtype)
    with torch.inference_mode():
        best = min(seconds_of(lambda: x @ weight.T) for _ in range(20))
    return 2 * x.numel() * len(weight) / best


def optimizer_seconds(config: TRMConfig, device: torch.device) -> float:
    """Of weights, gradients, two moments and the average, each read once and all but the gradients
    written once, four bytes a number, at the rate at which so many are copied; best of a few.
    """
    model = TRM(replace(config, num_puzzle_identifiers=1))
    numbers = sum(parameter.numel() for parameter in model.parameters())
    source = torch.ones(5 * numbers, device=device)
    target = torch.zeros_like(source)
    copied = min(seconds_of(lambda: target.copy_(source)) for _ in range(10))
    return copied * (5 + 4) / (5 + 5)


def _allocated(device: torch.device, *, peak: bool = False) -> float:
    """GiB of a GPU that are taken, or were at most since this was last asked without `peak`."""
    if device.type != "cuda":
        return 0.0
    if peak:
        return torch.cuda.max_memory_allocated() / 2**30
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated() / 2**30


def _cycling(
    work: Callable[[dict[str, Tensor]], None], batches: list[dict[str, Tensor]]
) -> Callable[[], None]:
    number = 0

    def turn() -> None:
        nonlocal number
        work(batches[number % len(batches)])
        number += 1

    return turn


if __name__ == "__main__":
    main()
