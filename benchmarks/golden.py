"""Golden files: recorded outputs of the published code, compared with ours on any device.

tests/golden/extract.py writes the files. A and B contain ACT steps with fixed weights; C contains
a training trajectory of six optimiser steps.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hybrid.trm import (
    TRM,
    AdamAtan2,
    Carry,
    ExponentialMovingAverage,
    act_loss,
    learning_rate,
    sign_sgd_,
    upstream,
)

FOLDER = Path(__file__).parents[1] / "tests" / "golden"
ATTENTION, MLP_T = "A_trm_attn_tiny", "B_trm_mlpt_tiny"
LIMITS = {ATTENTION: 2e-5, MLP_T: 3e-4, ATTENTION + "_bf16": 0.15}
"""Maximum absolute difference of any recorded output."""
TRAJECTORY = "C_train_traj_tiny"
TRAJECTORY_LIMIT = 5e-6
STEPS = [0, 3]
"""Recorded ACT steps: the first and the last of a row."""
ROWS = [2, 3]
"""Rows whose carries are recorded; row 3 has the blank puzzle."""

Arrays = dict[str, np.ndarray[Any, Any]]


def draw(stream: np.random.RandomState, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """Return the next published weight matrix, std 1/sqrt(last axis), within a few ulps."""
    inside = math.erf(math.sqrt(2))
    cut_std = math.sqrt(1 - 4 * math.exp(-2) / math.sqrt(2 * math.pi) / inside)
    bits = stream.randint(0, 2**32, size=shape, dtype=np.uint32) & (2**24 - 1)
    uniform = inside * (2 * bits / 2**24 - 1)
    normal = math.sqrt(2) * torch.erfinv(torch.from_numpy(uniform)).numpy()
    drawn: np.ndarray[Any, Any] = normal / math.sqrt(shape[-1]) / cut_std
    return drawn.astype(np.float32)


def unpack(file: Mapping[str, np.ndarray[Any, Any]]) -> dict[str, Tensor]:
    """Decode the packed weights of a golden file into a published state dict, bit for bit."""
    stream = np.random.RandomState(int(file["seed"]))
    state: Arrays = {}
    for key in file:
        kind, _, name = key.partition(".")
        if kind == "raw":
            state[name] = file[key]
        elif kind == "ulps":
            near = draw(stream, file[key].shape).view(np.int32).astype(np.int64)
            state[name] = (near + file[key]).astype(np.int32).view(np.float32)
    return {name: torch.from_numpy(value) for name, value in state.items()}


def recorded(name: str, device: torch.device) -> dict[str, Tensor]:
    """Load the recorded tensors of a golden file to a device."""
    file = np.load(FOLDER / f"{name}.npz")
    return {k: torch.from_numpy(file[k]).to(device) for k in file if file[k].ndim}


def published(name: str, device: torch.device, **changes: Any) -> TRM:
    """Build the model of golden A or B with its weights; `changes` override its config."""
    arch = json.loads((FOLDER / f"{name}.json").read_text())["config"] | changes
    state = unpack(np.load(FOLDER / f"{name.removesuffix('_bf16')}.npz"))
    return upstream.load(state, **arch).to(device).eval()


def batch_in(tensors: Mapping[str, Tensor], prefix: str = "batch.") -> dict[str, Tensor]:
    """Return the tensors whose names start with `prefix`, by the rest of their names."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


@torch.inference_mode()
def worst_differences(
    name: str, device: torch.device, *, compiled: bool = False, **changes: Any
) -> dict[str, float]:
    """Return the maximum absolute difference of each output in the first and last ACT step.

    The last step starts from recorded carries, because a random TRM amplifies rounding errors in
    every cycle. Raises AssertionError if a row halts at another step than recorded.
    """
    model, reference = published(name, device, **changes), recorded(name, device)
    if compiled:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        model.compile_recursion()
    batch = batch_in(reference)
    worst: dict[str, float] = {}

    def compare(key: str, ours: Tensor, expected: Tensor) -> None:
        worst[key] = float((ours.float() - expected.float()).abs().max())

    carry, out = model.act_step(model.initial_carry(batch), batch)
    for field in ("logits", "q_halt", "q_continue"):
        compare(f"first {field}", getattr(out, field), reference[f"step.{field}"][0])
    assert torch.equal(carry.halted, reference["step.halted"][0])

    carry = replace(
        carry,
        z_H=reference["before.z_H"].to(model.dtype),
        z_L=reference["before.z_L"].to(model.dtype),
        steps=torch.full((len(ROWS),), STEPS[-1], dtype=torch.int32, device=device),
        halted=torch.zeros(len(ROWS), dtype=torch.bool, device=device),
        current={key: value[ROWS] for key, value in carry.current.items()},
    )
    carry, out = model.act_step(carry, carry.current)
    for field in ("logits", "q_halt", "q_continue"):
        compare(f"last {field}", getattr(out, field), reference[f"step.{field}"][1][ROWS])
    assert bool(torch._dynamo.utils.counters["stats"]["unique_graphs"]) >= compiled, "not compiled"
    compare("last z_H", carry.z_H, reference["after.z_H"])
    compare("last z_L", carry.z_L, reference["after.z_L"])
    assert torch.equal(carry.steps, reference["step.steps"][1][ROWS])
    assert torch.equal(carry.halted, reference["step.halted"][1][ROWS])
    return worst


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """Six optimiser steps of golden C by our model and optimisers."""

    steps: dict[str, Tensor]
    """Tensors [6, ...] by recorded name without `step.`."""
    model: TRM
    ema: ExponentialMovingAverage
    recorded: dict[str, Tensor]

    def differences(self) -> Tensor:
        """Return absolute differences of final weights and of the puzzle table after each step."""
        pairs = [
            (weight.detach(), self.recorded["final.model." + upstream.published_name(name)])
            for name, weight in self.model.named_parameters()
        ]
        pairs.append((self.steps["puzzle_emb_weights"], self.recorded["step.puzzle_emb_weights"]))
        return torch.cat([(ours - reference).abs().flatten() for ours, reference in pairs])


def trajectory(device: torch.device, *, compiled: bool = False, **changes: Any) -> Trajectory:
    """Train golden C's model for six steps, in the published order: puzzle table, weights, EMA.

    `changes` override its config.
    """
    metadata = json.loads((FOLDER / f"{TRAJECTORY}.json").read_text())
    hyper, reference = metadata["hyper"], recorded(TRAJECTORY, device)
    start = unpack(np.load(FOLDER / f"{TRAJECTORY}.npz"))
    model = upstream.load(start, **(metadata["config"] | changes)).to(device).train()
    if compiled:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        model.compile_recursion()
    weights = dict(model.named_parameters())
    columns = {"model." + upstream.published_name(name): p for name, p in weights.items()}
    assert columns.keys() == set(metadata["grad_norm_columns"])
    adam = AdamAtan2(
        weights, betas=(hyper["beta1"], hyper["beta2"]), weight_decay=hyper["weight_decay"]
    )
    ema = ExponentialMovingAverage(weights, hyper["ema_rate"])

    def rate(step: int, base: float) -> float:
        return learning_rate(
            step + 1,
            base=base,
            warmup=hyper["lr_warmup_steps"],
            total=hyper["total_steps"],
            min_ratio=hyper["lr_min_ratio"],
        )

    carry, steps = None, []
    for i in range(6):
        batch = {name: value[i] for name, value in batch_in(reference).items()}
        carry, step = _backward(model, batch, carry)
        step |= {
            "lr": torch.tensor(rate(i, hyper["lr"])),
            "lr_puzzle": torch.tensor(rate(i, hyper["puzzle_emb_lr"])),
            "grad_norm": torch.stack([_norm(columns[c]) for c in metadata["grad_norm_columns"]]),
        }
        sign_sgd_(
            model.puzzle_table,
            step["local_ids"],
            step["local_weights_grad"],
            lr=rate(i, hyper["puzzle_emb_lr"]),
            weight_decay=hyper["puzzle_emb_weight_decay"],
        )
        adam.step(rate(i, hyper["lr"]))
        ema.update()
        model.zero_grad()
        steps.append(step | {"puzzle_emb_weights": model.puzzle_table.clone()})
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs >= 2 * compiled, "not compiled with and without gradient"
    stacked = {name: torch.stack([step[name] for step in steps]) for name in steps[0]}
    return Trajectory(steps=stacked, model=model, ema=ema, recorded=reference)


def _backward(
    model: TRM, batch: dict[str, Tensor], carry: Carry | None
) -> tuple[Carry, dict[str, Tensor]]:
    """Run forward and backward of a step; return the new carry and the tensors to compare."""
    carry, out = model.act_step(carry or model.initial_carry(batch), batch)
    loss, sums = act_loss(
        out.logits, out.q_halt, carry.current["labels"], carry.steps, carry.halted
    )
    torch.autograd.backward(loss / len(batch["inputs"]))
    assert out.puzzle_rows is not None and out.puzzle_rows.grad is not None
    return carry, {
        **{f"metric.{name}": value for name, value in sums.items()},
        "loss": loss.detach(),
        "halted": carry.halted,
        "nsteps": carry.steps,
        "cur_inputs": carry.current["inputs"],
        "q_halt": out.q_halt.detach(),
        "local_ids": carry.current["puzzle_identifiers"],
        "local_weights_grad": out.puzzle_rows.grad,
    }


def _norm(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    norm: Tensor = torch.linalg.vector_norm(parameter.grad)
    return norm
