"""Adapters between the language model's hidden state and the TRM's states.

    text -> latent   hidden [B, H]             -> deltas of z_H, z_L, x, each [B, P+L, D]
    latent -> text   z_H, z_L [B, P+L, D] each -> soft tokens [B, k, H]

H and D are the hidden sizes of the language model and the TRM; k is `prefix_tokens`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hybrid.errors import check_fields
from hybrid.trm.layers import Linear, rms_norm, truncated_normal_

Inject = Literal["none", "carry", "input", "both"]
State = Literal["z_H", "z_L", "x"]
STATES: Mapping[Inject, tuple[State, ...]] = {
    "none": (),
    "carry": ("z_H", "z_L"),
    "input": ("x",),
    "both": ("z_H", "z_L", "x"),
}
"""States to which the text-to-latent adapter adds."""
EPS = 1e-5


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """Sizes of both adapters."""

    hidden: int = 512
    """Width of the hidden layers."""
    layers: int = 2
    """Linear layers per adapter, including the last."""
    prefix_tokens: int = 4
    """k, soft tokens that represent the TRM's states in the language model's input."""
    inject: Inject = "both"
    """Target of the latent: the TRM's carry, its input, or both; none runs the TRM alone."""
    lr: float = 1e-3

    def __post_init__(self) -> None:
        problems = check_fields(
            self, hidden=(1, None), layers=(2, 8), prefix_tokens=(1, 256), lr=(0, None)
        )
        if problems:
            raise ValueError("\n".join(problems))


class TextToLatentAdapter(nn.Module):
    """Map hidden [B, H] to deltas {state: [B, N, D]} of the TRM's states at N positions.

    An MLP computes one vector per state; a learned table scales it per position. The last layer is
    initialised to zero, so that an untrained hybrid equals the TRM.

    99% of a language model's hidden state does not depend on its input (docs/log.md). The adapter
    therefore standardises it with `mean` and `std`, set by `calibrate` once before training.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, llm_hidden: int, positions: int, hidden_size: int, config: AdapterConfig, seed: int
    ) -> None:
        super().__init__()
        self.states = STATES[config.inject]
        self.mlp = _MLP(llm_hidden, config, len(self.states) * hidden_size, seed)
        self.positions = nn.Parameter(torch.ones(len(self.states), positions, hidden_size))
        self.register_buffer("mean", torch.zeros(llm_hidden))
        self.register_buffer("std", torch.ones(llm_hidden))
        last = self.mlp.layers[-1]
        assert isinstance(last, Linear)
        nn.init.zeros_(last.weight)

    @torch.no_grad()
    def calibrate(self, hidden: Tensor) -> None:
        """Set `mean` and `std` from a sample of hidden states [n, H], n > 1."""
        self.mean.copy_(hidden.mean(0))
        # The lower bound keeps the noise of constant components from being amplified.
        std = hidden.std(0)
        self.std.copy_(std.clamp_min(1e-3 * float(std.mean()) + 1e-12))

    def forward(self, hidden: Tensor, indices: Tensor | None = None) -> dict[State, Tensor]:
        """Return the deltas at position `indices` [N], or at all positions if None."""
        states, _, D = self.positions.shape
        standardised = (hidden - self.mean) / self.std
        vectors = self.mlp(rms_norm(standardised, EPS)).view(-1, states, 1, D)
        deltas = vectors * (self.positions if indices is None else self.positions[:, indices])
        return dict(zip(self.states, deltas.unbind(1), strict=True))


class LatentToTextAdapter(nn.Module):
    """Map (z_H, z_L), [B, N, D] each, to soft tokens [B, k, H].

    k learned queries pool both states, followed by an MLP. The output has the root mean square
    `embedding_scale` of the language model's token embeddings.
    """

    scale: Tensor

    def __init__(
        self,
        hidden_size: int,
        llm_hidden: int,
        embedding_scale: float,
        config: AdapterConfig,
        seed: int,
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.queries = nn.Parameter(torch.empty(config.prefix_tokens, hidden_size))
        truncated_normal_(self.queries, 1.0, generator)
        self.mlp = _MLP(hidden_size, config, llm_hidden, seed + 1)
        self.register_buffer("scale", torch.tensor(embedding_scale))

    def forward(self, z_H: Tensor, z_L: Tensor) -> Tensor:
        wide = torch.promote_types(z_H.dtype, torch.float32)
        states = rms_norm(torch.cat((z_H, z_L), dim=1).to(wide), EPS)  # [B, 2N, D]
        scores = self.queries.to(wide) @ states.transpose(1, 2) / math.sqrt(states.shape[-1])
        pooled = scores.softmax(-1) @ states  # [B, k, D]
        return rms_norm(self.mlp(pooled), EPS) * self.scale.to(wide)


class _MLP(nn.Module):
    def __init__(self, fan_in: int, config: AdapterConfig, fan_out: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        widths = [fan_in, *[config.hidden] * (config.layers - 1), fan_out]
        self.layers = nn.ModuleList(Linear(a, b, bias=True) for a, b in pairwise(widths))
        for layer in self.layers:
            assert isinstance(layer, Linear) and layer.bias is not None
            truncated_normal_(layer.weight, 1 / math.sqrt(layer.weight.shape[1]), generator)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = F.silu(layer(x))
        out: Tensor = self.layers[-1](x)
        return out
