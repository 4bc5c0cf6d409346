"""What a Tiny Recursive Model is made of; the names are the published ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from hybrid.errors import check_fields

Positions = Literal["rope", "learned", "none"]
ForwardDtype = Literal["auto", "float32", "bfloat16", "float64"]
CHOICES = {"pos_encodings": get_args(Positions), "forward_dtype": get_args(ForwardDtype)}


@dataclass(frozen=True, kw_only=True)
class TRMConfig:
    """Sizes of the model. The paper's T is H_cycles, its n L_cycles, its N_sup halt_max_steps.

    The number of grid positions and of puzzle ids belong to the data: `seq_len` and
    `num_puzzle_identifiers` are filled in from it by whoever builds the model.
    """

    hidden_size: int = 512
    """D, the width of every state."""
    num_heads: int = 8
    expansion: float = 4.0
    """SwiGLU's inner width is 2/3 of this times the width, rounded up to a multiple of 256."""
    L_layers: int = 2
    """Blocks in the one network that plays both roles."""
    H_cycles: int = 3
    """Outer cycles of an ACT step; only the last carries gradient."""
    L_cycles: int = 4
    """Updates of z_L in a cycle."""
    halt_max_steps: int = 16
    """ACT steps a row lives at most."""
    halt_exploration_prob: float = 0.1
    """Chance that a row may not halt before a minimum drawn from 2..halt_max_steps."""
    pos_encodings: Positions = "rope"
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    mlp_t: bool = False
    """Mix positions by a SwiGLU over the sequence instead of attention."""
    puzzle_emb_ndim: int = 512
    """Width of a puzzle's row, 0 for none; zero-padded to puzzle_emb_len * hidden_size."""
    puzzle_emb_len: int = 16
    """P, prefix positions in front of the grid."""
    forward_dtype: ForwardDtype = "auto"
    """Compute dtype; auto is bfloat16 on a GPU and float32 on a CPU. Master weights are float32."""
    vocab_size: int = 12
    seq_len: int = 900
    """L, grid positions: the canvas' side squared."""
    num_puzzle_identifiers: int = 1
    """Rows of the puzzle table; row 0 is the blank puzzle."""

    def __post_init__(self) -> None:
        sizes = ("hidden_size", "num_heads", "L_layers", "H_cycles", "L_cycles", "halt_max_steps")
        counts = ("vocab_size", "seq_len", "num_puzzle_identifiers")
        problems = check_fields(
            self,
            **dict.fromkeys((*sizes, *counts), (1, None)),
            expansion=(1e-6, None),
            halt_exploration_prob=(0, 1),
            rope_theta=(1, None),
            rms_norm_eps=(0, None),
            puzzle_emb_ndim=(0, None),
            puzzle_emb_len=(0, None),
        )
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                known = ", ".join(choices)
                problems.append(f"{name} must be one of {known}, got {getattr(self, name)!r}")
        if self.num_heads >= 1 and self.hidden_size % self.num_heads:
            problems.append(
                f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}"
            )
        elif self.pos_encodings == "rope" and self.hidden_size // max(self.num_heads, 1) % 2:
            problems.append("hidden_size / num_heads must be even for rope")
        if self.puzzle_emb_ndim > self.puzzle_emb_len * self.hidden_size:
            problems.append(
                f"puzzle_emb_ndim {self.puzzle_emb_ndim} does not fit in puzzle_emb_len"
                f" {self.puzzle_emb_len} positions of {self.hidden_size}"
            )
        if problems:
            raise ValueError("\n".join(problems))

    @property
    def prefix(self) -> int:
        """P, or 0 where there is no puzzle embedding."""
        return self.puzzle_emb_len if self.puzzle_emb_ndim else 0

    @property
    def positions(self) -> int:
        """P + L, the length of the sequence."""
        return self.prefix + self.seq_len
