"""A training step and an evaluation of the TRM: the plain baseline, ours, and ours compiled.

    python -m benchmarks.steps [--device cuda] [--sizes tiny,medium,full]
                               [--sides plain,eager,compiled] [--rounds N] [--batch N]

Needs no Ray, no data and no network. All sides take random rows of the same sizes in turns; of each
the median time, samples a second (a sample is one row through one ACT step), how many times faster
than the plain one, and the share of what the machine's matrix multiplication reaches on the model's
own largest shape. Writes benchmarks/results/steps-<device>.json.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import isqrt
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import faster, in_turns, record, seconds_of, table
from benchmarks.plain import PlainTrainer, PlainTRM
from hybrid.config import EvaluationConfig, TrainingConfig
from hybrid.context import LocalContext
from hybrid.evaluate.solve import predict
from hybrid.train.state import TrainState
from hybrid.train.step import train_step
from hybrid.trm import TRM, AdamAtan2, MovingAverage, TRMConfig

IDENTIFIERS = 1000
SIDES = ("plain", "eager", "compiled")


@dataclass(frozen=True, kw_only=True)
class Size:
    model: TRMConfig
    batch: Mapping[str, int]
    """Rows of a step on each kind of device."""
    rounds: int
    calls: int = 1


def _size(batch: dict[str, int], rounds: int, calls: int = 1, **sizes: Any) -> Size:
    model = TRMConfig(num_puzzle_identifiers=IDENTIFIERS, **sizes)
    return Size(model=model, batch=batch, rounds=rounds, calls=calls)


SIZES = {
    # The demo's model.
    "tiny": _size(
        {"cpu": 16, "cuda": 2048},
        rounds=20,
        calls=5,
        hidden_size=128,
        num_heads=4,
        expansion=2,
        H_cycles=1,
        L_cycles=2,
        halt_max_steps=4,
        puzzle_emb_ndim=128,
        puzzle_emb_len=2,
        seq_len=36,
    ),
    "medium": _size(
        {"cpu": 8, "cuda": 768},
        rounds=5,
        hidden_size=256,
        num_heads=8,
        puzzle_emb_ndim=256,
        seq_len=100,
        halt_max_steps=4,
    ),
    # Four ACT steps, not sixteen: each costs the same.
    "full": _size({"cpu": 1, "cuda": 192}, rounds=5, halt_max_steps=4),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sizes", default=",".join(SIZES))
    parser.add_argument("--sides", default=",".join(SIDES))
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--batch", type=int)
    asked = parser.parse_args()
    device = torch.device(asked.device)
    rows = []
    for name in asked.sizes.split(","):
        size = SIZES[name]
        rows += compare(
            name,
            size.model,
            asked.batch or size.batch[device.type],
            device,
            asked.sides.split(","),
            asked.rounds or size.rounds,
            size.calls,
        )
        print(table(rows[-2 * len(asked.sides.split(",")) :]), flush=True)
    record(f"steps-{device.type}", rows)


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
    trainers = {side: Side(side, config, batch_size, device) for side in sides}
    peak = matmul_flops(config, batch_size, trainers[sides[-1]].dtype, device)
    lines = []
    for kind in ("train", "evaluate"):
        works: dict[str, Callable[[], object]] = {}
        first: dict[str, float] = {}
        memory: dict[str, float] = {}
        for side, trainer in trainers.items():
            work = trainer.train if kind == "train" else trainer.evaluate
            works[side] = _cycling(work, batches)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            first[side] = seconds_of(works[side]) + seconds_of(works[side])
            if device.type == "cuda":
                memory[side] = torch.cuda.max_memory_allocated() / 2**30
        seconds = in_turns(works, rounds=rounds, calls=calls)
        steps = 1 if kind == "train" else config.halt_max_steps
        for side in sides:
            median = statistics.median(seconds[side])
            rate = batch_size * steps / median
            lines.append(
                {
                    "size": name,
                    "what": kind,
                    "side": side,
                    "dtype": str(trainers[side].dtype).removeprefix("torch."),
                    "rows": batch_size,
                    "ms": round(1000 * median, 2),
                    "samples/s": round(rate, 2),
                    "times plain": faster(seconds[sides[0]], seconds[side]),
                    "of matmul": round(rate * flops(config, train=kind == "train") / peak, 3),
                    "first two s": round(first[side], 1),
                    **({"GiB": round(memory[side], 2)} if memory else {}),
                }
            )
    return lines


class Side:
    """The plain trainer, or ours on the same weights."""

    def __init__(self, side: str, config: TRMConfig, batch: int, device: torch.device) -> None:
        self.device = device
        self.plain: PlainTrainer | None = None
        ours = TRM(config, seed=0).to(device)
        self.dtype = ours.dtype
        rows = random_rows(config, batch, 0, device)
        if side == "plain":
            plain = PlainTRM(config, ours.dtype).to(device)
            plain.load_state_dict(ours.state_dict())
            self.plain = PlainTrainer(plain, batch_size=batch)
            return
        if side == "compiled":
            ours.fuse()
        weights = dict(ours.named_parameters())
        self.config = TrainingConfig(batch_size=batch, lr_warmup_steps=0)
        self.state = TrainState(
            step=0,
            model=ours,
            optimizer=AdamAtan2(weights),
            average=MovingAverage(weights, 0.999),
            slots=range(batch),
            carry=ours.initial_carry(rows),
            taken=torch.zeros(batch, dtype=torch.int64),
        )

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
        "side": torch.full((rows,), isqrt(config.seq_len), dtype=torch.int32),
    }


def flops(config: TRMConfig, *, train: bool) -> float:
    """Of one row and one ACT step: two for each multiply-add of a matrix product."""
    model = TRM(replace(config, num_puzzle_identifiers=1))
    weights = sum(p.numel() for name, p in model.blocks.named_parameters())
    N = config.positions
    net = 2 * weights * N + 4 * N * N * config.hidden_size * config.L_layers
    nets = config.H_cycles * (config.L_cycles + 1)
    return net * (nets + (2 * (config.L_cycles + 1) if train else 0))


def matmul_flops(config: TRMConfig, rows: int, dtype: torch.dtype, device: torch.device) -> float:
    """Operations a second of the model's largest product (gate and up), best of a few."""
    weight = TRM(replace(config, num_puzzle_identifiers=1)).blocks[0].mlp.gate_up_proj.weight
    weight = weight.detach().to(device, dtype)
    x = torch.randn(rows * config.positions, config.hidden_size, device=device, dtype=dtype)
    with torch.inference_mode():
        best = min(seconds_of(lambda: x @ weight.T) for _ in range(20))
    return 2 * x.numel() * len(weight) / best


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
