"""Reduce the reference recordings of the TRM to the golden files that its tests read.

    PYTHONPATH=. python tests/golden/extract.py FOLDER

A, A_bf16, B  ACT steps 0 and 3 of 4: loss, metrics, halt logits and logits of all four rows; the
              carries before and after step 3 of rows 2 and 3.
C             everything the trajectory test compares per step; every 4th EMA weight.
F             logits, labels, loss and gradient; for "normal" also from bfloat16 logits.

Float32 values are exact. Weights are not copied: the reference drew them (truncated normal,
float32) from a seeded Mersenne Twister, so a file contains the seed and, per weight, the distance
in ulps from a float64 draw; benchmarks/golden.py reads it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from benchmarks.golden import ROWS, STEPS, Arrays, draw

HERE = Path(__file__).parent


def pack(state: Mapping[str, np.ndarray], seed: int) -> Arrays:
    """Store matrices as distances in ulps from `draw` and everything else unchanged."""
    stream = np.random.RandomState(seed)
    packed: Arrays = {"seed": np.array(seed)}
    for name, value in state.items():
        if value.ndim < 2 or "puzzle_emb" in name:
            packed[f"raw.{name}"] = value
            continue
        ulps = value.view(np.int32).astype(np.int64) - draw(stream, value.shape).view(np.int32)
        # The halt head was overwritten after its draw: its distances are large but exact.
        packed[f"ulps.{name}"] = ulps.astype(np.int8) if abs(ulps).max() < 128 else ulps
    return packed


def with_prefix(file: Mapping[str, np.ndarray], prefix: str) -> Arrays:
    return {name.removeprefix(prefix): file[name] for name in file if name.startswith(prefix)}


def forward(file: Mapping[str, np.ndarray], seed: int) -> Arrays:
    kept = pack(with_prefix(file, "state."), seed) if "state.model.inner.H_init" in file else {}
    kept |= {name: file[name] for name in file if name.startswith("batch.")}
    for name in file:
        if name.startswith("step.metric.") or name.removeprefix("step.") in (
            *("logits", "q_halt", "q_continue", "steps", "halted", "loss"),
        ):
            kept[name] = file[name][STEPS]
    for name in ("z_H", "z_L"):
        before, after = (file[f"step.{name}"][step][ROWS] for step in (STEPS[-1] - 1, STEPS[-1]))
        kept |= {f"before.{name}": before, f"after.{name}": after}
    return kept


def trajectory(file: Mapping[str, np.ndarray], seed: int) -> Arrays:
    kept = pack(with_prefix(file, "init."), seed)
    steps = ("loss", "lr", "lr_puzzle", "q_halt", "halted", "nsteps", "grad_norm", "cur_inputs")
    steps += ("puzzle_emb_weights", "local_weights_grad", "local_ids")
    kept |= {f"step.{name}": file[f"step.{name}"] for name in steps}
    kept |= {name: file[name] for name in file if name.startswith(("batch.", "step.metric."))}
    kept |= {
        name: file[name] for name in file if name.startswith("final.") and "puzzle" not in name
    }
    kept |= {name: file[name].ravel()[::4] for name in file if name.startswith("ema.")}
    return kept


def stablemax(file: Mapping[str, np.ndarray]) -> Arrays:
    names = ("logits", "labels", "loss", "grad_of_sum")
    kept = {name: file[name] for name in file if name.partition(".")[2] in names}
    return kept | {name: file[name] for name in ("normal.bf16_loss", "normal.bf16_grad")}


def main(source: Path) -> None:
    for name in ("A_trm_attn_tiny", "A_trm_attn_tiny_bf16", "B_trm_mlpt_tiny", "C_train_traj_tiny"):
        metadata = json.loads((source / f"{name}.json").read_text())
        cut = trajectory if name.startswith("C") else forward
        np.savez_compressed(HERE / name, **cut(np.load(source / f"{name}.npz"), metadata["seed"]))
        short = {
            key: metadata[key]
            for key in ("what", "config", "hyper", "grad_norm_columns", "versions")
            if key in metadata
        }
        (HERE / f"{name}.json").write_text(json.dumps(short, indent=1) + "\n")
    np.savez_compressed(HERE / "F_stablemax", **stablemax(np.load(source / "F_stablemax.npz")))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
