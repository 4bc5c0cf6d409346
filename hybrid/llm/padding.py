"""Padding of token rows on the left, to lengths that repeat.

cuDNN builds a plan for each new shape of attention, which takes tens to hundreds of milliseconds,
and puzzles have hundreds of lengths. On a GPU lengths are therefore multiples of a constant; padded
positions are masked. On a CPU padding is only more work.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

PROBLEM_MULTIPLE = {"cuda": 128}
"""Multiple of a problem's length by device type, 1 for the others."""
TEXT_MULTIPLE = {"cuda": 16}
"""Multiple of the length of an attempt's text."""


def padded_length(longest: int, multiples: Mapping[str, int], device: torch.device) -> int:
    """`longest` rounded up to the multiple of `device`."""
    multiple = multiples.get(device.type, 1)
    return -(-longest // multiple) * multiple


def left_padded(
    rows: Sequence[Sequence[int]], multiples: Mapping[str, int], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Token ids and mask [B, T] on `device`; zeros and False where padded."""
    assert all(rows), "a row without tokens: its last position would be padding"
    length = padded_length(max(map(len, rows)), multiples, device)
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    mask = torch.zeros(len(rows), length, dtype=torch.bool)
    for number, row in enumerate(rows):
        ids[number, -len(row) :] = torch.tensor(list(row))
        mask[number, -len(row) :] = True
    return ids.to(device), mask.to(device)
