"""Attention whose key-value heads are never copied for the query heads that share them.

With a mask, transformers repeats every key and value for each query head: with 2,000 cached tokens
an attempt takes 15% longer for it (docs/log.md), and backward keeps the copies. Here the queries of
a group stand behind each other as more positions of the same head instead; the sums are the same.
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
    """`query` [B, A, n, d], `key` and `value` [B, A / G, N, d], mask [B, 1, n, N] -> [B, n, A, d].

    Without a mask the positions are causal.
    """
    B, A, n, d = query.shape
    groups = A // key.shape[1]
    if attention_mask is None:
        assert n in (1, key.shape[2]), "a piece of a sequence needs a mask"
        out = F.scaled_dot_product_attention(
            query, key, value, is_causal=n > 1, scale=scaling, enable_gqa=groups > 1
        )
    else:
        packed = query.reshape(B, -1, groups * n, d)
        mask = attention_mask.repeat(1, 1, groups, 1)
        out = F.scaled_dot_product_attention(packed, key, value, attn_mask=mask, scale=scaling)
    return out.reshape(B, A, n, d).transpose(1, 2).contiguous(), None


def use_grouped_attention(model: Any) -> None:
    """Have a model of transformers compute with it."""
    AttentionInterface.register(NAME, grouped_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)
