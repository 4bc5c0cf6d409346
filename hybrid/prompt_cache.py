"""Filling the prompt cache: prefill of all prompts of a dataset ahead of training."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch

from hybrid.config import Config
from hybrid.dataset import Dataset
from hybrid.device import compute_device
from hybrid.errors import UserError
from hybrid.llm import open_reader


class PromptCacher:
    """Language model together with the prompt cache store that it fills."""

    def __init__(self, config: Config, device: torch.device) -> None:
        self.dataset = Dataset.open(config.data_folder)
        self.reader = open_reader(
            config.llama,
            device,
            models=config.models_folder,
            prompt_cache=config.prompt_cache_folder,
        )
        assert self.reader.store is not None
        self.store = self.reader.store

    @property
    def folder(self) -> Path:
        """Folder of the cache files."""
        return self.store.folder

    @torch.no_grad()
    def add(self, problems: Sequence[tuple[int, int]]) -> int:
        """Cache prompts that are missing; return their number. `problems`: see Dataset.problems."""
        prompts = [self.reader.prompt(self.dataset.problem_at(*problem)) for problem in problems]
        return self.store.add([prompt.tokens for prompt in prompts])


def plan(config: Config) -> list[tuple[int, int]]:
    """Return the prompts to cache, largest first; raise UserError if llama.prompt_cache is false.

    Sorting by size reduces padding, and starting with the largest shows at once if memory suffices.
    """
    if not config.llama.prompt_cache:
        raise UserError("llama.prompt_cache is false: set it to true to use a prompt cache")
    dataset = Dataset.open(config.data_folder)
    dataset.check_same_recipe(config.data)

    @cache
    def cells(task: int, number: int) -> int:
        pair = dataset.tasks[task].pairs[number]
        shown = (grid for p in dataset.demonstrations(task) if p != pair for grid in p.grids)
        return pair.input.size + sum(grid.size for grid in shown)

    return sorted(
        dataset.problems(config.training.variants),
        key=lambda problem: cells(int(dataset.task_of[problem[0]]), problem[1]),
        reverse=True,
    )


def cache_prompts_locally(config: Config, problems: Sequence[tuple[int, int]]) -> int:
    """Cache `problems` that are missing, in this process; return how many were."""
    cacher = PromptCacher(config, compute_device(config.cluster.use_gpu))
    size = config.llama.batch_size
    parts = [problems[first : first + size] for first in range(0, len(problems), size)]
    return sum(map(cacher.add, parts))


def summary(config: Config, problems: Sequence[tuple[int, int]], added: int) -> str:
    """Format the outcome of filling the cache as one line."""
    return f"{len(problems)} prompts, {added} added to the cache: {config.paths.prompt_cache}"
