"""Grouped-query attention with a mask that does not copy the shared key-value heads.

With a mask, transformers repeats keys and values for every query head. With 2,000 cached tokens the
copies make an attempt 15% slower (docs/log.md), and backward keeps them. Here the queries of a
group are packed as additional positions of one head; the result is the same.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

NAME = "grouped"


def grouped_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Return attention outputs [B, n, A, d]; without a mask [B, 1, n, N] attention is causal.

    `query` is [B, A, n, d], `key` and `value` are [B, A / G, N, d].
    """
    B, A, n, d = query.shape
    groups = A // key.shape[1]
    if attention_mask is None:
        assert n in (1, key.shape[2]), "part of a sequence needs a mask"
        out = F.scaled_dot_product_attention(
            query, key, value, is_causal=n > 1, scale=scaling, enable_gqa=groups > 1
        )
    else:
        packed = query.reshape(B, -1, groups * n, d)
        mask = attention_mask.repeat(1, 1, groups, 1)
        out = F.scaled_dot_product_attention(packed, key, value, attn_mask=mask, scale=scaling)
    return out.reshape(B, A, n, d).transpose(1, 2).contiguous(), None


def use_grouped_attention(model: Any) -> None:
    """Make a transformers model use `grouped_attention`."""
    AttentionInterface.register(NAME, grouped_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)
