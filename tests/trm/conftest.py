"""Tiny TRM configs and batches; tests run on one thread because the machine is shared."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from hybrid.trm import TRM, TRMConfig


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny() -> Callable[..., TRMConfig]:
    """Return a factory of the smallest config with every component; keywords override fields."""

    def make(**changes: Any) -> TRMConfig:
        sizes: dict[str, Any] = {
            "hidden_size": 8,
            "num_heads": 2,
            "L_layers": 1,
            "H_cycles": 2,
            "L_cycles": 2,
            "halt_max_steps": 4,
            "halt_exploration_prob": 0.0,
            "puzzle_emb_ndim": 8,
            "puzzle_emb_len": 2,
            "seq_len": 6,
            "num_puzzle_identifiers": 5,
        }
        return TRMConfig(**(sizes | changes))

    return make


@pytest.fixture(scope="session")
def batch_of() -> Callable[..., dict[str, Tensor]]:
    """Return a factory of random batches for a config; about a third of the labels is ignored."""

    def make(config: TRMConfig, rows: int = 4, seed: int = 0) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)

        def draw(high: int, *shape: int) -> Tensor:
            return torch.randint(high, shape, generator=generator, dtype=torch.int32)

        labels = draw(config.vocab_size, rows, config.seq_len)
        labels[draw(3, rows, config.seq_len) == 0] = -100
        labels[:, 0] = 1  # no row without a label
        return {
            "inputs": draw(config.vocab_size, rows, config.seq_len),
            "labels": labels,
            "puzzle_identifiers": draw(config.num_puzzle_identifiers, rows),
        }

    return make


@pytest.fixture(scope="session")
def halting() -> Callable[[TRM, float], TRM]:
    """Return a function that sets a model's halt logit to a constant."""

    def force(model: TRM, logit: float) -> TRM:
        with torch.no_grad():
            model.q_head.weight.zero_()
            model.q_head.bias.fill_(logit)
        return model

    return force
