"""Real and hand-made tasks for the tests of hybrid.arc."""

from __future__ import annotations

import numpy as np
import pytest

from hybrid.arc import SOURCES, Grid, Pair, Task, load_tasks


@pytest.fixture(scope="session")
def sets() -> dict[str, list[Task]]:
    """Tasks of every embedded source, by source name."""
    return {name: load_tasks(name) for name in SOURCES}


@pytest.fixture
def toy() -> Task:
    """A task with two demonstrations and two answered tests; all grids differ."""

    def grid(*rows: list[int]) -> Grid:
        return np.array(rows, np.uint8)

    return Task(
        id="toy",
        train=(
            Pair(input=grid([1, 2]), output=grid([2, 1])),
            Pair(input=grid([3, 0], [0, 3]), output=grid([0, 3], [3, 0])),
        ),
        test=(
            Pair(input=grid([4, 5]), output=grid([5, 4])),
            Pair(input=grid([6, 7, 8]), output=grid([8, 7, 6])),
        ),
    )
