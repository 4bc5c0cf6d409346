"""SlotLoader: halted slots take their next row, the others keep theirs."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hybrid.dataset.stream import Rows
from hybrid.train.loader import SlotLoader
from hybrid.trm import IGNORE, Carry

SLOTS = 4
Halting = list[list[bool]]
halting = st.lists(st.lists(st.booleans(), min_size=SLOTS, max_size=SLOTS), max_size=30)


class Rounds:
    """Rounds whose rows encode slot and round; `next` counts the rounds made."""

    def __init__(self, first: int = 0) -> None:
        self.next = first

    def __iter__(self) -> Iterator[Rows]:
        return self

    def __next__(self) -> Rows:
        number = self.next
        self.next += 1
        slots = np.arange(SLOTS)
        return {
            "inputs": np.stack([slots, np.full(SLOTS, number)], axis=1).astype(np.uint8),
            "labels": np.tile(np.array([0, 5], np.uint8), (SLOTS, 1)),
            "puzzle_identifiers": (1000 * number + slots).astype(np.int32),
            "side": np.array([number % 7] * SLOTS, np.uint8),
        }


def carry_of(current: dict[str, Tensor], halted: list[bool]) -> Carry:
    zeros = torch.zeros(SLOTS)
    return Carry(z_H=zeros, z_L=zeros, steps=zeros, halted=torch.tensor(halted), current=current)


def empty() -> dict[str, Tensor]:
    tokens = torch.zeros(SLOTS, 2, dtype=torch.int32)
    identifiers = torch.zeros(SLOTS, dtype=torch.int32)
    return {
        "inputs": tokens,
        "labels": tokens.clone(),
        "puzzle_identifiers": identifiers,
        "side": identifiers.clone(),
    }


def loader_of(
    rounds: Iterator[Rows], first: int = 0, rows_consumed: Tensor | None = None
) -> SlotLoader:
    if rows_consumed is None:
        rows_consumed = torch.zeros(SLOTS, dtype=torch.int64)
    return SlotLoader(rounds, first, rows_consumed, empty()["side"])


def refill(loader: SlotLoader, current: dict[str, Tensor], halted: list[bool]) -> dict[str, Tensor]:
    return loader.refill(carry_of(current, halted), torch.tensor(halted))


@settings(deadline=None, max_examples=60)
@given(halting, st.integers(0, 30))
def test_halted_slots_take_their_next_row_and_others_keep_theirs(
    pattern: Halting, interruption: int
) -> None:
    """Compare with counters; the run is interrupted once and resumed from `rows_consumed`."""
    loader = loader_of(Rounds())
    current, expected = empty(), [0] * SLOTS  # rows taken, by slot
    for step, halted in enumerate([[True] * SLOTS, *pattern]):
        if step == interruption:
            first = int(loader.rows_consumed.min())
            loader = SlotLoader(Rounds(first), first, loader.rows_consumed.clone(), current["side"])
        before = {name: value.clone() for name, value in current.items()}
        batch = refill(loader, current, halted)
        expected = [n + h for n, h in zip(expected, halted, strict=True)]
        assert loader.rows_consumed.tolist() == expected
        assert batch["inputs"].tolist() == [[slot, expected[slot] - 1] for slot in range(SLOTS)]
        assert batch["side"].tolist() == [(n - 1) % 7 for n in expected]
        for name, value in batch.items():
            assert value.dtype == torch.int32
            assert torch.equal(current[name], before[name]), "the carry's own rows were changed"
        current = batch


@settings(deadline=None, max_examples=60)
@given(halting)
def test_loader_holds_only_rounds_between_slowest_and_fastest_slot(pattern: Halting) -> None:
    rounds = Rounds()
    loader = loader_of(rounds)
    current = empty()
    for halted in [[True] * SLOTS, *pattern]:
        current = refill(loader, current, halted)
        fastest, slowest = int(loader.rows_consumed.max()), int(loader.rows_consumed.min())
        assert len(loader.held) == fastest - slowest
        assert rounds.next == fastest, "rounds were made ahead of need"


def test_pad_labels_become_ignore() -> None:
    loader = loader_of(Rounds())
    batch = refill(loader, empty(), [True] * SLOTS)
    assert batch["labels"].tolist() == [[IGNORE, 5]] * SLOTS


def test_a_row_without_labels_raises() -> None:
    def unlabeled() -> Iterator[Rows]:
        for rows in Rounds():
            rows["labels"][2] = 0
            yield rows

    loader = loader_of(unlabeled())
    refill(loader, empty(), [True, True, False, True])
    with pytest.raises(AssertionError, match="a training row without labels"):
        refill(loader, empty(), [False, False, True, False])


def test_waited_counts_seconds_spent_on_rounds() -> None:
    class Slow(Rounds):
        def __next__(self) -> Rows:
            time.sleep(0.05)
            return super().__next__()

    loader = loader_of(Slow())
    for rounds in (1, 2):
        refill(loader, empty(), [True] * SLOTS)
        assert loader.waited >= 0.05 * rounds
    waited = loader.waited
    refill(loader, empty(), [False] * SLOTS)
    assert loader.waited == waited, "no slot took a row"
