from __future__ import annotations

import time
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from hybrid.arc import Augmentation, Grid, Pair, Task, draw_variants, pair_hash


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def content(task: Task, dihedral: int, colours: np.ndarray) -> frozenset[tuple[str, int]]:
    """Build the variant and return the multiset of its pair hashes, without test outputs."""
    augmentation = Augmentation(task=task.id, dihedral=dihedral, colours=tuple(colours.tolist()))
    variant = augmentation.apply_task(task.without_answers())
    return frozenset(Counter(pair_hash(pair) for pair in variant.pairs).items())


def draw_by_brute_force(task: Task, count: int, seed: int) -> list[tuple[int, tuple[int, ...]]]:
    """Repeat the draws of draw_variants one variant at a time, comparing whole variants."""
    generator, seen = rng(seed), {content(task, 0, np.arange(10))}
    kept = [(0, tuple(range(10)))]
    for _ in range(5):
        dihedral = generator.integers(0, 8, count, dtype=np.uint8)
        orders = 1 + generator.random((count, 9)).argsort(axis=1)
        for k, order in zip(dihedral.tolist(), orders, strict=True):
            colours = np.array([0, *order], np.uint8)
            variant = content(task, k, colours)
            if variant not in seen and len(kept) <= count:
                seen.add(variant)
                kept.append((k, tuple(colours.tolist())))
        if len(kept) > count:
            break
    return kept


# Symmetric tasks or tasks with few colours, for which many draws coincide.
FEW = ["332efdb3", "6f8cd79b", "5ad8a7c0", "1990f7a8", "28e73c20", "4522001f"]


@pytest.mark.parametrize("task_id", [*FEW, "007bbfb7", "0934a4d8"])
def test_variants_match_brute_force(sets: dict[str, list[Task]], task_id: str) -> None:
    [task] = [t for t in sets["arc2-training"] + sets["arc2-evaluation"] if t.id == task_id]
    dihedral, colours = draw_variants(task, 75, rng(1))
    drawn = [(int(k), tuple(c.tolist())) for k, c in zip(dihedral, colours, strict=True)]
    assert drawn == draw_by_brute_force(task, 75, seed=1)


def test_a_task_with_few_distinct_variants_yields_few(sets: dict[str, list[Task]]) -> None:
    [task] = [t for t in sets["arc2-training"] if t.id == "332efdb3"]
    dihedral, _ = draw_variants(task, 1000, rng())
    # Symmetric grids of one colour on 0: only its nine values differ.
    assert len(dihedral) == 9


@pytest.mark.parametrize("count", [0, 1, 7, 1000])
def test_the_identity_comes_first_and_the_count_is_kept(toy: Task, count: int) -> None:
    dihedral, colours = draw_variants(toy, count, rng())
    assert dihedral.shape == (count + 1,) and dihedral.dtype == np.uint8
    assert colours.shape == (count + 1, 10) and colours.dtype == np.uint8
    assert dihedral[0] == 0 and colours[0].tolist() == list(range(10))
    assert (colours[:, 0] == 0).all() and (np.sort(colours) == np.arange(10)).all()


def test_variants_depend_only_on_the_generator(toy: Task) -> None:
    first, again, other = (draw_variants(toy, 50, rng(seed)) for seed in (3, 3, 4))
    assert all(map(np.array_equal, first, again))
    assert not all(map(np.array_equal, first, other))


def test_variants_do_not_depend_on_test_outputs(sets: dict[str, list[Task]]) -> None:
    by_id = {task.id: task for task in sets["arc2-training"]}
    for task_id in [*FEW, "007bbfb7"]:
        task = by_id[task_id]
        poison = np.arange(30, dtype=np.uint8).reshape(5, 6) % 10
        for test in (
            tuple(replace(pair, output=None) for pair in task.test),
            tuple(replace(pair, output=poison) for pair in task.test),
        ):
            poisoned = draw_variants(replace(task, test=test), 100, rng(5))
            assert all(map(np.array_equal, poisoned, draw_variants(task, 100, rng(5))))


def cell(colour: int, side: int = 1) -> Grid:
    return np.full((side, side), colour, np.uint8)


@pytest.mark.parametrize(
    ("train", "variants"),
    [
        # Colours 1 and 2 map to any two of nine: 72 ways, or 36 if they are interchangeable.
        ([(cell(1), cell(1)), (cell(2), cell(2))], 36),
        ([(cell(1), cell(2))], 72),
        ([(cell(1), cell(2)), (cell(2), cell(1))], 36),
        ([(cell(1), cell(0)), (cell(2), cell(0, side=2))], 72),
        ([(cell(1), cell(1)), (cell(2), cell(1))], 72),
    ],
)
def test_content_ignores_pair_order_but_keeps_pairs_together(
    train: list[tuple[Grid, Grid]], variants: int
) -> None:
    """Hashing inputs and outputs separately would give fewer variants."""
    pairs = tuple(Pair(input=one, output=two) for one, two in train)
    task = Task(id="t", train=pairs, test=(Pair(input=cell(0, side=3), output=None),))
    dihedral, colours = draw_variants(task, 500, rng())
    assert len(dihedral) == variants
    distinct = {content(task, int(k), c) for k, c in zip(dihedral, colours, strict=True)}
    assert len(distinct) == variants


def test_drawing_is_fast(sets: dict[str, list[Task]]) -> None:
    """The published builder hashes every grid and takes minutes; 200 tasks take 0.45 s here."""
    start = time.perf_counter()
    for task in sets["arc2-training"][:200]:
        draw_variants(task, 1000, rng())
    assert time.perf_counter() - start < 3.75, "800 tasks would take more than 15 s"
