"""Forward pass and loss against what the published code computed (golden A and B).

A random TRM amplifies rounding with every cycle, so the last ACT step starts from recorded carries.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden.extract import ROWS, STEPS, unpack
from torch.nn.attention import SDPBackend, sdpa_kernel

from hybrid.trm import TRM, act_loss, upstream

ATTENTION, MLP_T = "A_trm_attn_tiny", "B_trm_mlpt_tiny"


def published(golden: Path, name: str, **changes: Any) -> tuple[TRM, dict[str, torch.Tensor]]:
    """The model with its weights, and the recorded tensors."""
    arch = json.loads((golden / f"{name}.json").read_text())["config"] | changes
    state = unpack(np.load(golden / f"{name.removesuffix('_bf16')}.npz"))
    recorded = np.load(golden / f"{name}.npz")
    tensors = {k: torch.from_numpy(recorded[k]) for k in recorded if recorded[k].ndim}
    return upstream.load(state, **arch).eval(), tensors


def batch_in(recorded: dict[str, torch.Tensor], prefix: str = "batch.") -> dict[str, torch.Tensor]:
    return {k.removeprefix(prefix): v for k, v in recorded.items() if k.startswith(prefix)}


@torch.inference_mode()
def worst_differences(
    golden: Path, name: str, *, fused: bool = False, **changes: Any
) -> dict[str, float]:
    """Largest absolute difference of every recorded output, first and last ACT step."""
    model, recorded = published(golden, name, **changes)
    if fused:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        model.fuse()
    batch = batch_in(recorded)
    worst: dict[str, float] = {}

    def compare(what: str, ours: torch.Tensor, theirs: torch.Tensor) -> None:
        worst[what] = float((ours.float() - theirs.float()).abs().max())

    carry, out = model.act_step(model.initial_carry(batch), batch)
    for field in ("logits", "q_halt", "q_continue"):
        compare(f"first {field}", getattr(out, field), recorded[f"step.{field}"][0])
    assert torch.equal(carry.halted, recorded["step.halted"][0])

    carry = replace(
        carry,
        z_H=recorded["before.z_H"].to(model.dtype),
        z_L=recorded["before.z_L"].to(model.dtype),
        steps=torch.full((len(ROWS),), STEPS[-1], dtype=torch.int32),
        halted=torch.zeros(len(ROWS), dtype=torch.bool),
        current={name: value[ROWS] for name, value in carry.current.items()},
    )
    carry, out = model.act_step(carry, carry.current)
    for field in ("logits", "q_halt", "q_continue"):
        compare(f"last {field}", getattr(out, field), recorded[f"step.{field}"][1][ROWS])
    assert bool(torch._dynamo.utils.counters["stats"]["unique_graphs"]) >= fused, "not compiled"
    compare("last z_H", carry.z_H, recorded["after.z_H"])
    compare("last z_L", carry.z_L, recorded["after.z_L"])
    assert torch.equal(carry.steps, recorded["step.steps"][1][ROWS])
    assert torch.equal(carry.halted, recorded["step.halted"][1][ROWS])
    return worst


slow = pytest.mark.slow


@pytest.mark.parametrize("fused", [False, pytest.param(True, marks=slow)])
@pytest.mark.parametrize(
    ("name", "limit"), [(ATTENTION, 2e-5), (MLP_T, 3e-4), (ATTENTION + "_bf16", 0.15)]
)
def test_act_steps_are_the_published_ones(
    golden: Path, name: str, limit: float, fused: bool
) -> None:
    worst = worst_differences(golden, name, fused=fused)
    assert len(worst) == 8
    assert max(worst.values()) <= limit, worst


def test_the_limit_catches_a_wrong_rms_epsilon(golden: Path) -> None:
    assert max(worst_differences(golden, ATTENTION, rms_norm_eps=1e-6).values()) > 2e-5


@pytest.mark.parametrize(
    "change", [{"L_cycles": 2}, {"H_cycles": 1}, {"rope_theta": 9000.0}, {"pos_encodings": "none"}]
)
def test_the_limit_catches_another_recursion(golden: Path, change: dict[str, Any]) -> None:
    assert max(worst_differences(golden, ATTENTION, **change).values()) > 1e-3


@pytest.mark.parametrize("name", [ATTENTION, MLP_T, ATTENTION + "_bf16"])
def test_loss_and_metrics_are_the_published_ones(golden: Path, name: str) -> None:
    _, recorded = published(golden, name)
    for i in range(len(STEPS)):
        loss, sums = act_loss(
            recorded["step.logits"][i],
            recorded["step.q_halt"][i],
            recorded["batch.labels"],
            recorded["step.steps"][i],
            recorded["step.halted"][i],
        )
        assert float(loss) == pytest.approx(float(recorded["step.loss"][i]), rel=2e-7)
        theirs = {k: float(v[i]) for k, v in batch_in(recorded, "step.metric.").items()}
        assert {k: float(v) for k, v in sums.items()} == pytest.approx(theirs, rel=2e-7)
    assert recorded["step.halted"][-1].all()  # so the metrics above are not all zero


@torch.inference_mode()
def test_attention_does_not_depend_on_the_kernel(golden: Path) -> None:
    """The kernels return different memory layouts: a `view` of the result raises on one of them."""
    model, recorded = published(golden, ATTENTION)
    batch = batch_in(recorded)
    carry, out = model.act_step(model.initial_carry(batch), batch)
    with sdpa_kernel(SDPBackend.MATH):
        plain_carry, plain = model.act_step(model.initial_carry(batch), batch)
    torch.testing.assert_close(plain.logits, out.logits, atol=2e-5, rtol=0)
    torch.testing.assert_close(plain_carry.z_L, carry.z_L, atol=2e-5, rtol=0)
