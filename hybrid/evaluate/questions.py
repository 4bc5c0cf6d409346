"""The questions of an evaluation: the inputs of a predictor for each task, without answers."""

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
    """The inputs of a predictor for one task; `answers` is set for feedback.source=oracle only."""

    task: Task
    """The task without test outputs and without held-out demonstrations."""
    side: int
    """Side of the canvas."""
    variants: tuple[Augmentation, ...]
    """The augmentations that vote, the original first."""
    identifiers: range
    """Puzzle identifiers of `variants`, then `spare_variants`; empty: use the blank one."""
    spare_variants: tuple[Augmentation, ...] = ()
    """Further augmentations for the voting baseline."""
    held_out: Pair | None = None
    """A demonstration held out of training and of `task` (feedback.source=demos)."""
    read_instead: Task | None = None
    """The task whose text the language model reads instead (evaluation.text=shuffled)."""
    answers: tuple[Grid, ...] | None = None

    def __post_init__(self) -> None:
        assert all(pair.output is None for pair in self.task.test), "an answer in a question"


def select_questions(config: Config, checkpoint: Checkpoint, dataset: Dataset) -> list[Question]:
    """Return the questions of an evaluation, in task order.

    Raises UserError if the dataset or the checkpoint does not allow the configured feedback.
    """
    hybrid = checkpoint.state["kind"] == "hybrid"
    evaluated = dataset.evaluated[: config.evaluation.limit]
    same_dataset = checkpoint.state["dataset"]["fingerprint"] == dataset.fingerprint
    has_identifiers = same_dataset and config.evaluation.puzzle_ids == "trained"
    source = config.feedback.source if hybrid else "none"
    if source == "demos":
        _check_held_out(dataset, evaluated, checkpoint.trained_on)
    # All evaluation tasks: the shuffled text of a task must not depend on evaluation.limit.
    tasks = [replace(dataset.tasks[t], train=dataset.demonstrations(t)) for t in dataset.evaluated]
    shuffled = hybrid and config.evaluation.text == "shuffled"
    if shuffled and len(tasks) < 2:
        raise UserError("evaluation.text=shuffled: needs at least two evaluation tasks")
    answers = Dataset.open(config.data_folder, answers=True) if source == "oracle" else None
    questions = []
    for n, task in enumerate(evaluated):
        first, stop = (int(v) for v in dataset.first_variant[task : task + 2])
        voting = min(config.evaluation.variants or stop - first, stop - first)
        if source == "vote" and voting < 2:
            raise UserError(
                f"feedback.source=vote: {tasks[n].id} has one variant; evaluate at least two"
            )
        if not hybrid:
            stop = first + voting
        variants = [dataset.augmentation(variant) for variant in range(first, stop)]
        questions.append(
            Question(
                task=tasks[n],
                side=int(dataset.sides[task]),
                variants=tuple(variants[:voting]),
                spare_variants=tuple(variants[voting:]),
                identifiers=range(first + 1, stop + 1) if has_identifiers else range(0),
                held_out=dataset.held_out(task)[0] if source == "demos" else None,
                # Adjacent ids may be related tasks, so take the one half the list away.
                read_instead=tasks[n - (len(tasks) + 1) // 2] if shuffled else None,
                answers=_answers(answers.tasks[task]) if answers else None,
            )
        )
    return questions


def _answers(task: Task) -> tuple[Grid, ...]:
    outputs = tuple(pair.output for pair in task.test if pair.output is not None)
    if len(outputs) < len(task.test):
        raise UserError(f"feedback.source=oracle: the answers of {task.id} are not known")
    return outputs


def _check_held_out(dataset: Dataset, evaluated: Sequence[int], trained_on: Sequence[str]) -> None:
    """Raise UserError if no demonstration was held out or the model was trained on one."""
    if not dataset.meta["config"]["hold_out_demos"]:
        raise UserError(
            "feedback.source=demos: no demonstration was held out; prepare and train with"
            " data.hold_out_demos=1"
        )
    hashes = set(trained_on)
    leaked = [
        dataset.tasks[task].id
        for task in evaluated
        if any(pair_hash(pair) in hashes for pair in dataset.held_out(task))
    ]
    if leaked:
        raise UserError(
            f"feedback.source=demos: the model was trained on the held-out demonstrations of"
            f" {len(leaked)} tasks ({', '.join(leaked[:5])}{', ...' if len(leaked) > 5 else ''})"
        )
