"""Tiny float64 hybrids around a random language model, on real tasks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hybrid.adapters import AdapterConfig, Inject
from hybrid.arc import PAD, Task, tokenize_grid
from hybrid.llm import LlamaConfig, Prompt, Reader, open_reader
from hybrid.solver import AttemptState, HybridModel
from hybrid.trm import IGNORE, TRM, TRMConfig

TASKS = ("0d3d703e", "27a28665", "74dd1130", "66e6c45b")
"""Tasks that fit a 4 x 4 canvas, with 4, 7, 4 and 2 demonstrations; 27a28665 has 1 x 1 answers."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A hybrid model and a batch for it."""

    model: HybridModel
    prompts: list[Prompt]
    batch: dict[str, Tensor]
    puzzle_rows: Tensor

    def initial_state(
        self, rows: Sequence[int] | None = None, *, puzzle_rows: Tensor | None = None
    ) -> AttemptState:
        """Return the state of `rows`, or of all rows, before their first attempt."""
        puzzle_rows = self.puzzle_rows if puzzle_rows is None else puzzle_rows
        batch, prompts = self.batch, self.prompts
        if rows is not None:
            index = torch.tensor(rows)
            puzzle_rows, prompts = puzzle_rows[index], [prompts[n] for n in rows]
            batch = {name: value[index] for name, value in batch.items()}
        prompt_cache = self.model.reader.prefill(prompts)
        return self.model.initial_state(batch, puzzle_rows, prompt_cache)


Cases = Callable[..., Case]


@pytest.fixture(scope="session")
def reader_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Reader]:
    """Return a factory of tiny readers; keyword arguments override LlamaConfig."""
    empty = tmp_path_factory.mktemp("llama")

    def make(**changes: Any) -> Reader:
        config = LlamaConfig(**{"model": "tiny-random", "dtype": "float64", **changes})
        return open_reader(config, torch.device("cpu"), models=empty, prompt_cache=empty)

    return make


@pytest.fixture(scope="session")
def case_of(arc1: dict[str, Task], reader_of: Callable[..., Reader]) -> Cases:
    """Return a factory of cases; `perturbed` moves every weight off its initial value."""

    def make(
        *,
        inject: Inject = "both",
        rows: int = 3,
        canvas: int = 4,
        offsets: Sequence[tuple[int, int]] | None = None,
        act_steps: int = 1,
        perturbed: bool = False,
        llama: Mapping[str, Any] | None = None,
        **trm: Any,
    ) -> Case:
        tasks = [arc1[TASKS[n % len(TASKS)]] for n in range(rows)]
        offsets = offsets or [(0, 0)] * rows
        grids = {
            name: np.stack(
                [
                    tokenize_grid(grid, canvas, offset)
                    for grid, offset in zip(pair_side, offsets, strict=True)
                ]
            )
            for name, pair_side in (
                ("inputs", [task.test[0].input for task in tasks]),
                ("labels", [task.test[0].output for task in tasks]),
            )
        }
        batch = {name: torch.from_numpy(value).int() for name, value in grids.items()}
        batch["labels"] = batch["labels"].masked_fill(batch["labels"] == PAD, IGNORE)
        reader = reader_of(**(llama or {}))
        sizes = {"hidden_size": 16, "num_heads": 2, "expansion": 1, "L_layers": 1}
        sizes |= {"H_cycles": 2, "L_cycles": 2, "puzzle_emb_ndim": 16, "puzzle_emb_len": 1}
        config = TRMConfig(**{**sizes, "seq_len": canvas**2, "forward_dtype": "float64", **trm})
        adapter = AdapterConfig(hidden=12, layers=3, prefix_tokens=2, inject=inject)
        model = HybridModel(
            TRM(config, seed=1), reader, adapter, act_steps=act_steps, seed=2
        ).double()
        draw = torch.Generator().manual_seed(3)
        case = Case(
            model=model,
            prompts=[reader.prompt(task.without_answers()) for task in tasks],
            batch=batch,
            puzzle_rows=0.5 * torch.randn(rows, 16, generator=draw, dtype=torch.float64),
        )
        if perturbed:
            perturb(case, draw)
        return case

    return make


@torch.no_grad()
def perturb(case: Case, draw: torch.Generator) -> None:
    """Add noise to every weight, then calibrate the adapter as training does."""
    model = case.model
    for name, weight in model.named_parameters():
        # With more noise the TRM is chaotic: finite differences over nine cycles are inaccurate.
        size = 0.02 if name.startswith("trm.") else 0.1
        weight.add_(size * torch.randn(weight.shape, generator=draw, dtype=weight.dtype))
    model.trm.q_head.weight.normal_(generator=draw)
    assert model.trm.q_head.bias is not None
    model.trm.q_head.bias.zero_()
    if model.to_latent is not None:
        hidden = model.attempt(case.initial_state())[2].hidden
        assert hidden is not None
        model.to_latent.calibrate(hidden)
