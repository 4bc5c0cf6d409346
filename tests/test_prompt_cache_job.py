"""Order in which the prompts of a dataset are cached."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from helpers import config_of

from hybrid.dataset import Dataset, prepare
from hybrid.errors import UserError
from hybrid.llm.prompt import format_problem_text
from hybrid.prompt_cache import plan


def test_plan_contains_all_prompts_largest_first(tmp_path: Path) -> None:
    data = {"training": [], "evaluation": ["arc1-evaluation"], "variants": 1, "max_side": 9}
    config = config_of(tmp_path, data=data, llama={"prompt_cache": True}, training={"variants": 2})
    prepare(config.data, config.data_folder, say=lambda line: None)
    dataset, planned = Dataset.open(config.data_folder), plan(config)
    assert sorted(planned) == sorted(dataset.problems(2)) and len(planned) > 20
    cells = [
        sum(grid.size for pair in dataset.problem_at(*one).pairs for grid in pair.grids)
        for one in planned
    ]
    assert all(one >= other for one, other in pairwise(cells)) and cells[0] > cells[-1]
    lengths = [len(format_problem_text(dataset.problem_at(*one), 0)) for one in planned]

    def padded(lengths: list[int]) -> int:
        return sum(len(b) * max(b) for b in (lengths[i : i + 8] for i in range(0, len(lengths), 8)))

    by_task = [lengths[planned.index(one)] for one in dataset.problems(2)]
    assert padded(lengths) < 1.1 * sum(lengths) < padded(by_task)


def test_plan_requires_prompt_cache(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"llama\.prompt_cache is false"):
        plan(config_of(tmp_path))
