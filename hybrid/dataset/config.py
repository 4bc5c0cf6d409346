"""What a dataset is made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hybrid.errors import check_fields


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Sources, augmentation and canvas; all but `canvas` is part of the dataset's fingerprint."""

    training: tuple[str, ...] = ("arc1-training",)
    """Sources whose every pair with an output is trained on."""
    evaluation: tuple[str, ...] = ("arc1-evaluation",)
    """Sources whose demonstrations are trained on and whose tests are asked."""
    variants: int = 1000
    """Augmentations drawn per task, beside the original."""
    max_side: int = 30
    """Side of the canvas. Tasks with larger demonstrations or test inputs are left out, counted."""
    on_overlap: Literal["refuse", "drop"] = "refuse"
    """What to do with a training task that holds a test pair of an evaluation task."""
    canvas: Literal["full", "bucketed"] = "full"
    """bucketed puts each task on the smallest of a few canvases that holds all of it that is known
    when its test is asked; an answer that is larger cannot be given, and counts as wrong. Puzzle
    identifiers are the same either way, and positions those of the full canvas."""
    hold_out_demos: int = 0
    """Demonstrations of each evaluation task, the last ones, kept out of training and of prompts:
    what `feedback.source=demos` tries the rule on."""
    hold_out_tasks: int = 0
    """Training tasks, drawn by the seed, that are asked instead: what hyperparameters are chosen
    by. Goes with an empty `evaluation`."""
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
                "hold_out_tasks asks training tasks: evaluation must be [], its tasks are not for"
                " choosing hyperparameters"
            )
        if not self.training and not self.evaluation:
            problems.append("training and evaluation are both empty: no source to read")
        if problems:
            raise ValueError("\n".join(problems))
