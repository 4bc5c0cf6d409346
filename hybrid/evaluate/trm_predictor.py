"""Predict with a trained TRM: each variant of each test input is one row and has one vote."""

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
from hybrid.device import compile_if_enabled
from hybrid.evaluate.questions import Question
from hybrid.evaluate.records import Prediction, VoteRecord
from hybrid.trm import TRM, TRMConfig


class TRMPredictor:
    """A trained TRM with its EMA weights in memory and its puzzle table on disk."""

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
        compile_if_enabled(self.model, compiled)
        self.table = PuzzleTable(checkpoint)

    def predict(self, question: Question) -> Prediction:
        """Return the ranked candidates for every test input of a task, and their cost."""
        started = time.perf_counter()
        tests, variants = question.task.test, question.variants
        inputs = np.stack(
            [
                tokenize_grid(variant.apply(test.input), question.side)
                for test in tests
                for variant in variants
            ]
        )
        puzzle_rows = self.table.rows(question, len(variants)).repeat(len(tests), 1)
        unique, index = inputs, np.arange(len(inputs))
        if not question.identifiers:
            # With the blank puzzle row, variants with equal inputs have equal outputs.
            unique, index = np.unique(inputs, axis=0, return_inverse=True)
        tokens, halt_logits, act_steps = predict_tokens(
            self.model, unique, puzzle_rows[: len(unique)], self.config
        )
        tokens, confidences = tokens[index.ravel()], halt_confidence(halt_logits[index.ravel()])
        votes = []
        for first in range(0, len(inputs), len(variants)):
            rows = slice(first, first + len(variants))
            grids = [
                variant.invert(tokens_to_grid(row))
                for variant, row in zip(variants, tokens[rows], strict=True)
            ]
            votes.append(tally_votes(grids, confidences[rows].tolist()))
        spent = {
            "rows": len(unique),
            "act_steps": act_steps,
            "llm_tokens": 0,
            "seconds": time.perf_counter() - started,
        }
        return {"task": question.task.id, "tests": votes, "spent": spent}


class PuzzleTable:
    """The puzzle table of a checkpoint, read row by row from disk."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.path = checkpoint.folder / "puzzle_table.safetensors"

    def rows(self, question: Question, variants: int) -> Tensor:
        """Return the rows [variants, puzzle_emb_ndim] of the first variants, voting ones first."""
        with safe_open(self.path, "pt") as file:
            table = file.get_slice("puzzle_table")
            if not question.identifiers:
                blank: Tensor = table[0:1]
                return blank.repeat(variants, 1)
            first = question.identifiers.start
            rows: Tensor = table[first : first + variants]
            return rows


def load_averaged(model: nn.Module, checkpoint: Checkpoint, only: str = "") -> None:
    """Load a checkpoint's EMA weights into a model, without the puzzle table.

    `only`: name prefix of the tensors to load.
    """
    tensors = checkpoint.tensors("model") | checkpoint.tensors("ema")
    tensors = {name: value for name, value in tensors.items() if name.startswith(only)}
    missing, unknown = model.load_state_dict(tensors, strict=False)
    assert all(name.endswith("puzzle_table") for name in missing), missing
    assert not unknown, unknown


def tally_votes(grids: Sequence[Grid], confidences: Sequence[float]) -> VoteRecord:
    """Return the vote of a test input's variants; each has a grid and a confidence (0..1)."""
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
def predict_tokens(
    model: TRM, inputs: npt.NDArray[np.uint8], puzzle_rows: Tensor, config: EvaluationConfig
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32], int]:
    """Return tokens [n, L], halt logits [n] and ACT steps spent, for token rows [n, L].

    Every row starts from fresh states. A slot whose row has ended takes the next row at once, so
    batches stay full; when no row is left, the batch shrinks.
    """
    device = model.H_init.device
    tokens = np.empty(inputs.shape, np.uint8)
    halt_logits = np.empty(len(inputs), np.float32)
    all_inputs = torch.from_numpy(inputs).to(device)
    puzzle_rows = puzzle_rows.to(device)
    max_steps = config.act_steps or model.config.halt_max_steps
    assigned = min(config.batch_size, len(inputs))
    # Per slot: the row it holds, and the ACT steps of that row.
    row, steps = np.arange(assigned), np.zeros(assigned, np.int64)
    spent = 0
    batch, rows = {"inputs": all_inputs[:assigned].int()}, puzzle_rows[:assigned]
    carry = model.initial_carry(batch)
    while len(row):
        carry, outputs = model.act_step(carry, batch, puzzle_rows=rows)
        steps += 1
        spent += len(row)
        done = steps >= max_steps
        if config.halt == "confident":
            done |= (outputs.q_halt > 0).cpu().numpy()
        if not done.any():
            continue
        ended = np.flatnonzero(done)
        tokens[row[ended]] = outputs.logits[ended].argmax(-1).to(torch.uint8).cpu().numpy()
        halt_logits[row[ended]] = outputs.q_halt[ended].cpu().numpy()
        refilled = ended[: len(inputs) - assigned]
        row[refilled] = assigned + np.arange(len(refilled))
        steps[refilled] = 0
        assigned += len(refilled)
        fresh = np.isin(np.arange(len(row)), refilled)
        carry = replace(carry, halted=torch.from_numpy(fresh).to(device))
        if len(refilled) < len(ended):
            keep = np.flatnonzero(~done | fresh)
            row, steps = row[keep], steps[keep]
            carry = carry.select(keep.tolist(), inputs.shape[1])
        batch, rows = {"inputs": all_inputs[row].int()}, puzzle_rows[row]
    return tokens, halt_logits, spent


def predict_rows(model: TRM, rows: Rows, batch_size: int) -> npt.NDArray[np.uint8]:
    """Return the model's tokens [n, L] for training rows; leave its train/eval mode unchanged."""
    was_training = model.training
    model.eval()
    identifiers = torch.from_numpy(np.asarray(rows["puzzle_identifiers"])).long()
    puzzle_rows = model.puzzle_table[identifiers.to(model.puzzle_table.device)]
    config = EvaluationConfig(batch_size=batch_size)
    predicted = np.full(rows["inputs"].shape, PAD, np.uint8)
    for index, part in split_by_canvas(rows):
        tokens, _, _ = predict_tokens(model, part["inputs"], puzzle_rows[index], config)
        predicted[index, : tokens.shape[1]] = tokens
    model.train(was_training)
    return predicted


def exact_match(
    predicted: npt.NDArray[np.uint8], labels: npt.NDArray[Any]
) -> npt.NDArray[np.bool_]:
    """Return [n] bool: rows whose tokens match the labels at every position that is not PAD."""
    matches: npt.NDArray[np.bool_] = ((predicted == labels) | (labels == PAD)).all(axis=1)
    return matches
