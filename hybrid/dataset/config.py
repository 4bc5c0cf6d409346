"""Configuration of a prepared dataset."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hybrid.errors import check_fields


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Sources, augmentation and canvas; all but `canvas` are part of the dataset's fingerprint."""

    training: tuple[str, ...] = ("arc1-training",)
    """Sources whose pairs with an output are all trained on."""
    evaluation: tuple[str, ...] = ("arc1-evaluation",)
    """Sources whose demonstrations are trained on and whose tests are evaluated."""
    variants: int = 1000
    """Augmented variants drawn per task, in addition to the original."""
    max_side: int = 30
    """Side of the canvas. Larger tasks (demonstrations, test inputs) are excluded and counted."""
    on_overlap: Literal["refuse", "drop"] = "refuse"
    """Action for a training task that contains a test pair of an evaluation task."""
    canvas: Literal["full", "bucketed"] = "full"
    """bucketed: put each task on the smallest of a few canvases that fits its grids, except answers
    of evaluation tasks; a larger answer cannot be predicted and counts as wrong. Puzzle identifiers
    do not depend on it, and positions are those of the full canvas."""
    hold_out_demos: int = 0
    """Last demonstrations of each evaluation task to exclude from training and prompts, for
    `feedback.source=demos`."""
    hold_out_tasks: int = 0
    """Training tasks, drawn by the seed, to evaluate instead, for choosing hyperparameters.
    Requires an empty `evaluation`."""
    seed: int = 0

    def __post_init__(self) -> None:
        problems = check_fields(
            self,
            variants=(0, 10**6),
            max_side=(1, 30),
            hold_out_demos=(0, 10),
            hold_out_tasks=(0, None),
            seed=(0, 2**63),
        )
        if self.hold_out_tasks and self.evaluation:
            problems.append(
                "hold_out_tasks requires evaluation=[]: hyperparameters must not be chosen on"
                " evaluation tasks"
            )
        if not self.training and not self.evaluation:
            problems.append("training and evaluation are both empty: no source to read")
        if problems:
            raise ValueError("\n".join(problems))
