"""Gradient checkpointing of a decoder, layer by layer.

Backward recomputes each layer from its input, so only one layer's activations, and its concatenated
cached and new keys and values, are in memory at a time. `DynamicCache` appends in every forward,
including recomputed ones; the two caches here give the same result when updated again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import Cache, DynamicLayer

KeysValues = tuple[Tensor, Tensor]


@contextmanager
def layers_recomputed(decoder: Any) -> Iterator[None]:
    """Checkpoint every layer of `decoder` in forwards inside the `with` block.

    The checkpointing of transformers works in training mode only, and without a cache.
    """
    for layer in decoder.layers:
        # No RNG state to preserve: the decoder has no dropout.
        layer.forward = partial(
            checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False
        )
    try:
        yield
    finally:
        for layer in decoder.layers:
            del layer.forward  # restores the method of the class


def read_only_cache(layers: Sequence[KeysValues | None]) -> Cache:
    """Return a cache of `layers` (keys and values, or None) that does not store new tokens."""
    return Cache(layers=[_ReadOnly(layer) for layer in layers])


def recording_cache(layers: int) -> Cache:
    """Return an empty cache that stores the keys and values of the first forward only."""
    return Cache(layers=[_Recording() for _ in range(layers)])


class _ReadOnly(DynamicLayer):  # type: ignore[misc]
    def __init__(self, past: KeysValues | None) -> None:
        super().__init__()
        if past is not None:
            self.keys, self.values, self.is_initialized = *past, True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> KeysValues:
        if not self.get_seq_length():
            return key_states, value_states
        keys = torch.cat((self.keys, key_states), dim=-2)
        return keys, torch.cat((self.values, value_states), dim=-2)


class _Recording(DynamicLayer):  # type: ignore[misc]
    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> KeysValues:
        keys, values = key_states.contiguous(), value_states.contiguous()
        if not self.get_seq_length():
            self.keys, self.values, self.is_initialized = keys, values, True
        return keys, values
