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
        for name, limit in golden.LIMITS.items():
            try:
                worst = max(golden.worst_differences(name, session.device, fused=fused).values())
            except AssertionError as error:
                session.record(_title(name, fused), failed=f"differs: {error}", ok=False)
                continue
            session.record(
                _title(name, fused), difference=worst, limit=limit, outside="", ok=worst <= limit
            )
        session.record(_title(golden.TRAJECTORY, fused), **trajectory(session.device, fused))
    half = golden.trajectory(session.device, forward_dtype="bfloat16").differences()
    session.record(
        f"{golden.TRAJECTORY} in bfloat16, for information", difference=float(half.max())
    )


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


def _title(name: str, fused: bool) -> str:
    return f"{name} {'compiled' if fused else 'eager'}"
