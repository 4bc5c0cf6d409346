"""The Tiny Recursive Model (arXiv 2510.04871).

    x    embedded question: puzzle prefix and grid tokens   [B, P+L, D]
    z_H  the answer so far, the paper's y                   [B, P+L, D]
    z_L  the latent reasoning, the paper's z                [B, P+L, D]

One *cycle* improves z_L `L_cycles` times, then z_H once. One *ACT step* is `H_cycles` cycles and
one supervision; a row lives for up to `halt_max_steps` of them, its carry detached in between.
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
"""inputs [B, L], puzzle_identifiers [B] and, where there is an answer, labels [B, L]."""


Slots = list[int] | slice | Tensor
"""Indices of slots; `slice(None)` for all. A tensor on the carry's device avoids a copy from the
host, for which the host would wait."""


@dataclass(frozen=True, kw_only=True)
class Carry:
    """What a slot keeps between ACT steps."""

    z_H: Tensor
    """[B, P+L, D]"""
    z_L: Tensor
    """[B, P+L, D]"""
    steps: Tensor
    """[B] int32, ACT steps the present row has had."""
    halted: Tensor
    """[B] bool: the slot starts afresh, with new data, in the next ACT step."""
    current: dict[str, Tensor]
    """The batch's tensors as the slots hold them."""

    def to_tensors(self) -> dict[str, Tensor]:
        """Everything in it, [slots, ...] each, by name; `from_tensors` takes it back."""
        own = {name: getattr(self, name) for name in ("z_H", "z_L", "steps", "halted")}
        return own | {f"current.{name}": value for name, value in self.current.items()}

    @staticmethod
    def from_tensors(tensors: Mapping[str, Tensor]) -> Carry:
        """A carry of what `tensors` gives."""
        own = {name: value for name, value in tensors.items() if "." not in name}
        current = {name.partition(".")[2]: tensors[name] for name in tensors.keys() - own.keys()}
        return Carry(**own, current=current)

    def select(self, slots: Slots, cells: int) -> Carry:
        """Some slots, whose rows stand on a canvas of `cells` cells: all tensors are cut to it."""
        less = self.current["inputs"].shape[1] - cells
        return Carry.from_tensors(
            {
                name: value[slots, : value.shape[1] - less] if value.dim() > 1 else value[slots]
                for name, value in self.to_tensors().items()
            }
        )

    def scatter(self, parts: Sequence[tuple[Slots, Carry]]) -> Carry:
        """All slots, when parts that hold all of them have gone on; beyond their canvas zeros."""
        if len(parts) == 1 and parts[0][1].z_H.shape == self.z_H.shape:
            return parts[0][1]
        whole = {name: torch.zeros_like(value) for name, value in self.to_tensors().items()}
        for slots, part in parts:
            for name, value in part.to_tensors().items():
                cut = (slots, slice(value.shape[1])) if value.dim() > 1 else slots
                whole[name][cut] = value
        return Carry.from_tensors(whole)


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """What an ACT step says."""

    logits: Tensor
    """[B, L, vocabulary]"""
    q_halt: Tensor
    """[B] float32 at least: logit of "this answer is right, stop"."""
    q_continue: Tensor
    """[B] float32: the halt head's second logit, published and unused."""
    puzzle_rows: Tensor | None
    """[B, puzzle_emb_ndim]: the rows that went in; in training a leaf, its .grad for the table."""


class TRM(nn.Module):
    """The network, its puzzle table and the ACT step.

    Initialisation (`seed` decides it, on the CPU, whatever the device):

        linear weights       truncated normal, std 1/sqrt(fan_in)
        token, positions     truncated normal, std 1/sqrt(D)
        H_init, L_init       truncated normal, std 1; buffers, not trained
        halt head            weight 0, bias -5: nobody halts at first
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
        """Draw every weight anew, as in the table above."""
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
        """Compile a cycle of the recursion with torch.compile; numbers change by rounding.

        Compiles once per kind of gradient, for all batch and canvas sizes, so that numbers do not
        depend on which size came first. Compiling a cycle instead of a block gains 5% at small
        sizes; static shapes (`dynamic=False`) gain nothing on a CPU (docs/log.md).
        """
        # Kinds of gradient times batches of one row or several reach torch's limit of 8, beyond
        # which it falls back to eager kernels with no more than a warning.
        torch._dynamo.config.recompile_limit = 64
        self._cycle = torch.compile(self._cycle, dynamic=dynamic)  # type: ignore[method-assign]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype the recursion computes in."""
        if self.config.forward_dtype != "auto":
            return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}[
                self.config.forward_dtype
            ]
        return torch.bfloat16 if self.H_init.device.type == "cuda" else torch.float32

    def initial_carry(self, batch: Batch) -> Carry:
        """A carry whose slots are all halted: the first ACT step fills them from its batch."""
        tokens = batch["inputs"]
        B, cells = tokens.shape
        shape = (B, self.config.prefix + cells, self.config.hidden_size)
        # Zeros, not empty: memory that happens to hold NaN must not reach `where`'s gradient.
        return Carry(
            z_H=torch.zeros(shape, dtype=self.dtype, device=tokens.device),
            z_L=torch.zeros(shape, dtype=self.dtype, device=tokens.device),
            steps=torch.zeros(B, dtype=torch.int32, device=tokens.device),
            halted=torch.ones(B, dtype=torch.bool, device=tokens.device),
            current={name: torch.zeros_like(value) for name, value in batch.items()},
        )

    def fresh_states(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """(z_H, z_L) that token rows [B, L] start from, [B, P+L, D] each."""
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
        """One supervision step: halted slots take their row of the batch, the others go on.

        `puzzle_rows` [B, puzzle_emb_ndim] stand in for the table's where given. `exploration` is a
        pair of uniform draws [B] in [0, 1): whether to explore, and the minimum number of steps;
        drawn from torch's global generator where None. In training gradient flows through the last
        cycle; the new carry is detached.
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
        """An ACT step's recursion and its read-out, without the slots: (z_H, z_L, outputs).

        `injected` [B, P+L, D] is added to the embedded question. As published, gradient flows
        through the last cycle alone, so nothing that made the states it is given would ever learn;
        with `full_gradient` it flows through all cycles and into them, and with `recompute` each
        cycle's activations are made again for backward instead of kept.
        """
        x, puzzle_rows = self._embed(current, puzzle_rows)
        if injected is not None:
            x = x + injected
        if full_gradient:
            z_H, z_L = self._recur_through(x, z_H, z_L, recompute)
        else:
            z_H, z_L = self._recur(x, z_H, z_L)
        q = self.q_head(z_H[:, 0])
        q = q.to(torch.promote_types(q.dtype, torch.float32))
        outputs = Outputs(
            logits=self.lm_head(z_H)[:, self.config.prefix :],
            q_halt=q[:, 0],
            q_continue=q[:, 1],
            puzzle_rows=puzzle_rows,
        )
        return z_H, z_L, outputs

    def _recur(self, x: Tensor, z_H: Tensor, z_L: Tensor) -> tuple[Tensor, Tensor]:
        """Run H_cycles cycles, the last one with gradient (the paper's deep recursion)."""
        rotary = self._rotary_table(x.shape[1], x.device)
        for cycle in range(self.config.H_cycles):
            last = cycle == self.config.H_cycles - 1
            with nullcontext() if last else torch.no_grad():
                z_H, z_L = self._cycle(x, z_H, z_L, rotary)
        return z_H, z_L

    def _recur_through(
        self, x: Tensor, z_H: Tensor, z_L: Tensor, recompute: bool
    ) -> tuple[Tensor, Tensor]:
        """Run the same cycles, all of them with gradient."""
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
        """x [B, P+L, D], and the puzzle rows in it (a leaf while training)."""
        D, P = self.config.hidden_size, self.config.prefix
        # F.embedding, not indexing: on two threads the gradient of indexing is summed in any order.
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
            places = self.position_indices(x.shape[1])
            there = self.embed_pos if places is None else self.embed_pos[places]
            x = 0.707106781 * (x + there.to(self.dtype))
        return x * math.sqrt(D), puzzle_rows

    def _refill(self, carry: Carry, batch: Batch) -> Carry:
        """Halted slots get fresh states and their row of the batch."""
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
        """[B] bool. In evaluation as published: all halt_max_steps, whatever the halt head says."""
        most = self.config.halt_max_steps
        last = steps >= most
        if not self.training or most == 1:
            return last
        explore, least = exploration or (torch.rand_like(q_halt), torch.rand_like(q_halt))
        minimum = (explore < self.config.halt_exploration_prob) * (2 + (least * (most - 1)).long())
        return (last | (q_halt > 0)) & (steps >= minimum)

    def _rotary_table(self, positions: int, device: torch.device) -> Rotary | None:
        """Angles of the cells of a canvas, which may be smaller than the full one."""
        if self.config.pos_encodings != "rope" or self.config.mlp_t:
            return None
        known = self._rotary.get(positions)
        if known is None or known[0].device != device:
            dim = self.config.hidden_size // self.config.num_heads
            # Not an inference tensor, whatever mode the first caller is in: training uses it too.
            with torch.inference_mode(False):
                places = self.position_indices(positions)
                if places is None:
                    places = torch.arange(positions)
                known = rotary_table(places.to(device), dim, self.config.rope_theta)
            self._rotary[positions] = known
        return known

    def position_indices(self, positions: int) -> Tensor | None:
        """[positions] int64: where prefix and cells of a smaller canvas stand on the full one.

        None for the full canvas. Both are square and share the top-left corner.
        """
        P, side = self.config.prefix, math.isqrt(self.config.seq_len)
        if positions == self.config.positions:
            return None
        small = math.isqrt(positions - P)
        assert P + small**2 == positions and small < side, f"{positions} positions are no canvas"
        assert not self.config.mlp_t, "mlp_t has a weight for every position of the full canvas"
        rows, columns = torch.arange(small)[:, None], torch.arange(small)
        return torch.cat((torch.arange(P), (P + rows * side + columns).flatten()))
