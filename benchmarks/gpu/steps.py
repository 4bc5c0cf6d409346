"""Training steps of the TRM: ours and the plain trainer, several batch sizes, both canvas modes."""

from __future__ import annotations

import statistics
from dataclasses import replace
from itertools import cycle
from typing import Any, Literal

from benchmarks.gpu.session import Session, cudnn_attention, median_seconds
from benchmarks.measure import peak_gib, seconds_of
from benchmarks.steps import FULL, GOLDEN, Side, flops, random_rows
from hybrid.context import LocalContext
from hybrid.train import pretrain
from hybrid.train.tracking import read_metrics

CASES: tuple[tuple[str, int, int | None], ...] = (
    ("compiled", 192, None),
    ("compiled static", 192, None),
    ("eager", 192, None),
)
"""Side, rows of a step, rows of a micro-batch. The most important cases are first."""
RUNS: tuple[tuple[Literal["full", "bucketed"], bool], ...] = (
    ("full", True),
    ("bucketed", True),
    ("bucketed", False),
)
"""Canvas mode, cuDNN attention. The batch sizes of bucketed canvases vary from step to step, and
cuDNN builds a plan for each new shape."""
LATER_CASES: tuple[tuple[str, int, int | None], ...] = (
    ("plain", 192, None),
    ("plain compiled", 192, None),
    ("compiled", 24, None),
    ("compiled", 384, None),
    ("compiled", 768, 192),
    ("compiled", 96, None),
)
TINY_CASES = (("eager", 4, None), ("eager", 8, 4), ("plain", 4, None))
NEEDED = {"plain compiled": 60.0, "compiled static": 40.0}
"""Seconds without which a side is skipped: the first step compiles."""
NEEDED_ELSE = 10.0
PREDICTED = {("compiled", 192): 820, ("eager", 192): 400}
PREDICTED_RUNS = {"full": 820, "bucketed": 2100}
"""Samples per second on an H100."""
PREDICTED_LIMIT = 1375
"""Samples per second of its matrix products alone, on the full canvas."""


def run(session: Session) -> None:
    """Measure steps on random rows and short runs on ARC-1 training tasks."""
    limit = session.predicted(PREDICTED_LIMIT)
    session.record("matrix products alone, full canvas", **{"predicted samples/s": limit})
    for case in TINY_CASES if session.tiny else CASES:
        _step(session, *case)
    for canvas, cudnn in RUNS:
        _run(session, canvas, cudnn)
    for case in () if session.tiny else LATER_CASES:
        _step(session, *case)


def _step(session: Session, side: str, rows: int, micro: int | None) -> None:
    config = replace(GOLDEN if session.tiny else FULL, num_puzzle_identifiers=1000)
    what = f"{side}, {rows} rows" + (f" in micro-batches of {micro}" if micro else "")
    if not session.has_time(what, NEEDED.get(side, NEEDED_ELSE)):
        return
    with session.measuring(what):
        trained = Side(side, config, rows, session.device, micro_batch_size=micro)
        batches = cycle([random_rows(config, rows, seed, session.device) for seed in range(2)])
        first = seconds_of(lambda: trained.train(next(batches)))
        calls, warm_up = (2, 1) if session.tiny else (6, 2)
        seconds = median_seconds(lambda: trained.train(next(batches)), calls=calls, warm_up=warm_up)
        operations = rows * flops(config, train=True)
        session.record(
            what,
            ms=round(1000 * seconds, 2),
            **{
                "samples/s": round(rows / seconds, 1),
                "predicted samples/s": session.predicted(PREDICTED.get((side, rows))),
                "TFLOP/s": round(operations / seconds / 1e12, 2),
                "GiB": peak_gib(),
                "first step s": round(first, 1),
            },
        )


def _run(session: Session, canvas: Literal["full", "bucketed"], cudnn: bool) -> None:
    """Measure the samples a second of a run with micro-batches."""
    what = f"run, {canvas} canvas, cuDNN attention {'on' if cudnn else 'off'}"
    if not session.has_time(what, NEEDED_ELSE):
        return
    tiny: dict[str, Any] = {
        "hidden_size": 64,
        "num_heads": 2,
        "expansion": 1,
        "H_cycles": 1,
        "L_cycles": 2,
        "puzzle_emb_ndim": 64,
        "puzzle_emb_len": 1,
    }
    rows, micro, steps = (8, 4, 4) if session.tiny else (768, 192, 8)
    with session.measuring(what), cudnn_attention(cudnn):
        config = session.config(
            {
                "training": ["arc1-training"],
                "evaluation": [],
                "variants": 10,
                "max_side": 12 if session.tiny else 30,
                "canvas": canvas,
            },
            trm=tiny if session.tiny else {},
            training={"batch_size": rows, "micro_batch_size": micro, "steps": steps},
            logging={"run": f"{canvas}-{cudnn}"},
        )
        pretrain(config, LocalContext(session.device))
        lines = read_metrics(config.run_folder / "metrics.jsonl")
        # The first steps compile, and cuDNN builds its plans.
        rates = [line["samples_per_s"] for line in lines if "loss" in line][steps // 2 :]
        session.record(
            what,
            rows=f"{rows} in micro-batches of {micro}",
            **{
                "samples/s": round(statistics.median(rates), 1),
                "predicted samples/s": session.predicted(PREDICTED_RUNS[canvas]),
                "GiB": peak_gib(),
            },
        )
