"""Random variants of a task to train on, distinct by content."""

from __future__ import annotations

from functools import cache

import numpy as np
import numpy.typing as npt

from hybrid.arc.augment import DIHEDRAL, INVERSE_DIHEDRAL
from hybrid.arc.task import COLOURS, MAX_SIDE, Grid, Task

UInt8s = npt.NDArray[np.uint8]
UInt64s = npt.NDArray[np.uint64]

DRAWS_PER_VARIANT = 5
"""Maximum draws per requested variant: some tasks have few distinct ones (332efdb3)."""


def draw_variants(task: Task, count: int, rng: np.random.Generator) -> tuple[UInt8s, UInt8s]:
    """Draw the identity and up to `count` random variants: dihedral [n] and colours [n, 10].

    n <= count + 1. No two variants have the same content, which is the multiset of demonstrations
    and test inputs. **Test outputs are ignored**: they are answers, and not even the choice of
    training rows may depend on them. At most 5 * count candidates are drawn; a task with fewer
    distinct variants is not an error. Pass each task its own `rng`, because the amount of random
    numbers used depends on the task.
    """
    dihedral = np.zeros(1, np.uint8)
    colours = np.arange(COLOURS, dtype=np.uint8)[None]
    content = _TaskHash(task)
    hashes = content.of_variants(dihedral, colours)
    first = np.zeros(1, np.intp)
    for _ in range(DRAWS_PER_VARIANT):
        drawn = _draw(count, rng)
        dihedral = np.concatenate([dihedral, drawn[0]])
        colours = np.concatenate([colours, drawn[1]])
        hashes = np.concatenate([hashes, content.of_variants(*drawn)])
        first = np.sort(np.unique(hashes, return_index=True)[1])[: count + 1]
        if len(first) == count + 1:
            break
    return dihedral[first], colours[first]


def _draw(count: int, rng: np.random.Generator) -> tuple[UInt8s, UInt8s]:
    dihedral = rng.integers(0, len(DIHEDRAL), count, dtype=np.uint8)
    colours = np.zeros((count, COLOURS), np.uint8)
    colours[:, 1:] = 1 + rng.random((count, COLOURS - 1)).argsort(axis=1)
    return dihedral, colours


class _TaskHash:
    """64-bit content hashes of a task's variants, computed without building their grids.

    A grid hashes to the sum over its cells of value[colour] * weight[row, column], modulo 2^64
    (colour 0 has a value too, so shapes count). Grouped by colour this is
    sum_c value[new colour of c] * W[c], where W depends only on the grid and the dihedral
    transform: eight small tables per grid serve any number of variants.
    """

    def __init__(self, task: Task) -> None:
        assert all(pair.output is not None for pair in task.train), task.id
        known = [*task.train, *task.without_answers().test]
        grids = [grid for pair in known for grid in pair.grids]
        self.tables = np.stack([_colour_weights(grid) for grid in grids])  # [grids, 8, 10]
        self.demonstrations = len(task.train)

    def of_variants(self, dihedral: UInt8s, colours: UInt8s) -> UInt64s:
        """Return the hash of each variant [n], which does not depend on the order of the pairs."""
        values = _constants()[1][colours]  # [n, 10]
        hashes = (self.tables[:, dihedral] * values).sum(axis=-1)  # [grids, n]
        paired = 2 * self.demonstrations
        inputs, outputs, tests = hashes[0:paired:2], hashes[1:paired:2], hashes[paired:]
        # Mixing binds each input to its output; a plain sum would lose which belongs to which.
        pairs = _mix(_mix(inputs) + outputs).sum(axis=0)
        # Inputs of pairs are mixed twice, test inputs once, so that the two do not collide.
        return np.asarray(pairs + _mix(tests).sum(axis=0))


@cache
def _constants() -> tuple[UInt64s, UInt64s]:
    """Return fixed weights [30, 30] and values [10], so that hashes agree across processes."""
    rng = np.random.Generator(np.random.PCG64(20_251_004))
    weights = rng.integers(0, 2**64, (MAX_SIDE, MAX_SIDE), dtype=np.uint64)
    return weights, rng.integers(0, 2**64, COLOURS, dtype=np.uint64)


def _colour_weights(grid: Grid) -> UInt64s:
    """Return W [8, 10]: for each transform, the sum of the weights of each colour's cells."""
    weights, _ = _constants()
    shapes = [transform(grid).shape for transform in DIHEDRAL]
    # The inverse transform gives each cell the weight of the position that it is moved to.
    moved = [
        DIHEDRAL[INVERSE_DIHEDRAL[t]](weights[:height, :width]).ravel()
        for t, (height, width) in enumerate(shapes)
    ]
    is_colour = grid.ravel()[:, None] == np.arange(COLOURS)
    return np.asarray(np.stack(moved) @ is_colour.astype(np.uint64))


def _mix(x: UInt64s) -> UInt64s:
    """Apply the splitmix64 finaliser (Steele, Lea and Flood 2014), a scrambling bijection."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
