"""From a checkpoint to predictions: every view of every test input is run and has one vote."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open
from torch import Tensor

from hybrid.arc import (
    Augmentation,
    Task,
    encode_grid,
    grid_to_string,
    halt_confidence,
    tokens_to_grid,
    vote,
)
from hybrid.checkpoint import Checkpoint
from hybrid.config import EvaluationConfig
from hybrid.dataset.stream import Rows
from hybrid.trm import TRM, TRMConfig

Prediction = dict[str, Any]
"""What is known of a task after solving it; plain values, written as predictions/{task}.json."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """All that a solver is told about a task: there is no answer in it to read."""

    task: Task
    views: tuple[Augmentation, ...]
    identifiers: range
    """Puzzle identifiers of the views; empty: the dataset is not the trained one, use the blank."""

    def __post_init__(self) -> None:
        assert all(pair.output is None for pair in self.task.test), "an answer in a question"


class Solver:
    """A trained TRM, its averaged weights in memory, its puzzle table on disk."""

    def __init__(
        self, checkpoint: Checkpoint, config: EvaluationConfig, device: torch.device
    ) -> None:
        self.config = config
        trm = replace(TRMConfig(**checkpoint.state["trm"]), num_puzzle_identifiers=1)
        self.model = TRM(trm)
        tensors = checkpoint.tensors("model") | checkpoint.tensors("average")
        missing, unknown = self.model.load_state_dict(tensors, strict=False)
        assert missing == ["puzzle_table"] and not unknown, (missing, unknown)
        self.model.to(device).eval()
        self._table = checkpoint.folder / "puzzle_table.safetensors"

    def solve(self, question: Question) -> Prediction:
        """Candidates for every test input of a task, best first, with what they cost."""
        started = time.perf_counter()
        canvas = int(self.model.config.seq_len**0.5)
        tests, views = question.task.test, question.views
        inputs = np.stack(
            [encode_grid(view.apply(test.input), canvas) for test in tests for view in views]
        )
        rows = self._puzzle_rows(question).repeat(len(tests), 1)
        tokens, halt_logits, act_steps = predict(self.model, inputs, rows, self.config)
        confidences = halt_confidence(halt_logits)
        found = []
        for first in range(0, len(inputs), len(views)):
            mine = slice(first, first + len(views))
            grids = [
                view.invert(tokens_to_grid(row))
                for view, row in zip(views, tokens[mine], strict=True)
            ]
            ranked = vote(grids, confidences[mine].tolist())
            found.append(
                {
                    "candidates": [
                        {
                            "grid": grid_to_string(candidate.grid).splitlines(),
                            "votes": candidate.votes,
                            "confidence": candidate.confidence,
                        }
                        for candidate in ranked
                    ],
                    "variants": len(views),
                    "empty": sum(grid.size == 0 for grid in grids),
                }
            )
        seconds = time.perf_counter() - started
        spent = {"rows": len(inputs), "act_steps": act_steps, "seconds": seconds}
        return {"task": question.task.id, "tests": found, "spent": spent}

    def _puzzle_rows(self, question: Question) -> Tensor:
        """[views, puzzle_emb_ndim]"""
        with safe_open(self._table, "pt") as file:
            table = file.get_slice("puzzle_table")
            if not question.identifiers:
                blank: Tensor = table[0:1]
                return blank.repeat(len(question.views), 1)
            rows: Tensor = table[question.identifiers.start : question.identifiers.stop]
            return rows


@torch.inference_mode()
def predict(
    model: TRM, inputs: npt.NDArray[np.uint8], puzzle_rows: Tensor, config: EvaluationConfig
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32], int]:
    """Tokens [n, L], halt logits [n] and ACT steps spent, for token rows [n, L].

    Every row starts afresh. A row that has had its last ACT step is taken out of the batch.
    """
    device = model.H_init.device
    tokens = np.empty(inputs.shape, np.uint8)
    halt_logits = np.empty(len(inputs), np.float32)
    spent = 0
    for first in range(0, len(inputs), config.batch_size):
        left = np.arange(first, min(first + config.batch_size, len(inputs)))
        batch = {"inputs": torch.from_numpy(inputs[left]).int().to(device)}
        rows = puzzle_rows[torch.from_numpy(left)].to(device)
        carry = model.initial_carry(batch)
        step = 0
        while len(left):
            carry, outputs = model.act_step(carry, batch, puzzle_rows=rows)
            step += 1
            spent += len(left)
            done = _done(step, outputs.q_halt.cpu().numpy(), model.config.halt_max_steps, config)
            tokens[left[done]] = outputs.logits.argmax(-1).to(torch.uint8).cpu().numpy()[done]
            halt_logits[left[done]] = outputs.q_halt.float().cpu().numpy()[done]
            if done.any():
                left = left[~done]
                keep = torch.from_numpy(np.flatnonzero(~done)).to(device)
                rows = rows[keep]
                batch = {name: value[keep] for name, value in batch.items()}
                carry = replace(
                    carry,
                    z_H=carry.z_H[keep],
                    z_L=carry.z_L[keep],
                    steps=carry.steps[keep],
                    halted=carry.halted[keep],
                    current={name: value[keep] for name, value in carry.current.items()},
                )
    return tokens, halt_logits, spent


def exact_accuracy(model: TRM, rows: Rows, batch_size: int) -> float:
    """Share of labelled rows that the model gets right in every scored position."""
    was_training = model.training
    model.eval()
    identifiers = torch.from_numpy(np.asarray(rows["puzzle_identifiers"])).long()
    puzzle_rows = model.puzzle_table[identifiers.to(model.puzzle_table.device)]
    config = EvaluationConfig(batch_size=batch_size)
    tokens, _, _ = predict(model, np.asarray(rows["inputs"], np.uint8), puzzle_rows, config)
    model.train(was_training)
    labels = np.asarray(rows["labels"])
    return float(((tokens == labels) | (labels == 0)).all(axis=1).mean())


def _done(
    step: int, q_halt: npt.NDArray[np.float32], most: int, config: EvaluationConfig
) -> npt.NDArray[np.bool_]:
    """[n]: whether a row has had its last ACT step; the answer plays no part in it."""
    if config.halt == "fixed":
        assert config.act_steps is not None
        most = config.act_steps
    last = np.full(len(q_halt), step >= most)
    return last | (q_halt > 0) if config.halt == "confident" else last
