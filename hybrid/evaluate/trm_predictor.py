"""From a trained TRM to predictions: every view of every test input is run and has one vote."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open
from torch import Tensor, nn

from hybrid.arc import (
    PAD,
    Grid,
    grid_to_string,
    halt_confidence,
    tokenize_grid,
    tokens_to_grid,
    vote,
)
from hybrid.checkpoint import Checkpoint
from hybrid.config import EvaluationConfig
from hybrid.dataset.stream import Rows, split_by_canvas
from hybrid.device import fuse
from hybrid.evaluate.questions import Question
from hybrid.trm import TRM, TRMConfig

Prediction = dict[str, Any]
"""What is known of a task after solving it; plain values, written as predictions/{task}.json."""


class TRMPredictor:
    """A trained TRM, its averaged weights in memory, its puzzle table on disk."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: EvaluationConfig,
        device: torch.device,
        *,
        compiled: bool = False,
    ) -> None:
        self.config = config
        trm = replace(TRMConfig(**checkpoint.state["trm"]), num_puzzle_identifiers=1)
        self.model = TRM(trm)
        load_averaged(self.model, checkpoint)
        self.model.to(device).eval()
        fuse(self.model, compiled)
        self.table = PuzzleTable(checkpoint)

    def solve(self, question: Question) -> Prediction:
        """Candidates for every test input of a task, best first, with what they cost."""
        started = time.perf_counter()
        tests, views = question.task.test, question.views
        inputs = np.stack(
            [
                tokenize_grid(view.apply(test.input), question.side)
                for test in tests
                for view in views
            ]
        )
        rows = self.table.rows(question, len(views)).repeat(len(tests), 1)
        different, number = inputs, np.arange(len(inputs))
        if not question.identifiers:
            # Without puzzles of their own, views whose input looks the same are one question.
            different, number = np.unique(inputs, axis=0, return_inverse=True)
        tokens, halt_logits, act_steps = predict(
            self.model, different, rows[: len(different)], self.config
        )
        tokens, confidences = tokens[number.ravel()], halt_confidence(halt_logits[number.ravel()])
        found = []
        for first in range(0, len(inputs), len(views)):
            mine = slice(first, first + len(views))
            grids = [
                view.invert(tokens_to_grid(row))
                for view, row in zip(views, tokens[mine], strict=True)
            ]
            found.append(tally_votes(grids, confidences[mine].tolist()))
        seconds = time.perf_counter() - started
        spent = {
            "rows": len(different),
            "act_steps": act_steps,
            "llm_tokens": 0,
            "seconds": seconds,
        }
        return {"task": question.task.id, "tests": found, "spent": spent}


class PuzzleTable:
    """The puzzle table of a checkpoint, read row by row from disk."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.path = checkpoint.folder / "puzzle_table.safetensors"

    def rows(self, question: Question, views: int) -> Tensor:
        """[views, puzzle_emb_ndim]: rows of the first views, the spare ones behind the others."""
        with safe_open(self.path, "pt") as file:
            table = file.get_slice("puzzle_table")
            if not question.identifiers:
                blank: Tensor = table[0:1]
                return blank.repeat(views, 1)
            first = question.identifiers.start
            rows: Tensor = table[first : first + views]
            return rows


def load_averaged(model: nn.Module, checkpoint: Checkpoint, only: str = "") -> None:
    """Fill a model with a checkpoint's averaged weights; the puzzle table stays on disk.

    `only`: the tensors whose names begin so.
    """
    tensors = checkpoint.tensors("model") | checkpoint.tensors("ema")
    tensors = {name: value for name, value in tensors.items() if name.startswith(only)}
    missing, unknown = model.load_state_dict(tensors, strict=False)
    assert all(name.endswith("puzzle_table") for name in missing), missing
    assert not unknown, unknown


def tally_votes(grids: Sequence[Grid], confidences: Sequence[float]) -> dict[str, Any]:
    """The views' vote on a test input, as plain values."""
    return {
        "candidates": [
            {
                "grid": grid_to_string(candidate.grid).splitlines(),
                "votes": candidate.votes,
                "confidence": candidate.confidence,
            }
            for candidate in vote(grids, confidences)
        ],
        "variants": len(grids),
        "empty": sum(grid.size == 0 for grid in grids),
    }


@torch.inference_mode()
def predict(
    model: TRM, inputs: npt.NDArray[np.uint8], puzzle_rows: Tensor, config: EvaluationConfig
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32], int]:
    """Tokens [n, L], halt logits [n] and ACT steps spent, for token rows [n, L].

    Every row starts afresh. A slot whose row has had its last ACT step takes the next row at once,
    so batches stay full; when no row is left, slots fall away.
    """
    device = model.H_init.device
    tokens = np.empty(inputs.shape, np.uint8)
    halt_logits = np.empty(len(inputs), np.float32)
    given = torch.from_numpy(inputs).to(device)
    puzzle_rows = puzzle_rows.to(device)
    most = config.act_steps or model.config.halt_max_steps
    begun = min(config.batch_size, len(inputs))
    # Of each slot: the row it holds, and the ACT steps that row has had.
    row, steps = np.arange(begun), np.zeros(begun, np.int64)
    spent = 0
    batch, rows = {"inputs": given[:begun].int()}, puzzle_rows[:begun]
    carry = model.initial_carry(batch)
    while len(row):
        carry, outputs = model.act_step(carry, batch, puzzle_rows=rows)
        steps += 1
        spent += len(row)
        done = steps >= most
        if config.halt == "confident":
            done |= (outputs.q_halt > 0).cpu().numpy()
        if not done.any():
            continue
        ended = np.flatnonzero(done)
        tokens[row[ended]] = outputs.logits[ended].argmax(-1).to(torch.uint8).cpu().numpy()
        halt_logits[row[ended]] = outputs.q_halt[ended].cpu().numpy()
        filled = ended[: len(inputs) - begun]
        row[filled] = begun + np.arange(len(filled))
        steps[filled] = 0
        begun += len(filled)
        fresh = np.isin(np.arange(len(row)), filled)
        carry = replace(carry, halted=torch.from_numpy(fresh).to(device))
        if len(filled) < len(ended):
            keep = np.flatnonzero(~done | fresh)
            row, steps = row[keep], steps[keep]
            carry = carry.take(keep.tolist(), inputs.shape[1])
        batch, rows = {"inputs": given[row].int()}, puzzle_rows[row]
    return tokens, halt_logits, spent


def predict_rows(model: TRM, rows: Rows, batch_size: int) -> npt.NDArray[np.uint8]:
    """Tokens [n, L] that the model answers rows with."""
    was_training = model.training
    model.eval()
    identifiers = torch.from_numpy(np.asarray(rows["puzzle_identifiers"])).long()
    puzzle_rows = model.puzzle_table[identifiers.to(model.puzzle_table.device)]
    config = EvaluationConfig(batch_size=batch_size)
    said = np.full(rows["inputs"].shape, PAD, np.uint8)
    for mine, part in split_by_canvas(rows):
        tokens, _, _ = predict(model, part["inputs"], puzzle_rows[mine], config)
        said[mine, : tokens.shape[1]] = tokens
    model.train(was_training)
    return said


def exact_match(said: npt.NDArray[np.uint8], labels: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """[n]: rows that are right in every scored position."""
    right: npt.NDArray[np.bool_] = ((said == labels) | (labels == PAD)).all(axis=1)
    return right
