"""Thin adapters between the language model's hidden state and the TRM's states.

    text -> latent   hidden [B, H]             -> what is added to z_H, z_L, x, each [B, P+L, D]
    latent -> text   z_H, z_L [B, P+L, D] each -> [B, k, H], like k token embeddings

H hidden size of the language model, D hidden size of the TRM, k `prefix_tokens`.
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
"""What the latent is added to."""
EPS = 1e-5


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """Sizes of both adapters."""

    hidden: int = 512
    """Width inside."""
    layers: int = 2
    """Linear layers of an adapter, the last one included."""
    prefix_tokens: int = 4
    """k, positions that the TRM's state takes in the language model's text."""
    inject: Inject = "both"
    """Where the latent goes: the TRM's carry, its input, both; none runs the TRM alone."""
    lr: float = 1e-3

    def __post_init__(self) -> None:
        problems = check_fields(
            self, hidden=(1, None), layers=(2, 8), prefix_tokens=(1, 256), lr=(0, None)
        )
        if problems:
            raise ValueError("\n".join(problems))


class TextToLatentAdapter(nn.Module):
    """hidden [B, H] -> {state: [B, N, D]}, to be added to the TRM's states of N positions.

    An MLP makes a vector for each state; a learned table spreads it over positions. The last layer
    is zero at first, so an untrained hybrid is the TRM.

    Of a language model's hidden state 99% is the same whatever it has read (docs/log.md). So it is
    measured from `mean` in units of `std`, which `calibrate` sets once, before training.
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
        """Set `mean` and `std` to those of a sample of hidden states [n, H], n > 1."""
        self.mean.copy_(hidden.mean(0))
        # A number that never changes says nothing: it must not be blown up to say noise.
        spread = hidden.std(0)
        self.std.copy_(spread.clamp_min(1e-3 * float(spread.mean()) + 1e-12))

    def forward(self, hidden: Tensor, places: Tensor | None = None) -> dict[State, Tensor]:
        """`places` [N]: which of the positions the states have; all when not given."""
        states, _, D = self.positions.shape
        differs = (hidden - self.mean) / self.std
        vectors = self.mlp(rms_norm(differs, EPS)).view(-1, states, 1, D)
        positions = self.positions if places is None else self.positions[:, places]
        spread = vectors * positions
        return dict(zip(self.states, spread.unbind(1), strict=True))


class LatentToTextAdapter(nn.Module):
    """(z_H, z_L) [B, N, D] each -> [B, k, H]: k learned queries pool both states, an MLP follows.

    Scaled to the root mean square of the language model's token embeddings.
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
