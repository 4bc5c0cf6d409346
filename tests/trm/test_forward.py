"""Forward pass and loss match the published code (golden A and B)."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.golden import (
    ATTENTION,
    LIMITS,
    STEPS,
    batch_in,
    published,
    recorded,
    worst_differences,
)
from hybrid.trm import act_loss

CPU = torch.device("cpu")
slow = pytest.mark.slow


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=slow)])
@pytest.mark.parametrize(("name", "limit"), LIMITS.items())
def test_act_steps_match_the_published_code(name: str, limit: float, compiled: bool) -> None:
    worst = worst_differences(name, CPU, compiled=compiled)
    assert len(worst) == 8
    assert max(worst.values()) <= limit, worst


def test_limit_detects_a_wrong_rms_epsilon() -> None:
    assert max(worst_differences(ATTENTION, CPU, rms_norm_eps=1e-6).values()) > 2e-5


@pytest.mark.parametrize(
    "change", [{"L_cycles": 2}, {"H_cycles": 1}, {"rope_theta": 9000.0}, {"pos_encodings": "none"}]
)
def test_limit_detects_another_recursion(change: dict[str, float | str]) -> None:
    assert max(worst_differences(ATTENTION, CPU, **change).values()) > 1e-3


@pytest.mark.parametrize("name", LIMITS)
def test_loss_and_metrics_match_the_published_code(name: str) -> None:
    reference = recorded(name, CPU)
    for i in range(len(STEPS)):
        loss, sums = act_loss(
            reference["step.logits"][i],
            reference["step.q_halt"][i],
            reference["batch.labels"],
            reference["step.steps"][i],
            reference["step.halted"][i],
        )
        assert float(loss) == pytest.approx(float(reference["step.loss"][i]), rel=2e-7)
        metrics = {k: float(v[i]) for k, v in batch_in(reference, "step.metric.").items()}
        assert {k: float(v) for k, v in sums.items()} == pytest.approx(metrics, rel=2e-7)
    assert reference["step.halted"][-1].all()  # otherwise the metrics above would be zero


@torch.inference_mode()
def test_attention_does_not_depend_on_the_kernel() -> None:
    """The kernels return different memory layouts: a `view` of the result raises on one of them."""
    model = published(ATTENTION, CPU)
    batch = batch_in(recorded(ATTENTION, CPU))
    carry, out = model.act_step(model.initial_carry(batch), batch)
    with sdpa_kernel(SDPBackend.MATH):
        plain_carry, plain = model.act_step(model.initial_carry(batch), batch)
    torch.testing.assert_close(plain.logits, out.logits, atol=2e-5, rtol=0)
    torch.testing.assert_close(plain_carry.z_L, carry.z_L, atol=2e-5, rtol=0)
