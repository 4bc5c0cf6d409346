"""Load and export checkpoints of the published TRM code: tensor names and config keys."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hybrid.errors import UserError
from hybrid.trm.config import TRMConfig
from hybrid.trm.model import TRM

log = logging.getLogger(__name__)

RENAMED = {
    "embed_tokens": "inner.embed_tokens.embedding_weight",
    "embed_pos": "inner.embed_pos.embedding_weight",
    "puzzle_table": "inner.puzzle_emb.weights",
}
TABLE = RENAMED["puzzle_table"]
UNUSED = {"batch_size": None, "H_layers": 0, "no_ACT_continue": True}
"""Published keys that TRMConfig lacks, and their only supported value (None: any)."""


def published_name(name: str) -> str:
    """Return the published name: `blocks.0.mlp...` becomes `inner.L_level.layers.0.mlp...`."""
    if name in RENAMED:
        return RENAMED[name]
    return "inner." + re.sub(r"^blocks\.", "L_level.layers.", name)


def config_from_published(arch: Mapping[str, Any]) -> TRMConfig:
    """Build a TRMConfig from published keys; raise UserError for unknown or missing ones."""
    known = {field.name for field in fields(TRMConfig)}
    for key, value in arch.items():
        if key in UNUSED and UNUSED[key] not in (None, value):
            raise UserError(f"arch: {key}={value!r} is not supported, only {UNUSED[key]!r}")
        if key not in known | UNUSED.keys():
            raise UserError(f"arch: unknown key {key!r}; known: {', '.join(sorted(known))}")
    if "L_cycles" not in arch:
        # The published ARC weights were trained with 4, the released config has 6, and the weights
        # do not determine it.
        raise UserError("arch: L_cycles must be given, it cannot be read from the weights")
    try:
        return TRMConfig(**{key: value for key, value in arch.items() if key in known})
    except ValueError as error:
        raise UserError("arch: " + "; ".join(str(error).splitlines())) from error


def load(
    source: str | Path | Mapping[str, Tensor],
    *,
    identifiers: Sequence[str] | None = None,
    new_identifiers: Sequence[str] | None = None,
    **arch: Any,
) -> TRM:
    """Load published weights from a torch file (weights_only=True) or a state dict into a TRM.

    `arch` are the published config keys; L_cycles is required. With `identifiers` (names of the
    checkpoint's puzzle rows) and `new_identifiers`, puzzle rows are matched by name. Unmatched
    rows, and a table of another size without names, become the mean row, with a warning. Raises
    UserError that lists all missing, unknown and misshapen tensors.
    """
    if isinstance(source, Mapping):
        where, state = "state dict", dict(source)
    else:
        where, state = str(source), _read(Path(source))
    state = {re.sub(r"^(_orig_mod\.|model\.)*", "", name): value for name, value in state.items()}
    config = config_from_published(arch)
    if TABLE in state and not config.puzzle_emb_ndim:
        raise UserError(f"{where}: has puzzle embeddings, but arch has puzzle_emb_ndim=0")
    model = TRM(config)
    expected = {published_name(name): (name, value) for name, value in model.state_dict().items()}
    if not config.puzzle_emb_ndim:
        expected.pop(TABLE)
    elif TABLE in state and state[TABLE].shape[1:] == expected[TABLE][1].shape[1:]:
        by_name = identifiers is not None and new_identifiers is not None
        if by_name or len(state[TABLE]) != config.num_puzzle_identifiers:
            state[TABLE] = resize_table(
                state[TABLE], config.num_puzzle_identifiers, identifiers, new_identifiers
            )
    _check_names(where, state, {name: value for name, (_, value) in expected.items()})
    model.load_state_dict({expected[name][0]: state[name] for name in expected}, strict=False)
    return model


def export(model: TRM, *, prefix: str = "model.") -> dict[str, Tensor]:
    """Return the model's state dict under the published names; tensors are not copied."""
    return {
        prefix + published_name(name.removeprefix("_orig_mod.")): value
        for name, value in model.state_dict().items()
        if value.numel()
    }


def resize_table(
    table: Tensor,
    rows: int,
    identifiers: Sequence[str] | None = None,
    new_identifiers: Sequence[str] | None = None,
) -> Tensor:
    """Return a table [rows, ndim]: rows matched by name if possible, otherwise the mean row."""
    resized = table.float().mean(0, keepdim=True).repeat(rows, 1).to(table.dtype)
    if identifiers is None or new_identifiers is None:
        log.warning("puzzle table: %d rows replaced by %d mean rows", len(table), rows)
        return resized
    if len(identifiers) != len(table) or len(new_identifiers) != rows:
        raise UserError(
            f"identifiers: {len(identifiers)} and {len(new_identifiers)} names"
            f" for tables of {len(table)} and {rows} rows"
        )
    old = {name: row for row, name in enumerate(identifiers)}
    pairs = [(new, old[name]) for new, name in enumerate(new_identifiers) if name in old]
    if pairs:
        target, origin = torch.tensor(pairs).T
        resized[target] = table[origin]
    log.warning("puzzle table: %d of %d rows found by name, rest = mean row", len(pairs), rows)
    return resized


def _read(path: Path) -> dict[str, Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint") from None
    except Exception as error:  # torch.load raises many unrelated types for a bad file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: not a torch checkpoint of plain tensors ({reason})") from error
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise UserError(f"{path}: not a state dict (names to tensors)")
    return state


def _check_names(where: str, state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    problems = [f"missing {name}" for name in expected.keys() - state.keys()]
    problems += [f"unknown {name}" for name in state.keys() - expected.keys()]
    problems += [
        f"{name} is {list(state[name].shape)}, arch has {list(expected[name].shape)}"
        for name in expected.keys() & state.keys()
        if state[name].shape != expected[name].shape
    ]
    if problems:
        raise UserError(f"{where}: " + "; ".join(sorted(problems)))
