"""Parity: the recorded outputs of the published code against ours on the device."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks import golden
from benchmarks.gpu.session import Session

ALLOWED_OUTSIDE = 1e-3
"""Share of numbers that may differ by more than the limit after six steps: the puzzle table moves
by the sign of its gradient, and rounding decides the sign of a gradient close to zero."""


def run(session: Session) -> None:
    """Check golden A and B in float32, A in bfloat16, and the trajectory C, eager and compiled."""
    # Compiling takes a CPU longer than everything else here; tests/trm checks it there.
    modes = (False,) if session.tiny else (False, True)
    for fused in modes:
        mode = "compiled" if fused else "eager"
        for name in golden.LIMITS:
            with session.measuring(f"{name} {mode}"):
                session.record(f"{name} {mode}", **act_steps(name, session.device, fused))
        with session.measuring(f"{golden.TRAJECTORY} {mode}"):
            found = trajectory(session.device, fused)
            session.record(f"{golden.TRAJECTORY} {mode}", **found)
    information = f"{golden.TRAJECTORY} in bfloat16, for information"
    with session.measuring(information):
        half = golden.trajectory(session.device, forward_dtype="bfloat16").differences()
        session.record(information, difference=float(half.max()))


def act_steps(name: str, device: torch.device, fused: bool) -> dict[str, Any]:
    """Compare golden A or B; `ok` if all outputs are within the limit."""
    worst = max(golden.worst_differences(name, device, fused=fused).values())
    limit = golden.LIMITS[name]
    return {"difference": worst, "limit": limit, "outside": "", "ok": worst <= limit}


def trajectory(device: torch.device, fused: bool) -> dict[str, Any]:
    """Compare the weights after golden C's six steps; `ok` if nearly all are within the limit."""
    differences = golden.trajectory(device, fused=fused).differences()
    outside = float((differences > golden.TRAJECTORY_LIMIT).double().mean())
    return {
        "difference": float(differences.max()),
        "limit": golden.TRAJECTORY_LIMIT,
        "outside": outside,
        "ok": outside <= ALLOWED_OUTSIDE,
    }
