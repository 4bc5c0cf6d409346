"""Tiny hybrids in float64, around a language model that knows nothing, on real puzzles."""

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
"""Real tasks on a canvas of side 4, with 4, 7, 4 and 2 demonstrations; 27a28665 has 1x1 answers."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A hybrid and rows for it."""

    solver: HybridModel
    prompts: list[Prompt]
    batch: dict[str, Tensor]
    puzzle_rows: Tensor

    def begin(
        self, kept: Sequence[int] | None = None, *, puzzle_rows: Tensor | None = None
    ) -> AttemptState:
        """Some of the rows before their first attempt, all if not said."""
        rows = self.puzzle_rows if puzzle_rows is None else puzzle_rows
        batch, prompts = self.batch, self.prompts
        if kept is not None:
            index = torch.tensor(kept)
            rows, prompts = rows[index], [prompts[n] for n in kept]
            batch = {name: value[index] for name, value in batch.items()}
        return self.solver.begin(batch, rows, self.solver.reader.prefill(prompts))


Cases = Callable[..., Case]


@pytest.fixture(scope="session")
def reader_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Reader]:
    """reader_of(key=value of LlamaConfig) -> the tiny language model."""
    nowhere = tmp_path_factory.mktemp("llama")

    def open_it(**changes: Any) -> Reader:
        config = LlamaConfig(**{"model": "tiny-random", "dtype": "float64", **changes})
        return open_reader(config, torch.device("cpu"), models=nowhere, prompt_cache=nowhere)

    return open_it


@pytest.fixture(scope="session")
def case_of(arc1: dict[str, Task], reader_of: Callable[..., Reader]) -> Cases:
    """case_of(...) -> a hybrid of any kind; `shaken`: no weight is where it was initialised."""

    def make(
        *,
        inject: Inject = "both",
        rows: int = 3,
        canvas: int = 4,
        offsets: Sequence[tuple[int, int]] | None = None,
        act_steps: int = 1,
        shaken: bool = False,
        llama: Mapping[str, Any] | None = None,
        **trm: Any,
    ) -> Case:
        tasks = [arc1[TASKS[n % len(TASKS)]] for n in range(rows)]
        places = offsets or [(0, 0)] * rows
        grids = {
            name: np.stack(
                [
                    tokenize_grid(grid, canvas, offset)
                    for grid, offset in zip(side, places, strict=True)
                ]
            )
            for name, side in (
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
        solver = HybridModel(
            TRM(config, seed=1), reader, adapter, act_steps=act_steps, seed=2
        ).double()
        draw = torch.Generator().manual_seed(3)
        case = Case(
            solver=solver,
            prompts=[reader.prompt(task.without_answers()) for task in tasks],
            batch=batch,
            puzzle_rows=0.5 * torch.randn(rows, 16, generator=draw, dtype=torch.float64),
        )
        if shaken:
            shake(case, draw)
        return case

    return make


@torch.no_grad()
def shake(case: Case, draw: torch.Generator) -> None:
    """Move every weight, then measure what the reader says as a run does before it trains."""
    solver = case.solver
    for name, weight in solver.named_parameters():
        # A wilder TRM is chaotic: over nine cycles its slope changes within a finite difference.
        size = 0.02 if name.startswith("trm.") else 0.1
        weight.add_(size * torch.randn(weight.shape, generator=draw, dtype=weight.dtype))
    solver.trm.q_head.weight.normal_(generator=draw)
    assert solver.trm.q_head.bias is not None
    solver.trm.q_head.bias.zero_()
    if solver.to_latent is not None:
        hidden = solver.attempt(case.begin())[2].hidden
        assert hidden is not None
        solver.to_latent.calibrate(hidden)
