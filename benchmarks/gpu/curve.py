"""Two training curves on the same ARC-1 tasks, on full and on bucketed canvases, then their scores.

Both train for the same number of seconds. The model is smaller than the published one, which
would not get through its warm-up in this time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from benchmarks.gpu.session import Session, TimedContext
from hybrid.evaluate import evaluate, predict_locally
from hybrid.train import pretrain

MODES: tuple[Literal["full", "bucketed"], ...] = ("full", "bucketed")
NEEDED = 60.0
"""Seconds below which no curve is trained."""
RESERVED = 15.0
"""Seconds per curve for its start, its checkpoint and its test outputs."""
POINTS = 10
MODEL = {
    "hidden_size": 256,
    "num_heads": 4,
    "H_cycles": 2,
    "L_cycles": 4,
    "halt_max_steps": 8,
    "puzzle_emb_ndim": 256,
    "puzzle_emb_len": 8,
}
TINY_MODEL = {
    "hidden_size": 64,
    "num_heads": 2,
    "expansion": 1,
    "H_cycles": 1,
    "L_cycles": 2,
    "halt_max_steps": 4,
    "puzzle_emb_ndim": 64,
    "puzzle_emb_len": 2,
}


def run(session: Session) -> None:
    """Train on demonstrations and answer the tests, once per canvas mode."""
    seconds: float | None = None
    for done, mode in enumerate(MODES):
        what = f"curve, {mode} canvas"
        with session.measuring(what):
            seconds = _curve(session, what, mode, seconds, curves_left=len(MODES) - done)


def _curve(
    session: Session,
    what: str,
    mode: Literal["full", "bucketed"],
    seconds: float | None,
    *,
    curves_left: int,
) -> float | None:
    """Record one curve; return its training time in seconds, which the next curve must match.

    `seconds` is the training time; None shares the time that is left among the curves left.
    """
    tiny = session.tiny
    config = session.config(
        {
            "training": [],
            "evaluation": ["arc1-training"],
            "variants": 8,
            "max_side": 12 if tiny else 20,
            "canvas": mode,
        },
        trm=TINY_MODEL if tiny else MODEL,
        training={
            "batch_size": 16 if tiny else 256,
            "lr": 5e-4,
            "puzzle_lr": 1e-2,
            "lr_warmup_steps": 100,
            "ema_rate": 0.99,
        },
        evaluation={"variants": 2 if tiny else 4, "limit": 4 if tiny else 100},
        logging={"run": f"curve-{mode}", "every": 2 if tiny else 10},
    )
    needed = NEEDED if seconds is None else seconds + RESERVED
    if not session.has_time(what, needed):
        return seconds

    def share() -> float:
        """Return the training time, once the first step has compiled."""
        nonlocal seconds
        if seconds is None:
            left = session.left - curves_left * RESERVED
            seconds = 1.0 if tiny else max(1.0, left / curves_left)
        return seconds

    def write(trained: float, metrics: Mapping[str, float]) -> None:
        _record(session, what, trained, metrics)

    pretrain(config, TimedContext(session.device, share, write, POINTS))
    # Compiling again for inference would take longer than a few eager answers.
    config = replace(config, cluster=replace(config.cluster, compile=False))
    outcome = evaluate(config, predict_locally, say=lambda line: None)
    right = outcome.results["scores"]["pass@2"]["outputs"]
    session.record(
        f"{what}, test outputs right in two attempts",
        right=right["numerator"],
        of=right["denominator"],
    )
    return seconds


def _record(session: Session, what: str, trained: float, metrics: Mapping[str, Any]) -> None:
    session.record(
        what,
        seconds=round(trained, 1),
        step=metrics["step"],
        loss=round(metrics["loss"], 3),
        exact_accuracy=round(metrics["exact_accuracy"], 4),
        accuracy=round(metrics["accuracy"], 3),
        **{"samples/s": round(metrics["samples_per_s"], 1)},
    )
