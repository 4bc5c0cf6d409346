"""ARC tasks: sources, augmentation, tokens, text, overlap, votes and scores; no network code."""

from hybrid.arc.augment import DIHEDRAL, Augmentation
from hybrid.arc.overlap import Overlap, find_overlap
from hybrid.arc.score import Rate, Scores, score, wilson
from hybrid.arc.sources import SOURCES, load_tasks, source_version
from hybrid.arc.task import MAX_SIDE, Grid, Pair, Task, grid_hash, pair_hash, parse_grid
from hybrid.arc.text import Comparison, compare_grids, grid_to_string, string_to_grid
from hybrid.arc.tokens import (
    EOS,
    FIRST_COLOUR,
    PAD,
    VOCABULARY,
    offset_range,
    tokenize_grid,
    tokens_to_grid,
)
from hybrid.arc.variants import draw_variants
from hybrid.arc.voting import Candidate, halt_confidence, vote

__all__ = [
    "DIHEDRAL",
    "EOS",
    "FIRST_COLOUR",
    "MAX_SIDE",
    "PAD",
    "SOURCES",
    "VOCABULARY",
    "Augmentation",
    "Candidate",
    "Comparison",
    "Grid",
    "Overlap",
    "Pair",
    "Rate",
    "Scores",
    "Task",
    "compare_grids",
    "draw_variants",
    "find_overlap",
    "grid_hash",
    "grid_to_string",
    "halt_confidence",
    "load_tasks",
    "offset_range",
    "pair_hash",
    "parse_grid",
    "score",
    "source_version",
    "string_to_grid",
    "tokenize_grid",
    "tokens_to_grid",
    "vote",
    "wilson",
]
