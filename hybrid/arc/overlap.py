"""Contamination: evaluation tasks whose content also appears in the training tasks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from hybrid.arc.task import Pair, Task, grid_hash, pair_hash

Link = tuple[str, str]
"""(training task id, evaluation task id)."""


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """Sorted links between training and evaluation tasks with common content, regardless of ids.

    `leaks`: a pair of the training task is a test of the evaluation task, so a model trained on
    it has seen the answer. `identical`: the same pairs, in any order and train/test split.
    `sharing`: at least one pair in common; includes the other two.
    """

    leaks: tuple[Link, ...]
    identical: tuple[Link, ...]
    sharing: tuple[Link, ...]
    evaluated: int

    @property
    def leaking_tasks(self) -> frozenset[str]:
        """Ids of the training tasks to drop before scoring on these evaluation tasks."""
        return frozenset(training for training, _ in self.leaks)

    def describe(self) -> str:
        """Summarize in three lines the evaluation tasks of each kind, with the first few ids."""
        kinds = (
            (self.leaks, "have a test pair among the training pairs"),
            (self.identical, "are identical to a training task"),
            (self.sharing, "share at least one pair with a training task"),
        )
        return "\n".join(self._line(links, kind) for links, kind in kinds)

    def _line(self, links: Sequence[Link], kind: str) -> str:
        tasks = sorted({evaluation for _, evaluation in links})
        names = ": " + ", ".join(tasks[:8]) if tasks else ""
        return f"{len(tasks)} of {self.evaluated} evaluation tasks {kind}{names}" + (
            ", ..." if len(tasks) > 8 else ""
        )


def find_overlap(training: Sequence[Task], evaluation: Sequence[Task]) -> Overlap:
    """Find the evaluation tasks that have pairs in common with training tasks.

    Training pairs count if they have an output, demonstrations and tests alike: pass training
    tasks `without_answers()` if the model is not trained on their tests. A test whose output is
    unknown leaks if its *input* is a training input. Augmented variants are not detected.
    """
    by_key: defaultdict[str, set[str]] = defaultdict(set)
    by_content: defaultdict[str, set[str]] = defaultdict(set)
    for task in training:
        by_content[task.content_hash].add(task.id)
        for pair in task.pairs:
            if pair.output is not None:
                by_key[pair_hash(pair)].add(task.id)
                by_key[grid_hash(pair.input)].add(task.id)

    def links(task: Task, pairs: Iterable[Pair]) -> Iterator[Link]:
        for pair in pairs:
            for training_id in by_key.get(_key(pair), ()):
                yield training_id, task.id

    return Overlap(
        leaks=_sorted(link for task in evaluation for link in links(task, task.test)),
        identical=_sorted(
            (training_id, task.id)
            for task in evaluation
            for training_id in by_content.get(task.content_hash, ())
        ),
        sharing=_sorted(link for task in evaluation for link in links(task, task.pairs)),
        evaluated=len(evaluation),
    )


def _key(pair: Pair) -> str:
    return grid_hash(pair.input) if pair.output is None else pair_hash(pair)


def _sorted(links: Iterable[Link]) -> tuple[Link, ...]:
    return tuple(sorted(set(links)))
