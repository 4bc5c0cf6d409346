"""The Tiny Recursive Model (arXiv 2510.04871).

    x    embedded question: puzzle prefix and grid tokens   [B, P+L, D]
    z_H  current answer, the paper's y                      [B, P+L, D]
    z_L  latent reasoning, the paper's z                    [B, P+L, D]

A *cycle* updates z_L `L_cycles` times, then z_H once. An *ACT step* is `H_cycles` cycles and one
supervision; a row runs up to `halt_max_steps` ACT steps, with its carry detached in between.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from hybrid.trm.config import TRMConfig
from hybrid.trm.layers import Block, Linear, Rotary, rotary_table, truncated_normal_

Batch = Mapping[str, Tensor]
"""inputs [B, L], puzzle_identifiers [B] and, if the answer is known, labels [B, L]."""

Slots = list[int] | slice | Tensor
"""Indices of slots; `slice(None)` for all. A tensor on the carry's device avoids the
synchronising copy of a list from the host."""


@dataclass(frozen=True, kw_only=True)
class Carry:
    """State of the slots between ACT steps."""

    z_H: Tensor
    """[B, P+L, D]"""
    z_L: Tensor
    """[B, P+L, D]"""
    steps: Tensor
    """[B] int32, ACT steps completed on the current row."""
    halted: Tensor
    """[B] bool, True if the slot takes a new row in the next ACT step."""
    current: dict[str, Tensor]
    """Batch tensors of the rows in the slots."""

    def to_tensors(self) -> dict[str, Tensor]:
        """Return all tensors by name, [B, ...] each; the inverse of `from_tensors`."""
        fields = {name: getattr(self, name) for name in ("z_H", "z_L", "steps", "halted")}
        return fields | {f"current.{name}": value for name, value in self.current.items()}

    @staticmethod
    def from_tensors(tensors: Mapping[str, Tensor]) -> Carry:
        """Build a carry from the result of `to_tensors`."""
        fields = {name: value for name, value in tensors.items() if "." not in name}
        current = {name.partition(".")[2]: tensors[name] for name in tensors.keys() - fields.keys()}
        return Carry(**fields, current=current)

    def select(self, slots: Slots, cells: int) -> Carry:
        """Return the carry of `slots`, with all tensors truncated to a canvas of `cells` cells."""
        excess = self.current["inputs"].shape[1] - cells
        return Carry.from_tensors(
            {
                name: value[slots, : value.shape[1] - excess] if value.dim() > 1 else value[slots]
                for name, value in self.to_tensors().items()
            }
        )

    def scatter(self, parts: Sequence[tuple[Slots, Carry]]) -> Carry:
        """Return a carry of this shape from `parts` that cover all slots, zero-padded."""
        if len(parts) == 1 and parts[0][1].z_H.shape == self.z_H.shape:
            return parts[0][1]
        tensors = {name: torch.zeros_like(value) for name, value in self.to_tensors().items()}
        for slots, part in parts:
            for name, value in part.to_tensors().items():
                index = (slots, slice(value.shape[1])) if value.dim() > 1 else slots
                tensors[name][index] = value
        return Carry.from_tensors(tensors)


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """Outputs of an ACT step."""

    logits: Tensor
    """[B, L, vocab_size]"""
    q_halt: Tensor
    """[B], float32 or wider: logit that the answer is right and the row can halt."""
    q_continue: Tensor
    """[B], same dtype: second logit of the halt head; published, but unused."""
    puzzle_rows: Tensor | None
    """[B, puzzle_emb_ndim], the rows used; in training a leaf whose .grad updates the table."""


class TRM(nn.Module):
    """Tiny Recursive Model: embeddings, network, heads and puzzle table.

    Initialisation, determined by `seed` and drawn on the CPU:

        linear weights       truncated normal, std 1/sqrt(fan_in)
        token, positions     truncated normal, std 1/sqrt(D)
        H_init, L_init       truncated normal, std 1; buffers, not trained
        halt head            weight 0, bias -5: no row halts initially
        puzzle table         0; a buffer with its own optimiser
    """

    H_init: Tensor
    L_init: Tensor
    puzzle_table: Tensor

    def __init__(self, config: TRMConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        D = config.hidden_size
        self.embed_tokens = nn.Parameter(torch.empty(config.vocab_size, D))
        if config.pos_encodings == "learned":
            self.embed_pos = nn.Parameter(torch.empty(config.positions, D))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.L_layers))
        self.lm_head = Linear(D, config.vocab_size)
        self.q_head = Linear(D, 2, bias=True)
        self.register_buffer("H_init", torch.empty(D))
        self.register_buffer("L_init", torch.empty(D))
        table = torch.zeros(config.num_puzzle_identifiers, config.puzzle_emb_ndim)
        self.register_buffer("puzzle_table", table)
        self._rotary: dict[int, Rotary] = {}
        self.init_weights(seed)

    def init_weights(self, seed: int) -> None:
        """Reinitialise all weights as in the class docstring."""
        generator = torch.Generator().manual_seed(seed)
        D = self.config.hidden_size
        truncated_normal_(self.embed_tokens, 1 / math.sqrt(D), generator)
        if self.config.pos_encodings == "learned":
            truncated_normal_(self.embed_pos, 1 / math.sqrt(D), generator)
        for module in (*self.blocks.modules(), self.lm_head):
            if isinstance(module, Linear):
                truncated_normal_(module.weight, 1 / math.sqrt(module.weight.shape[1]), generator)
        assert self.q_head.bias is not None
        nn.init.zeros_(self.q_head.weight)
        nn.init.constant_(self.q_head.bias, -5.0)
        truncated_normal_(self.H_init, 1.0, generator)
        truncated_normal_(self.L_init, 1.0, generator)
        self.puzzle_table.zero_()

    def compile_recursion(self, *, dynamic: bool = True) -> None:
        """Compile a cycle of the recursion with torch.compile; outputs change by rounding.

        With `dynamic` shapes, outputs do not depend on the size compiled first; static shapes gain
        nothing on a CPU. Compiling cycles instead of blocks gains 5% at small sizes (docs/log.md).
        """
        # Gradient modes and batches of one or several rows exceed torch's limit of 8, beyond which
        # it falls back to eager kernels with only a warning.
        torch._dynamo.config.recompile_limit = 64
        self._cycle = torch.compile(self._cycle, dynamic=dynamic)  # type: ignore[method-assign]

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the states and of the recursion."""
        if self.config.forward_dtype != "auto":
            return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}[
                self.config.forward_dtype
            ]
        return torch.bfloat16 if self.H_init.device.type == "cuda" else torch.float32

    def initial_carry(self, batch: Batch) -> Carry:
        """Return a carry of halted slots, which the first ACT step fills from its batch."""
        tokens = batch["inputs"]
        B, cells = tokens.shape
        shape = (B, self.config.prefix + cells, self.config.hidden_size)
        # Not torch.empty: NaN in uninitialised memory would reach the gradient of torch.where.
        return Carry(
            z_H=torch.zeros(shape, dtype=self.dtype, device=tokens.device),
            z_L=torch.zeros(shape, dtype=self.dtype, device=tokens.device),
            steps=torch.zeros(B, dtype=torch.int32, device=tokens.device),
            halted=torch.ones(B, dtype=torch.bool, device=tokens.device),
            current={name: torch.zeros_like(value) for name, value in batch.items()},
        )

    def fresh_states(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return the initial (z_H, z_L), [B, P+L, D] each, of token rows [B, L]."""
        rows, cells = tokens.shape
        shape = (rows, self.config.prefix + cells, self.config.hidden_size)
        z_H, z_L = (init.to(self.dtype).expand(shape) for init in (self.H_init, self.L_init))
        return z_H, z_L

    def act_step(
        self,
        carry: Carry,
        batch: Batch,
        *,
        puzzle_rows: Tensor | None = None,
        exploration: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Carry, Outputs]:
        """Run one ACT step: halted slots take their row of `batch`, the others continue.

        `puzzle_rows` [B, puzzle_emb_ndim] replace those of the table. `exploration` is a pair of
        uniform draws [B] in [0, 1), for whether to explore and for the minimum number of steps;
        None draws them from torch's global generator. Gradient flows through the last cycle; the
        returned carry is detached.
        """
        carry = self._refill(carry, batch)
        z_H, z_L, outputs = self.recurse(
            carry.current, carry.z_H, carry.z_L, puzzle_rows=puzzle_rows
        )
        steps = carry.steps + 1
        halted = self._halt(steps, outputs.q_halt.detach(), exploration)
        z_H, z_L = z_H.detach(), z_L.detach()
        return replace(carry, z_H=z_H, z_L=z_L, steps=steps, halted=halted), outputs

    def recurse(
        self,
        current: Batch,
        z_H: Tensor,
        z_L: Tensor,
        *,
        puzzle_rows: Tensor | None = None,
        injected: Tensor | None = None,
        full_gradient: bool = False,
        recompute: bool = True,
    ) -> tuple[Tensor, Tensor, Outputs]:
        """Run the recursion of an ACT step, without slots; return (z_H, z_L, outputs).

        `injected` [B, P+L, D] is added to the embedded question. By default, as published, gradient
        flows through the last cycle only, so with several cycles it does not reach the given
        states. `full_gradient` lets it flow through all cycles into the states; `recompute` then
        recomputes each cycle's activations in the backward pass instead of storing them.
        """
        x, puzzle_rows = self._embed(current, puzzle_rows)
        if injected is not None:
            x = x + injected
        if full_gradient:
            z_H, z_L = self._recurse_all_cycles(x, z_H, z_L, recompute)
        else:
            z_H, z_L = self._recurse_last_cycle(x, z_H, z_L)
        q = self.q_head(z_H[:, 0])
        q = q.to(torch.promote_types(q.dtype, torch.float32))
        outputs = Outputs(
            logits=self.lm_head(z_H)[:, self.config.prefix :],
            q_halt=q[:, 0],
            q_continue=q[:, 1],
            puzzle_rows=puzzle_rows,
        )
        return z_H, z_L, outputs

    def _recurse_last_cycle(self, x: Tensor, z_H: Tensor, z_L: Tensor) -> tuple[Tensor, Tensor]:
        """Run H_cycles cycles, the last one with gradient (the paper's deep recursion)."""
        rotary = self._rotary_table(x.shape[1], x.device)
        for cycle in range(self.config.H_cycles):
            last = cycle == self.config.H_cycles - 1
            with nullcontext() if last else torch.no_grad():
                z_H, z_L = self._cycle(x, z_H, z_L, rotary)
        return z_H, z_L

    def _recurse_all_cycles(
        self, x: Tensor, z_H: Tensor, z_L: Tensor, recompute: bool
    ) -> tuple[Tensor, Tensor]:
        """Run H_cycles cycles, all with gradient."""
        rotary = self._rotary_table(x.shape[1], x.device)
        for _ in range(self.config.H_cycles):
            if recompute and torch.is_grad_enabled():
                z_H, z_L = checkpoint(self._cycle, x, z_H, z_L, rotary, use_reentrant=False)
            else:
                z_H, z_L = self._cycle(x, z_H, z_L, rotary)
        return z_H, z_L

    def _cycle(
        self, x: Tensor, z_H: Tensor, z_L: Tensor, rotary: Rotary | None
    ) -> tuple[Tensor, Tensor]:
        """Update z_L L_cycles times, then z_H once."""
        for _ in range(self.config.L_cycles):
            z_L = self._blocks(z_L, z_H + x, rotary)
        return self._blocks(z_H, z_L, rotary), z_L

    def _blocks(self, h: Tensor, inject: Tensor, rotary: Rotary | None) -> Tensor:
        h = h + inject
        for block in self.blocks:
            h = block(h, rotary)
        return h

    def _embed(self, current: Batch, puzzle_rows: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return x [B, P+L, D] and its puzzle rows, which are a leaf in training."""
        D, P = self.config.hidden_size, self.config.prefix
        # F.embedding, not indexing, whose backward sums in a nondeterministic order on two threads.
        x = F.embedding(current["inputs"].long(), self.embed_tokens.to(self.dtype))
        if P:
            if puzzle_rows is None:
                puzzle_rows = self.puzzle_table[current["puzzle_identifiers"].long()]
                if self.training and torch.is_grad_enabled():
                    puzzle_rows = puzzle_rows.detach().requires_grad_()
            rows = puzzle_rows.to(self.dtype)
            padded = F.pad(rows, (0, P * D - rows.shape[-1]))
            x = torch.cat((padded.view(-1, P, D), x), dim=1)
        if self.config.pos_encodings == "learned":
            indices = self.position_indices(x.shape[1])
            embed_pos = self.embed_pos if indices is None else self.embed_pos[indices]
            x = 0.707106781 * (x + embed_pos.to(self.dtype))
        return x * math.sqrt(D), puzzle_rows

    def _refill(self, carry: Carry, batch: Batch) -> Carry:
        """Give halted slots initial states and their row of the batch."""
        fresh = carry.halted
        state = fresh.view(-1, 1, 1)
        current = {
            name: torch.where(fresh.view(-1, *(1,) * (value.dim() - 1)), batch[name], value)
            for name, value in carry.current.items()
        }
        return Carry(
            z_H=torch.where(state, self.H_init.to(self.dtype), carry.z_H),
            z_L=torch.where(state, self.L_init.to(self.dtype), carry.z_L),
            steps=torch.where(fresh, 0, carry.steps),
            halted=fresh,
            current=current,
        )

    def _halt(
        self, steps: Tensor, q_halt: Tensor, exploration: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        """Return [B] bool; in evaluation, as published, only after halt_max_steps."""
        max_steps = self.config.halt_max_steps
        last = steps >= max_steps
        if not self.training or max_steps == 1:
            return last
        explore, draw = exploration or (torch.rand_like(q_halt), torch.rand_like(q_halt))
        min_steps = 2 + (draw * (max_steps - 1)).long()
        min_steps = (explore < self.config.halt_exploration_prob) * min_steps
        return (last | (q_halt > 0)) & (steps >= min_steps)

    def _rotary_table(self, positions: int, device: torch.device) -> Rotary | None:
        """Return the cached (cos, sin) for a full or smaller canvas; None without rotary."""
        if self.config.pos_encodings != "rope" or self.config.mlp_t:
            return None
        table = self._rotary.get(positions)
        if table is None or table[0].device != device:
            dim = self.config.hidden_size // self.config.num_heads
            # An inference tensor would be unusable in training, which shares the cache.
            with torch.inference_mode(False):
                indices = self.position_indices(positions)
                if indices is None:
                    indices = torch.arange(positions)
                table = rotary_table(indices.to(device), dim, self.config.rope_theta)
            self._rotary[positions] = table
        return table

    def position_indices(self, positions: int) -> Tensor | None:
        """Return the full-canvas positions [positions] int64 of a smaller canvas with its prefix.

        Returns None for the full canvas. Both canvases are square and share the top-left corner.
        """
        P, side = self.config.prefix, math.isqrt(self.config.seq_len)
        if positions == self.config.positions:
            return None
        small = math.isqrt(positions - P)
        assert P + small**2 == positions and small < side, f"{positions} positions are no canvas"
        assert not self.config.mlp_t, "mlp_t supports only the full canvas"
        rows, columns = torch.arange(small)[:, None], torch.arange(small)
        return torch.cat((torch.arange(P), (P + rows * side + columns).flatten()))
