"""The questions of an evaluation: everything a predictor is told about a task, and no answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from hybrid.arc import Augmentation, Grid, Pair, Task, pair_hash
from hybrid.checkpoint import Checkpoint
from hybrid.config import Config
from hybrid.dataset import Dataset
from hybrid.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Question:
    """All that a solver is told about a task: there is no answer in it to read.

    Unless `oracle` is what was asked for: then, and only then, `answers` holds them.
    """

    task: Task
    """Its demonstrations are those that may be shown."""
    side: int
    """Of the canvas it is asked on."""
    views: tuple[Augmentation, ...]
    identifiers: range
    """Puzzle identifiers of the views and the spares; empty: use the blank one."""
    spare_views: tuple[Augmentation, ...] = ()
    """Further views, on which the voting baseline spends what self-correction cost."""
    held_out: Pair | None = None
    """A demonstration that was kept out of training and is not in `task`."""
    read_instead: Task | None = None
    """Another task, whose text is read in place of this one's."""
    answers: tuple[Grid, ...] | None = None

    def __post_init__(self) -> None:
        assert all(pair.output is None for pair in self.task.test), "an answer in a question"


def select_questions(config: Config, checkpoint: Checkpoint, dataset: Dataset) -> list[Question]:
    """The questions of an evaluation; UserError if the feedback it wants is not to be had."""
    hybrid = checkpoint.state["kind"] == "hybrid"
    asked = dataset.evaluated[: config.evaluation.limit]
    same = checkpoint.state["dataset"]["fingerprint"] == dataset.fingerprint
    known = same and config.evaluation.puzzle_ids == "trained"
    source = config.feedback.source if hybrid else "none"
    if source == "demos":
        _check_held_out(dataset, asked, checkpoint.trained_on)
    # All that could be asked: what is read instead must not depend on evaluation.limit.
    shown = [replace(dataset.tasks[t], train=dataset.demonstrations(t)) for t in dataset.evaluated]
    shuffled = hybrid and config.evaluation.text == "shuffled"
    if shuffled and len(shown) < 2:
        raise UserError("evaluation.text=shuffled: there is no other task to read")
    answers = Dataset.open(config.data_folder, answers=True) if source == "oracle" else None
    questions = []
    for n, task in enumerate(asked):
        first, stop = (int(v) for v in dataset.first_variant[task : task + 2])
        voting = min(config.evaluation.variants or stop - first, stop - first)
        if source == "vote" and voting < 2:
            raise UserError(f"feedback.source=vote: {shown[n].id} has one view, nobody to compare")
        if not hybrid:
            stop = first + voting
        views = [dataset.augmentation(variant) for variant in range(first, stop)]
        questions.append(
            Question(
                task=shown[n],
                side=int(dataset.sides[task]),
                views=tuple(views[:voting]),
                spare_views=tuple(views[voting:]),
                identifiers=range(first + 1, stop + 1) if known else range(0),
                held_out=dataset.held_out(task)[0] if source == "demos" else None,
                # Neighbours by id may be of a kind; half the list away is another task anyway.
                read_instead=shown[n - (len(shown) + 1) // 2] if shuffled else None,
                answers=_answers(answers.tasks[task]) if answers else None,
            )
        )
    return questions


def _answers(task: Task) -> tuple[Grid, ...]:
    found = tuple(pair.output for pair in task.test if pair.output is not None)
    if len(found) < len(task.test):
        raise UserError(f"feedback.source=oracle: the answers of {task.id} are not known")
    return found


def _check_held_out(dataset: Dataset, asked: Sequence[int], trained_on: Sequence[str]) -> None:
    """A demonstration that the model was trained on proves nothing: it is known by heart."""
    if not dataset.meta["config"]["hold_out_demos"]:
        raise UserError(
            "feedback.source=demos: no demonstration was held out; prepare and train with"
            " data.hold_out_demos=1"
        )
    seen = set(trained_on)
    void = [
        dataset.tasks[task].id
        for task in asked
        if any(pair_hash(pair) in seen for pair in dataset.held_out(task))
    ]
    if void:
        raise UserError(
            f"feedback.source=demos: the model was trained on the held-out demonstrations of"
            f" {len(void)} tasks ({', '.join(void[:5])}{', ...' if len(void) > 5 else ''})"
        )
