"""Joint training around an 8B LLaMA with random weights, and the time of an attempt."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers import LlamaConfig as Shape

from benchmarks.gpu.session import Session, cudnn_attention, experiment, median_seconds
from benchmarks.measure import peak_gib
from hybrid.config import Config
from hybrid.context import LocalContext
from hybrid.llm import LlamaConfig, Reader, padding
from hybrid.llm.attention import use_grouped_attention
from hybrid.llm.backbone import Backbone
from hybrid.llm.tiny import tiny_random
from hybrid.train.joint import Joint
from hybrid.train.loop import train
from hybrid.train.tracking import read_metrics

LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
}
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 16384,
}
SMALL_TRM = {
    "hidden_size": 32,
    "num_heads": 2,
    "expansion": 1,
    "L_layers": 1,
    "H_cycles": 2,
    "L_cycles": 1,
    "puzzle_emb_ndim": 32,
    "puzzle_emb_len": 1,
}
STEPS = 4
NEEDED = 12.0
"""Seconds without which a case is skipped."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """Settings of a joint run."""

    rows: int
    recompute: bool = True
    cudnn: bool = True
    padding: bool = True
    """Pad prompts and texts to multiples of hybrid.llm.padding's constants."""
    compiled: bool = False

    def __str__(self) -> str:
        return (
            f"{_rows(self.rows)}, {'compiled' if self.compiled else 'eager'},"
            f" recompute {_on(self.recompute)}, cuDNN attention {_on(self.cudnn)},"
            f" padding {_on(self.padding)}"
        )


BASE = Case(rows=8)
FIRST_CASES = (Case(rows=1), BASE)
"""Cases before the measurement of single attempts."""
CASES = (
    replace(BASE, recompute=False),
    replace(BASE, padding=False),
    replace(BASE, cudnn=False),
    replace(BASE, rows=16),
    replace(BASE, compiled=True),
)
"""Each differs from BASE in one setting. The most informative are first: time may run out."""
PREDICTED_GIB = {
    Case(rows=1): 16,
    BASE: 23,
    replace(BASE, recompute=False): 47,
    replace(BASE, rows=16): 31,
    replace(BASE, compiled=True): 23,
}
"""The memory estimate of --dry-run, plus 1 GiB for the output head that the check keeps."""


def run(session: Session) -> None:
    """Measure joint steps, and an attempt against a new prefill of its prompt."""
    shape = SMALL if session.tiny else LLAMA_8B
    reader = None
    with session.measuring("model"):
        llama = LlamaConfig(model="tiny-random", max_prompt_tokens=2000, batch_size=1)
        reader = random_reader(shape, llama, session.dtype, session.device)
        session.record("model", GiB=peak_gib())
    if reader is None:
        return
    for case in FIRST_CASES:
        _step(session, reader, case)
    for rows in (1, 8):
        _attempt(session, reader.backbone, rows)
    for case in CASES[:2] if session.tiny else CASES:
        _step(session, reader, case)


def random_reader(
    shape: dict[str, int], config: LlamaConfig, dtype: torch.dtype, device: torch.device
) -> Reader:
    """Return a reader around a LLaMA of `shape` with random weights and a byte tokenizer.

    `dtype` is the compute dtype; weights that learn are kept in float32 at least.
    """
    weights = dtype if config.frozen else torch.promote_types(dtype, torch.float32)
    with device:
        model: Any = AutoModelForCausalLM.from_config(Shape(**shape), dtype=weights)
    use_grouped_attention(model)
    return Reader(Backbone(model, tiny_random(dtype)[1], config, "none", dtype))


class Uncalibrated(Joint):
    """Joint training without the calibration of the adapter, which reads 64 prompts."""

    def setup(self) -> None:
        """Keep the adapter's initial statistics."""


def hybrid_config(
    root: Path,
    device: torch.device,
    *,
    tiny: bool,
    run: str,
    compiled: bool,
    data: Mapping[str, Any] | None = None,
    llama: Mapping[str, Any] | None = None,
    **training: Any,
) -> Config:
    """Return the config of a joint run with the published TRM, or with a small one if `tiny`."""
    return experiment(
        root,
        device,
        {
            "training": ["arc1-training"],
            "evaluation": [],
            "variants": 2,
            "max_side": 6 if tiny else 30,
            **(data or {}),
        },
        trm=SMALL_TRM if tiny else {},
        llama={
            "model": "tiny-random",
            "max_prompt_tokens": 2000,
            "batch_size": 1,
            **(llama or {}),
        },
        adapter={"hidden": 32, "prefix_tokens": 8} if tiny else {},
        feedback={"source": "none"},
        training={"steps": STEPS, "max_attempts": 3 if tiny else 16, **training},
        cluster={"compile": compiled},
        logging={"run": run},
    )


def _step(session: Session, reader: Reader, case: Case) -> None:
    if not session.has_time(str(case), NEEDED):
        return
    with (
        session.measuring(str(case)),
        cudnn_attention(case.cudnn),
        nullcontext() if case.padding else without_padding(),
    ):
        config = hybrid_config(
            session.scratch,
            session.device,
            tiny=session.tiny,
            run=str(case),
            compiled=case.compiled,
            batch_size=case.rows,
            recompute=case.recompute,
        )
        train(config, LocalContext(session.device), partial(Uncalibrated, reader=reader))
        lines = read_metrics(config.run_folder / "metrics.jsonl")
        first, *seconds = [line["seconds_per_step"] for line in lines if "loss" in line]
        session.record(
            str(case),
            attempts=config.training.max_attempts,
            **{
                "s a step": round(statistics.median(seconds), 3),
                "first step s": round(first, 2),
                "GiB": peak_gib(),
                "predicted GiB": session.predicted(PREDICTED_GIB.get(case)),
            },
        )


@contextmanager
def without_padding() -> Iterator[None]:
    """Pad prompts and texts only to the longest of a batch."""
    multiples = (padding.PROBLEM_MULTIPLE, padding.TEXT_MULTIPLE)
    before = [dict(each) for each in multiples]
    for each in multiples:
        each.clear()
    try:
        yield
    finally:
        for each, saved in zip(multiples, before, strict=True):
            each.update(saved)


@torch.no_grad()
def _attempt(session: Session, backbone: Backbone, rows: int) -> None:
    tokens = 200 if session.tiny else 2000
    what = f"attempt of {_rows(rows)}"
    with session.measuring(what):
        problems = [[5] * tokens] * rows
        problem = median_seconds(lambda: backbone.prefill(problems), calls=3, warm_up=1)
        encoding = backbone.prefill(problems)
        latent = torch.zeros(rows, 8, backbone.hidden_size, device=session.device)
        attempt = median_seconds(
            lambda: backbone.read(encoding, latent, [[7] * 25] * rows, recompute=False)
        )
        session.record(
            what,
            **{
                "attempt ms": round(1000 * attempt, 2),
                f"reading {tokens} tokens again ms": round(1000 * problem, 2),
                "ratio": round(attempt / problem, 4),
            },
        )


def _rows(rows: int) -> str:
    return f"{rows} {'row' if rows == 1 else 'rows'}"


def _on(value: bool) -> str:
    return "on" if value else "off"
