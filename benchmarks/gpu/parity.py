"""Parity: the recorded outputs of the published code against ours on the device."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from benchmarks import golden
from benchmarks.gpu.session import Session

ALLOWED_OUTSIDE = 1e-3
"""Share of numbers that may differ by more than the limit after six steps: the puzzle table moves
by the sign of its gradient, and rounding decides the sign of a gradient close to zero."""


EAGER = (*golden.LIMITS, golden.TRAJECTORY)
COMPILED = (golden.TRAJECTORY, golden.ATTENTION + "_bf16", golden.ATTENTION, golden.MLP_T)
"""Checks of each mode. Compiling is slow, so the most important checks are first."""


def run(session: Session) -> None:
    """Check golden A and B in float32, A in bfloat16, and the trajectory C, eager and compiled."""
    cases = [(name, False) for name in EAGER]
    # Compiling takes a CPU longer than everything else here; tests/trm checks it there.
    cases += [] if session.tiny else [(name, True) for name in COMPILED]
    for name, compiled in cases:
        what = f"{name} {'compiled' if compiled else 'eager'}"
        with session.measuring(what):
            session.record(what, **check(name, session.device, compiled))
    what = f"{golden.TRAJECTORY} in bfloat16, for information"
    with session.measuring(what):
        half = golden.trajectory(session.device, forward_dtype="bfloat16").differences()
        session.record(what, difference=float(half.max()))


def check(name: str, device: torch.device, compiled: bool) -> dict[str, Any]:
    """Compare a golden file with the model on the device."""
    compare = trajectory if name == golden.TRAJECTORY else partial(act_steps, name)
    return compare(device, compiled)


def act_steps(name: str, device: torch.device, compiled: bool) -> dict[str, Any]:
    """Compare golden A or B; `ok` if all outputs are within the limit."""
    worst = max(golden.worst_differences(name, device, compiled=compiled).values())
    limit = golden.LIMITS[name]
    return {"difference": worst, "limit": limit, "outside": "", "ok": worst <= limit}


def trajectory(device: torch.device, compiled: bool) -> dict[str, Any]:
    """Compare the weights after golden C's six steps; `ok` if nearly all are within the limit."""
    differences = golden.trajectory(device, compiled=compiled).differences()
    outside = float((differences > golden.TRAJECTORY_LIMIT).double().mean())
    return {
        "difference": float(differences.max()),
        "limit": golden.TRAJECTORY_LIMIT,
        "outside": outside,
        "ok": outside <= ALLOWED_OUTSIDE,
    }
