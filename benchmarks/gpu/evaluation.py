"""Evaluation: variants per second in each halting mode, eager and compiled."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np
import torch

from benchmarks.gpu.session import Session
from benchmarks.measure import peak_gib, seconds_of
from benchmarks.steps import FULL, GOLDEN, flops
from hybrid.config import EvaluationConfig
from hybrid.evaluate import predict_tokens
from hybrid.trm import TRM, TRMConfig

MODES: tuple[tuple[Literal["published", "fixed", "confident"], int | None], ...] = (
    ("published", None),
    ("fixed", 2),
    ("confident", None),
)


def run(session: Session) -> None:
    """Predict random variants with random weights."""
    config = replace(GOLDEN if session.tiny else FULL, num_puzzle_identifiers=1)
    for compiled in (False,) if session.tiny else (True, False):
        for halt, act_steps in MODES:
            what = f"{halt}{f' {act_steps}' if act_steps else ''}"
            what += f", {'compiled' if compiled else 'eager'}"
            with session.measuring(what):
                _measure(session, what, _model(config, session, compiled), halt, act_steps)


def _model(config: TRMConfig, session: Session, compiled: bool) -> TRM:
    """Return a model with a random halt head; a new one halts no row before the last step."""
    model = TRM(config, seed=0)
    with torch.no_grad():
        model.q_head.weight.normal_(generator=torch.Generator().manual_seed(0))
        assert model.q_head.bias is not None
        model.q_head.bias.zero_()
    model.to(session.device).eval()
    if compiled:
        model.compile_recursion()
    return model


def _measure(
    session: Session,
    what: str,
    model: TRM,
    halt: Literal["published", "fixed", "confident"],
    act_steps: int | None,
) -> None:
    rows, batch = (8, 4) if session.tiny else (512, 256)
    config = EvaluationConfig(batch_size=batch, halt=halt, act_steps=act_steps)
    shape = (rows, model.config.seq_len)
    tokens = np.random.default_rng(0).integers(0, 12, shape, dtype=np.uint8)
    # Rows halt at different steps because of the puzzle.
    generator = torch.Generator().manual_seed(0)
    puzzles = torch.randn(rows, model.config.puzzle_emb_ndim, generator=generator)
    one_step = EvaluationConfig(batch_size=batch, halt="fixed", act_steps=1)
    predict_tokens(model, tokens[:batch], puzzles[:batch], one_step)  # compiles
    spent = 0

    def answer() -> None:
        nonlocal spent
        spent = predict_tokens(model, tokens, puzzles, config)[2]

    seconds = seconds_of(answer)
    operations = spent * flops(model.config, train=False)
    session.record(
        what,
        **{
            "variants/s": round(rows / seconds, 1),
            "ACT steps per variant": round(spent / rows, 2),
            "TFLOP/s": round(operations / seconds / 1e12, 2),
            "GiB": peak_gib(),
        },
    )
