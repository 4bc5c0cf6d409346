"""Layers of the TRM: RMS norm, rotary position embeddings, attention, SwiGLU.

Shapes: B rows, N = P + L positions (P puzzle prefix, L grid), D hidden size, A heads, d = D / A.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybrid.trm.config import TRMConfig

Rotary = tuple[Tensor, Tensor]


def truncated_normal_(tensor: Tensor, std: float, generator: torch.Generator) -> Tensor:
    """Fill in place from a normal truncated at two deviations and rescaled to deviation `std`.

    This is JAX's rule; torch's `trunc_normal_` does not rescale, so its deviation is 12% smaller.
    """
    if std == 0:
        return tensor.zero_()
    # Deviation of a unit normal truncated at +-2: sqrt(1 - 2 * 2 * phi(2) / (Phi(2) - Phi(-2))).
    inside = math.erf(2 / math.sqrt(2))
    density = math.exp(-2.0) / math.sqrt(2 * math.pi)
    cut_std = math.sqrt(1 - 4 * density / inside)
    with torch.no_grad():
        uniform = torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
        unit = torch.erfinv((2 * uniform - 1) * inside) * math.sqrt(2)
        return tensor.copy_(unit.clamp_(-2, 2) * (std / cut_std))


def rms_norm(x: Tensor, eps: float) -> Tensor:
    """Return x / rms(x) over the last axis, without a weight, computed in float32 or wider."""
    wide = x if x.dtype == torch.float64 else x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def rotary_table(positions: Tensor, dim: int, base: float) -> Rotary:
    """Return (cos, sin) of positions [N], each [N, dim], half-split (RoFormer, 2104.09864)."""
    even = torch.arange(0, dim, 2, dtype=torch.float32, device=positions.device)
    angle = torch.outer(positions.float(), 1.0 / base ** (even / dim))
    angle = torch.cat((angle, angle), dim=-1)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Rotate the pairs (i, i + d/2) of x [B, A, N, d] by their position's angle; keep x's dtype."""
    cos, sin = (table.to(torch.promote_types(x.dtype, torch.float32)) for table in rotary)
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


class Linear(nn.Module):
    """Linear layer x @ weight.T + bias that casts its float32 weights to x's dtype on use."""

    def __init__(self, fan_in: int, fan_out: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(fan_out, fan_in))
        self.bias = nn.Parameter(torch.empty(fan_out)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return softmax(q k^T / sqrt(d)) v, each [B, A, N, d].

    On a CPU, bfloat16 uses two matrix products: the flash kernel's forward is no faster than in
    float32 and its backward up to eight times slower. The products keep the scores for backward.
    """
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        scale = 1 / math.sqrt(q.shape[-1])
        return ((q * scale) @ k.transpose(-1, -2)).softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v)


class Attention(nn.Module):
    """Non-causal multi-head attention; qkv_proj stacks the q, k and v heads."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv_proj = Linear(hidden_size, 3 * hidden_size)
        self.o_proj = Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor, rotary: Rotary | None) -> Tensor:
        B, N, D = x.shape
        qkv = self.qkv_proj(x).view(B, N, 3, self.num_heads, D // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, A, N, d]
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        out = attend(q, k, v)
        # reshape, not view: attention kernels return different memory layouts.
        mixed: Tensor = self.o_proj(out.transpose(1, 2).reshape(B, N, D))
        return mixed


class SwiGLU(nn.Module):
    """SwiGLU: down(silu(gate) * up); the inner width is a multiple of 256."""

    def __init__(self, width: int, expansion: float) -> None:
        super().__init__()
        inner = -(round(expansion * width * 2 / 3) // -256) * 256
        self.gate_up_proj = Linear(width, 2 * inner)
        self.down_proj = Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        down: Tensor = self.down_proj(F.silu(gate) * up)
        return down


class Block(nn.Module):
    """Post-norm block: h = rms(h + mix(h)); h = rms(h + swiglu(h)).

    With `mlp_t`, mix is a SwiGLU over the sequence; h is transposed for it and for its norm.
    """

    def __init__(self, config: TRMConfig) -> None:
        super().__init__()
        self.eps = config.rms_norm_eps
        self.mix: Callable[[Tensor, Rotary | None], Tensor]
        if config.mlp_t:
            self.mlp_t = SwiGLU(config.positions, config.expansion)
            self.mix = self._mix_sequence
        else:
            self.self_attn = Attention(config.hidden_size, config.num_heads)
            self.mix = self._mix_attention
        self.mlp = SwiGLU(config.hidden_size, config.expansion)

    def _mix_attention(self, h: Tensor, rotary: Rotary | None) -> Tensor:
        return rms_norm(h + self.self_attn(h, rotary), self.eps)

    def _mix_sequence(self, h: Tensor, rotary: Rotary | None) -> Tensor:
        h = h.transpose(1, 2)
        return rms_norm(h + self.mlp_t(h), self.eps).transpose(1, 2)

    def forward(self, h: Tensor, rotary: Rotary | None) -> Tensor:
        h = self.mix(h, rotary)
        return rms_norm(h + self.mlp(h), self.eps)
