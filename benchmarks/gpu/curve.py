"""A training curve: ARC-1 training tasks for the time that is left, then their test outputs."""

from __future__ import annotations

from typing import Any

from benchmarks.gpu.session import Session, TimedContext
from hybrid.evaluate import evaluate, predict_locally
from hybrid.train import pretrain
from hybrid.train.tracking import read_metrics

RESERVED = 60.0
"""Seconds for compiling and for the test outputs."""
LINES = 12
SMALL_TRM = {
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
    """Train on demonstrations, with a checkpoint at the end, and answer the tests."""
    tiny = session.tiny
    seconds = 2.0 if tiny else max(10.0, session.left - RESERVED)
    config = session.config(
        {
            "training": [],
            "evaluation": ["arc1-training"],
            "variants": 100,
            "max_side": 5 if tiny else 12,
        },
        trm=SMALL_TRM if tiny else {},
        # The published recipe warms up for longer than this lasts.
        training={
            "batch_size": 16 if tiny else 512,
            "lr": 3e-4,
            "puzzle_lr": 1e-2,
            "lr_warmup_steps": 100,
            "ema_rate": 0.99,
        },
        evaluation={"variants": 2 if tiny else 8, "batch_size": 512, "limit": 4 if tiny else None},
        logging={"run": "curve", "every": 5 if tiny else 50},
    )
    with session.measuring("curve"):
        pretrain(config, TimedContext(session.device, seconds))
        _record_curve(session, read_metrics(config.run_folder / "metrics.jsonl"))
        outcome = evaluate(config, predict_locally, say=lambda line: None)
        right = outcome.results["scores"]["pass@2"]["outputs"]
        session.record(
            "test outputs right in two attempts",
            right=right["numerator"],
            of=right["denominator"],
        )


def _record_curve(session: Session, lines: list[dict[str, Any]]) -> None:
    """About LINES lines of metrics.jsonl, evenly chosen, the last one included."""
    elapsed, step, points = 0.0, 0, []
    for line in lines:
        elapsed += line["seconds_per_step"] * (line["step"] - step)
        step = line["step"]
        points.append((elapsed, line))
    every = max(1, len(points) // LINES)
    for seconds, line in points[::-1][::every][::-1]:
        session.record(
            "curve",
            seconds=round(seconds, 1),
            step=line["step"],
            loss=round(line["loss"], 3),
            exact_accuracy=round(line["exact_accuracy"], 4),
            accuracy=round(line["accuracy"], 3),
            **{"samples/s": round(line["samples_per_s"], 1)},
        )
