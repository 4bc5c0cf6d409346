"""Left padding of token rows to a small set of lengths.

cuDNN builds a plan for each new attention shape, which takes tens to hundreds of milliseconds, and
prompts have hundreds of lengths. On a GPU lengths are therefore rounded up to a multiple, and the
padding is masked. On a CPU longer rows would only add work.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

PROBLEM_MULTIPLE = {"cuda": 128}
"""Multiple of the prompt length by device type; 1 for devices that are not listed."""
TEXT_MULTIPLE = {"cuda": 16}
"""Multiple of the length of an attempt's text by device type."""


def padded_length(longest: int, multiples: Mapping[str, int], device: torch.device) -> int:
    """Return `longest` rounded up to the multiple of `device`."""
    multiple = multiples.get(device.type, 1)
    return -(-longest // multiple) * multiple


def left_padded(
    rows: Sequence[Sequence[int]], multiples: Mapping[str, int], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return token ids and mask, both [B, T] on `device`; 0 and False at padding."""
    assert all(rows), "row without tokens: its last position would be padding"
    length = padded_length(max(map(len, rows)), multiples, device)
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    mask = torch.zeros(len(rows), length, dtype=torch.bool)
    for number, row in enumerate(rows):
        ids[number, -len(row) :] = torch.tensor(list(row))
        mask[number, -len(row) :] = True
    return ids.to(device), mask.to(device)
