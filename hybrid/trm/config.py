"""Config of the Tiny Recursive Model, with the published names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from hybrid.errors import check_fields

Positions = Literal["rope", "learned", "none"]
ForwardDtype = Literal["auto", "float32", "bfloat16", "float64"]
CHOICES = {"pos_encodings": get_args(Positions), "forward_dtype": get_args(ForwardDtype)}


@dataclass(frozen=True, kw_only=True)
class TRMConfig:
    """Sizes of the model; the paper's T, n and N_sup are H_cycles, L_cycles and halt_max_steps.

    `seq_len` and `num_puzzle_identifiers` are properties of the dataset: code that builds a model
    for a dataset sets them. Raises ValueError with one line per invalid field.
    """

    hidden_size: int = 512
    """D, width of the states."""
    num_heads: int = 8
    expansion: float = 4.0
    """SwiGLU inner width: 2/3 * expansion * width, rounded up to a multiple of 256."""
    L_layers: int = 2
    """Blocks of the network, which updates both z_L and z_H."""
    H_cycles: int = 3
    """Cycles per ACT step; only the last one is trained through."""
    L_cycles: int = 4
    """Updates of z_L per cycle."""
    halt_max_steps: int = 16
    """Maximum number of ACT steps per row."""
    halt_exploration_prob: float = 0.1
    """Probability that a row must run a minimum of steps, drawn from 2..halt_max_steps."""
    pos_encodings: Positions = "rope"
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    mlp_t: bool = False
    """Mix positions with a SwiGLU over the sequence instead of attention."""
    puzzle_emb_ndim: int = 512
    """Width of a puzzle embedding, zero-padded to puzzle_emb_len * hidden_size; 0 disables it."""
    puzzle_emb_len: int = 16
    """P, prefix positions before the grid."""
    forward_dtype: ForwardDtype = "auto"
    """Compute dtype; auto: bfloat16 on a GPU, float32 on a CPU. Master weights are float32."""
    vocab_size: int = 12
    seq_len: int = 900
    """L, grid positions: the square of the canvas side."""
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
        """P, or 0 without puzzle embeddings."""
        return self.puzzle_emb_len if self.puzzle_emb_ndim else 0

    @property
    def positions(self) -> int:
        """P + L, the sequence length."""
        return self.prefix + self.seq_len
