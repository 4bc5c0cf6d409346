"""Exact resume: a repeated and an interrupted run against an uninterrupted one."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.gpu.session import Session, experiment
from hybrid.context import LocalContext
from hybrid.train import pretrain

CASES = ((True, False), (True, True), (False, False))
"""(deterministic algorithms, compiled). The checks are before the measurement."""
TINY_CASES = ((True, False), (False, False))


def run(session: Session) -> None:
    """Check that runs repeat bit for bit with deterministic algorithms; measure it without."""
    # cuBLAS reads it when it starts; without it matrix products may differ between two runs.
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    for deterministic, compiled in TINY_CASES if session.tiny else CASES:
        torch.use_deterministic_algorithms(deterministic, warn_only=True)
        root = session.scratch / f"{deterministic}-{compiled}"
        what = "compiled" if compiled else "eager"
        what += f", deterministic algorithms {'on' if deterministic else 'off'}"
        with session.measuring(what):
            found = differences(root, session.device, 6 if session.tiny else 20, compiled)
            checked = {"ok": not any(found.values())} if deterministic else {}
            session.record(what, **found, **checked)


def differences(
    root: Path, device: torch.device, steps: int, compiled: bool, **sections: dict[str, Any]
) -> dict[str, float]:
    """Return the largest differences of a repeated and of an interrupted run from one run.

    `sections` override keys of the config.
    """
    train = partial(_train, root, device=device, compiled=compiled, sections=sections)
    once, again = train("once", steps=steps), train("again", steps=steps)
    train("interrupted", steps=steps // 2)
    interrupted = train("interrupted", steps=steps)
    return {"again": distance(once, again), "interrupted": distance(once, interrupted)}


def distance(one: Path, other: Path) -> float:
    """Return the largest absolute difference of any number in two checkpoints; inf for NaN."""
    files = sorted(path.name for path in one.glob("*.safetensors"))
    assert files == sorted(path.name for path in other.glob("*.safetensors"))
    worst = 0.0
    for file in files:
        ours, theirs = load_file(one / file), load_file(other / file)
        for name, value in ours.items():
            if value.numel():
                largest = float((value.double() - theirs[name].double()).abs().max())
                worst = max(worst, math.inf if math.isnan(largest) else largest)
    return worst


def _train(
    root: Path,
    name: str,
    *,
    device: torch.device,
    steps: int,
    compiled: bool,
    sections: Mapping[str, dict[str, Any]],
) -> Path:
    data = {"training": ["arc1-training"], "evaluation": [], "variants": 3, "max_side": 5}
    config = experiment(
        root,
        device,
        data | sections.get("data", {}),
        trm={
            "hidden_size": 128,
            "num_heads": 4,
            "expansion": 2,
            "H_cycles": 2,
            "L_cycles": 2,
            "halt_max_steps": 4,
            "halt_exploration_prob": 0.5,
            "puzzle_emb_ndim": 128,
            "puzzle_emb_len": 2,
        },
        training={
            "batch_size": 16,
            "steps": steps,
            "lr": 1e-3,
            "puzzle_lr": 1e-1,
            "lr_warmup_steps": 2,
            **sections.get("training", {}),
        },
        cluster={"compile": compiled},
        logging={"run": name},
    )
    return pretrain(config, LocalContext(device)).checkpoint
