"""A vote over views, from question to candidates: the plain way, ours, and ours on small canvases.

    python -m benchmarks.vote [--tasks N] [--views N]

Real ARC-1 evaluation tasks, evenly chosen; a model of the medium size with random weights, four
ACT steps: what it answers is of no interest, what it costs is. The plain way puts every view on the
full canvas and runs the plain model through all ACT steps. Writes benchmarks/results/vote.json.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from benchmarks.measure import faster, in_turns, record, table
from benchmarks.plain import PlainTrainer, PlainTRM
from hybrid.arc import tokenize_grid, tokens_to_grid, vote
from hybrid.config import EvaluationConfig
from hybrid.dataset import DataConfig, Dataset, prepare
from hybrid.evaluate.questions import Question
from hybrid.evaluate.trm_predictor import TRMPredictor
from hybrid.trm import TRM, TRMConfig

MODEL = TRMConfig(
    hidden_size=256, num_heads=8, puzzle_emb_ndim=256, halt_max_steps=4, num_puzzle_identifiers=1
)
CANVASES: tuple[Literal["full", "bucketed"], ...] = ("full", "bucketed")
ROUNDS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", type=int, default=4)
    parser.add_argument("--views", type=int, default=2)
    asked = parser.parse_args()
    trm = TRM(MODEL, seed=0).eval()
    plain = PlainTRM(MODEL)
    plain.load_state_dict(trm.state_dict())
    trainer = PlainTrainer(plain, batch_size=1)
    with tempfile.TemporaryDirectory() as folder:
        full, bucketed = (
            questions(Path(folder), canvas, asked.tasks, asked.views) for canvas in CANVASES
        )
    solver = predictor_of(trm)
    seconds = in_turns(
        {
            "plain, full canvas": lambda: [plain_vote(trainer, question) for question in full],
            "ours, full canvas": lambda: [solver.solve(question) for question in full],
            "ours, bucketed": lambda: [solver.solve(question) for question in bucketed],
        },
        rounds=ROUNDS,
    )
    first = next(iter(seconds.values()))
    views = sum(len(question.views) * len(question.task.test) for question in full)
    rows = [
        {
            "side": side,
            "views": views,
            "s": round(statistics.median(took), 2),
            "times plain": faster(first, took),
        }
        for side, took in seconds.items()
    ]
    print(table(rows))
    record("vote", rows)


def questions(
    root: Path, canvas: Literal["full", "bucketed"], tasks: int, views: int
) -> list[Question]:
    """Evenly chosen tasks of ARC-1's evaluation set."""
    config = DataConfig(training=(), evaluation=("arc1-evaluation",), variants=views - 1)
    prepare(replace(config, canvas=canvas), root / canvas, say=lambda line: None)
    dataset = Dataset.open(root / canvas)
    chosen = np.linspace(0, len(dataset.evaluated) - 1, tasks).astype(int)
    found = []
    for task in (dataset.evaluated[n] for n in chosen):
        first = int(dataset.first_variant[task])
        found.append(
            Question(
                task=dataset.tasks[task],
                side=int(dataset.sides[task]),
                views=tuple(dataset.augmentation(v) for v in range(first, first + views)),
                # Of its own, so that views that look alike are asked all the same.
                identifiers=range(1, views + 1),
            )
        )
    return found


class Blank:
    """Puzzle rows of nobody, in place of a checkpoint's table."""

    def rows(self, question: Question, views: int) -> torch.Tensor:
        return torch.zeros(views, MODEL.puzzle_emb_ndim)


def predictor_of(trm: TRM) -> TRMPredictor:
    """A solver without a checkpoint: of these weights."""
    solver = TRMPredictor.__new__(TRMPredictor)
    solver.config = EvaluationConfig()
    solver.model = trm
    solver.table = Blank()  # type: ignore[assignment]
    return solver


def plain_vote(trainer: PlainTrainer, question: Question) -> list[Any]:
    """Candidates of each test input."""
    found = []
    for test in question.task.test:
        rows = [tokenize_grid(view.apply(test.input), 30) for view in question.views]
        inputs = torch.from_numpy(np.stack(rows)).int()
        nobody = torch.zeros(len(inputs), dtype=torch.int32)
        batch = {"inputs": inputs, "labels": inputs, "puzzle_identifiers": nobody}
        tokens, q_halt = trainer.evaluate(batch)
        grids = [
            view.invert(tokens_to_grid(row))
            for view, row in zip(question.views, tokens.numpy(), strict=True)
        ]
        found.append(vote(grids, q_halt.sigmoid().tolist()))
    return found


if __name__ == "__main__":
    main()
