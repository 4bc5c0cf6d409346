"""Exact resuming: a run again, and a run in two halves, against the same run in one piece."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors.torch import load_file

from benchmarks.gpu.session import Session, experiment
from hybrid.context import LocalContext
from hybrid.train import pretrain


def run(session: Session) -> None:
    """Check that runs repeat bit for bit with deterministic algorithms; measure it without."""
    # Read by cuBLAS when it starts; without it matrix products may differ between two runs.
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    cases = [(False, False), (True, False)]
    if not session.tiny:
        cases.append((True, True))
    for deterministic, compiled in cases:
        torch.use_deterministic_algorithms(deterministic, warn_only=True)
        root = session.scratch / f"{deterministic}-{compiled}"
        what = "compiled" if compiled else "eager"
        what += f", deterministic algorithms {'on' if deterministic else 'off'}"
        with session.measuring(what):
            found = differences(root, session.device, 6 if session.tiny else 20, compiled)
            checked = {"ok": not any(found.values())} if deterministic else {}
            session.record(what, **found, **checked)


def differences(root: Path, device: torch.device, steps: int, compiled: bool) -> dict[str, float]:
    """Largest differences of a run, repeated and interrupted, from the run in one piece."""
    whole = _train(root, "whole", device, steps, compiled)
    again = _train(root, "again", device, steps, compiled)
    _train(root, "interrupted", device, steps // 2, compiled)
    interrupted = _train(root, "interrupted", device, steps, compiled)
    return {"again": distance(whole, again), "interrupted": distance(whole, interrupted)}


def distance(one: Path, other: Path) -> float:
    """Largest absolute difference of any number in two checkpoints."""
    files = sorted(path.name for path in one.glob("*.safetensors"))
    assert files == sorted(path.name for path in other.glob("*.safetensors"))
    worst = 0.0
    for file in files:
        ours, theirs = load_file(one / file), load_file(other / file)
        for name, value in ours.items():
            if value.numel():
                worst = max(worst, float((value.double() - theirs[name].double()).abs().max()))
    return worst


def _train(root: Path, name: str, device: torch.device, steps: int, compiled: bool) -> Path:
    config = experiment(
        root,
        device,
        {"training": ["arc1-training"], "evaluation": [], "variants": 3, "max_side": 5},
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
        },
        cluster={"compile": compiled},
        logging={"run": name},
    )
    return pretrain(config, LocalContext(device)).checkpoint
