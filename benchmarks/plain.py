"""A plain Tiny Recursive Model and its trainer: the baseline of the benchmarks.

The code follows the paper and published trainers without any tuning: weights are cast in every
call, rotary positions and norms are chains of small operations, the loss is the naive float64 form,
metrics are copied from the device after every step, the optimiser and the EMA update one weight at
a time, and evaluation runs a deep copy with the averaged weights through all ACT steps. With
`compiled`, as in the published trainer on a GPU, model and loss are one graph per size.
tests/trm/test_plain.py checks both variants against hybrid/trm.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybrid.trm import IGNORE, TRMConfig

Batch = Mapping[str, Tensor]


class Linear(nn.Module):
    def __init__(self, fan_in: int, fan_out: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(fan_out, fan_in))
        self.bias = nn.Parameter(torch.zeros(fan_out)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


def rms_norm(x: Tensor, eps: float) -> Tensor:
    wide = x.to(torch.float32)
    variance = wide.square().mean(-1, keepdim=True)
    wide = wide * torch.rsqrt(variance + eps)
    return wide.to(x.dtype)


def rotate_half(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


class Attention(nn.Module):
    def __init__(self, config: TRMConfig) -> None:
        super().__init__()
        self.heads = config.num_heads
        self.qkv_proj = Linear(config.hidden_size, 3 * config.hidden_size)
        self.o_proj = Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        B, N, D = x.shape
        qkv = self.qkv_proj(x).view(B, N, 3 * self.heads, D // self.heads)
        q, k, v = (qkv[:, :, i * self.heads : (i + 1) * self.heads] for i in range(3))
        wide_q, wide_k = q.to(cos.dtype), k.to(cos.dtype)
        q = (wide_q * cos.unsqueeze(-2) + rotate_half(wide_q) * sin.unsqueeze(-2)).to(x.dtype)
        k = (wide_k * cos.unsqueeze(-2) + rotate_half(wide_k) * sin.unsqueeze(-2)).to(x.dtype)
        out = F.scaled_dot_product_attention(*(each.transpose(1, 2) for each in (q, k, v)))
        mixed: Tensor = self.o_proj(out.transpose(1, 2).reshape(B, N, D))
        return mixed


class SwiGLU(nn.Module):
    def __init__(self, config: TRMConfig) -> None:
        super().__init__()
        inner = -(round(config.expansion * config.hidden_size * 2 / 3) // -256) * 256
        self.gate_up_proj = Linear(config.hidden_size, 2 * inner)
        self.down_proj = Linear(inner, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        down: Tensor = self.down_proj(F.silu(gate) * up)
        return down


class Block(nn.Module):
    def __init__(self, config: TRMConfig) -> None:
        super().__init__()
        self.eps = config.rms_norm_eps
        self.self_attn = Attention(config)
        self.mlp = SwiGLU(config)

    def forward(self, h: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        h = rms_norm(h + self.self_attn(h, cos, sin), self.eps)
        return rms_norm(h + self.mlp(h), self.eps)


@dataclass
class PlainCarry:
    z_H: Tensor
    z_L: Tensor
    steps: Tensor
    halted: Tensor
    current: dict[str, Tensor]


class PlainTRM(nn.Module):
    """TRM with attention and rotary positions only; tensor names match hybrid.trm.TRM."""

    H_init: Tensor
    L_init: Tensor
    puzzle_table: Tensor
    puzzle_rows: Tensor
    cos: Tensor
    sin: Tensor

    def __init__(self, config: TRMConfig, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        assert config.pos_encodings == "rope" and not config.mlp_t and config.puzzle_emb_ndim
        self.config, self.dtype = config, dtype
        D = config.hidden_size
        self.embed_tokens = nn.Parameter(torch.zeros(config.vocab_size, D))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.L_layers))
        self.lm_head = Linear(D, config.vocab_size)
        self.q_head = Linear(D, 2, bias=True)
        self.register_buffer("H_init", torch.zeros(D))
        self.register_buffer("L_init", torch.zeros(D))
        table = torch.zeros(config.num_puzzle_identifiers, config.puzzle_emb_ndim)
        self.register_buffer("puzzle_table", table)
        dim = D // config.num_heads
        frequency = 1.0 / config.rope_theta ** (torch.arange(0, dim, 2).float() / dim)
        angle = torch.outer(torch.arange(config.positions).float(), frequency)
        angle = torch.cat((angle, angle), dim=-1)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def initial_carry(self, batch: Batch) -> PlainCarry:
        tokens = batch["inputs"]
        B, device = len(tokens), tokens.device
        shape = B, self.config.positions, self.config.hidden_size
        return PlainCarry(
            z_H=torch.zeros(shape, dtype=self.dtype, device=device),
            z_L=torch.zeros(shape, dtype=self.dtype, device=device),
            steps=torch.zeros(B, dtype=torch.int32, device=device),
            halted=torch.ones(B, dtype=torch.bool, device=device),
            current={name: torch.zeros_like(value) for name, value in batch.items()},
        )

    def net(self, h: Tensor, inject: Tensor) -> Tensor:
        h = h + inject
        for block in self.blocks:
            h = block(h, self.cos, self.sin)
        return h

    def forward(
        self, carry: PlainCarry, batch: Batch, exploration: tuple[Tensor, Tensor] | None = None
    ) -> tuple[PlainCarry, Tensor, Tensor]:
        """Run an ACT step; return the new carry, logits [B, L, V] and halt logits [B].

        In training, puzzle rows [B, ndim] are copied to `puzzle_rows`, which gets their gradient.
        """
        fresh = carry.halted
        z_H = torch.where(fresh.view(-1, 1, 1), self.H_init.to(self.dtype), carry.z_H)
        z_L = torch.where(fresh.view(-1, 1, 1), self.L_init.to(self.dtype), carry.z_L)
        steps = torch.where(fresh, 0, carry.steps)
        current = {
            name: torch.where(fresh.view(-1, *(1,) * (value.dim() - 1)), batch[name], value)
            for name, value in carry.current.items()
        }
        rows = self.puzzle_table[current["puzzle_identifiers"].long()]
        if self.training:
            with torch.no_grad():
                self.puzzle_rows.copy_(rows)
            rows = self.puzzle_rows
        P, D = self.config.prefix, self.config.hidden_size
        padded = F.pad(rows.to(self.dtype), (0, P * D - rows.shape[-1])).view(-1, P, D)
        embedded = F.embedding(current["inputs"].long(), self.embed_tokens.to(self.dtype))
        x = math.sqrt(D) * torch.cat((padded, embedded), dim=1)
        with torch.no_grad():
            for _ in range(self.config.H_cycles - 1):
                for _ in range(self.config.L_cycles):
                    z_L = self.net(z_L, z_H + x)
                z_H = self.net(z_H, z_L)
        for _ in range(self.config.L_cycles):
            z_L = self.net(z_L, z_H + x)
        z_H = self.net(z_H, z_L)
        logits = self.lm_head(z_H)[:, P:]
        q_halt = self.q_head(z_H[:, 0]).to(torch.float32)[:, 0]
        steps = steps + 1
        halted = steps >= self.config.halt_max_steps
        if self.training and self.config.halt_max_steps > 1:
            halted = halted | (q_halt.detach() > 0)
            explore, draw = exploration or (torch.rand_like(q_halt), torch.rand_like(q_halt))
            min_steps = 2 + (draw * (self.config.halt_max_steps - 1)).long()
            halted = halted & (steps >= (explore < self.config.halt_exploration_prob) * min_steps)
        return PlainCarry(z_H.detach(), z_L.detach(), steps, halted, current), logits, q_halt


def stablemax_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the naive form of the loss per position, in float64."""
    logits = logits.to(torch.float64)
    s = torch.where(logits < 0, 1 / (1 - logits + 1e-30), logits + 1)
    log_p = torch.log(s / s.sum(-1, keepdim=True))
    scored = labels != IGNORE
    picked = log_p.gather(-1, torch.where(scored, labels, 0).long().unsqueeze(-1)).squeeze(-1)
    return -torch.where(scored, picked, 0)


class PlainLossHead(nn.Module):
    """Model with its loss and metrics."""

    def __init__(self, model: PlainTRM) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, carry: PlainCarry, batch: Batch, exploration: tuple[Tensor, Tensor] | None = None
    ) -> tuple[PlainCarry, Tensor, dict[str, Tensor], Tensor, Tensor]:
        """Run an ACT step; return the new carry, loss, metrics, tokens [B, L], halt logits [B]."""
        carry, logits, q_halt = self.model(carry, batch, exploration)
        labels = carry.current["labels"]
        scored = labels != IGNORE
        counts = scored.sum(-1)
        divisor = counts.clamp_min(1).unsqueeze(-1)
        tokens = logits.argmax(-1)
        with torch.no_grad():
            hits = scored & (tokens == labels)
            right = hits.sum(-1) == counts
            ended = carry.halted & (counts > 0)
            metrics = {
                "count": ended.sum(),
                "accuracy": torch.where(ended, (hits / divisor).sum(-1), 0).sum(),
                "exact_accuracy": (ended & right).sum(),
                "q_halt_accuracy": (ended & ((q_halt >= 0) == right)).sum(),
                "steps": torch.where(ended, carry.steps, 0).sum(),
            }
        lm_loss = (stablemax_cross_entropy(logits, labels) / divisor).sum()
        q_halt_loss = F.binary_cross_entropy_with_logits(
            q_halt, right.to(q_halt.dtype), reduction="sum"
        )
        metrics |= {"lm_loss": lm_loss.detach(), "q_halt_loss": q_halt_loss.detach()}
        return carry, lm_loss + 0.5 * q_halt_loss, metrics, tokens, q_halt.detach()


class PlainTrainer:
    """Trainer: Adam-atan2 one weight at a time, sign-SGD of the puzzle table, and EMA."""

    def __init__(
        self,
        model: PlainTRM,
        *,
        batch_size: int,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.1,
        ema_rate: float = 0.999,
        compiled: bool = False,
    ) -> None:
        self.model, self.batch_size, self.betas = model, batch_size, betas
        self.weight_decay, self.ema_rate = weight_decay, ema_rate
        self.compiled = compiled
        self.head = self._head(model)
        self.ema_model: tuple[PlainTRM, Callable[..., Any]] | None = None
        table = model.puzzle_table
        rows = table.new_zeros(batch_size, table.shape[1]).requires_grad_()
        model.register_buffer("puzzle_rows", rows, persistent=False)
        self.t = 0
        self.carry: PlainCarry | None = None
        self.m = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
        self.v = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
        self.values = {name: p.data.clone() for name, p in model.named_parameters()}

    def step(
        self,
        batch: Batch,
        lr: float,
        puzzle_lr: float,
        exploration: tuple[Tensor, Tensor] | None = None,
    ) -> dict[str, float]:
        """Run one training step and return its metrics."""
        model = self.model.train()
        if self.carry is None:
            self.carry = model.initial_carry(batch)
        self.carry, loss, metrics, *_ = self.head(self.carry, batch, exploration)
        ((1 / self.batch_size) * loss).backward()
        self._update_table(self.carry.current["puzzle_identifiers"], puzzle_lr)
        self._update_weights(lr)
        self._update_ema()
        return {name: float(value) for name, value in metrics.items()}

    def _head(self, model: PlainTRM) -> Callable[..., Any]:
        head = PlainLossHead(model)
        return torch.compile(head) if self.compiled else head

    def _copy(self) -> tuple[PlainTRM, Callable[..., Any]]:
        model = copy.deepcopy(self.model).eval()
        return model, self._head(model)

    @torch.no_grad()
    def _update_table(self, ids: Tensor, lr: float) -> None:
        rows = self.model.puzzle_rows
        assert rows.grad is not None
        unique, inverse = ids.long().unique(return_inverse=True)
        grad = torch.zeros(len(unique), rows.shape[1], dtype=rows.dtype, device=rows.device)
        grad.scatter_add_(0, inverse.unsqueeze(-1).expand(-1, rows.shape[1]), rows.grad)
        p = self.model.puzzle_table[unique]
        p.mul_(1.0 - lr * self.weight_decay).add_(torch.sign(grad), alpha=-lr)
        self.model.puzzle_table[unique] = p
        rows.grad = None

    @torch.no_grad()
    def _update_weights(self, lr: float) -> None:
        self.t += 1
        beta1, beta2 = self.betas
        for name, p in self.model.named_parameters():
            assert p.grad is not None
            m, v = self.m[name], self.v[name]
            m.mul_(beta1).add_(p.grad, alpha=1 - beta1)
            v.mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
            p.mul_(1 - lr * self.weight_decay)
            root = v.sqrt() / math.sqrt(1 - beta2**self.t)
            p.add_(torch.atan2(m, root), alpha=-lr / (1 - beta1**self.t))
            p.grad = None

    @torch.no_grad()
    def _update_ema(self) -> None:
        for name, p in self.model.named_parameters():
            old = self.values[name].clone()
            self.values[name] = (1.0 - self.ema_rate) * p.data + self.ema_rate * old

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return tokens [B, L] and halt logits [B] of the averaged weights after all ACT steps."""
        model, head = self.ema_model or self._copy()
        if self.compiled:  # guard checks of a new copy take longer than evaluating a small model
            self.ema_model = model, head
        model.puzzle_table.copy_(self.model.puzzle_table)
        for name, p in model.named_parameters():
            p.data.copy_(self.values[name])
        carry = model.initial_carry(batch)
        while True:
            carry, _, _, tokens, q_halt = head(carry, batch)
            if bool(carry.halted.all()):
                return tokens, q_halt
