"""Time of a vote over variants, from question to candidates: plain, ours, ours on small canvases.

    python -m benchmarks.vote [--tasks N] [--variants N]

Evenly spaced ARC-1 evaluation tasks and a model of the medium size with random weights and four ACT
steps; only the time matters. The plain side puts every variant on the full canvas and runs the
plain model for all ACT steps. Writes benchmarks/results/vote.json.
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
    parser.add_argument("--variants", type=int, default=2)
    arguments = parser.parse_args()
    trm = TRM(MODEL, seed=0).eval()
    plain = PlainTRM(MODEL)
    plain.load_state_dict(trm.state_dict())
    trainer = PlainTrainer(plain, batch_size=1)
    with tempfile.TemporaryDirectory() as folder:
        full, bucketed = (
            questions(Path(folder), canvas, arguments.tasks, arguments.variants)
            for canvas in CANVASES
        )
    predictor = trm_predictor(trm)
    seconds = in_turns(
        {
            "plain, full canvas": lambda: [plain_vote(trainer, question) for question in full],
            "ours, full canvas": lambda: [predictor.predict(question) for question in full],
            "ours, bucketed": lambda: [predictor.predict(question) for question in bucketed],
        },
        rounds=ROUNDS,
    )
    first = next(iter(seconds.values()))
    variants = sum(len(question.variants) * len(question.task.test) for question in full)
    rows = [
        {
            "side": side,
            "views": variants,
            "s": round(statistics.median(took), 2),
            "times plain": faster(first, took),
        }
        for side, took in seconds.items()
    ]
    print(table(rows))
    record("vote", rows)


def questions(
    root: Path, canvas: Literal["full", "bucketed"], tasks: int, variants: int
) -> list[Question]:
    """Return questions of evenly spaced tasks of ARC-1's evaluation set."""
    config = DataConfig(training=(), evaluation=("arc1-evaluation",), variants=variants - 1)
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
                variants=tuple(dataset.augmentation(v) for v in range(first, first + variants)),
                # Distinct, so that identical variants are not merged.
                identifiers=range(1, variants + 1),
            )
        )
    return found


class BlankTable:
    """Zero puzzle embeddings, in place of a checkpoint's table."""

    def rows(self, question: Question, variants: int) -> torch.Tensor:
        return torch.zeros(variants, MODEL.puzzle_emb_ndim)


def trm_predictor(trm: TRM) -> TRMPredictor:
    """Return a predictor with these weights, without a checkpoint."""
    predictor = TRMPredictor.__new__(TRMPredictor)
    predictor.config = EvaluationConfig()
    predictor.model = trm
    predictor.table = BlankTable()  # type: ignore[assignment]
    return predictor


def plain_vote(trainer: PlainTrainer, question: Question) -> list[Any]:
    """Return the candidates of each test input."""
    found = []
    for test in question.task.test:
        rows = [tokenize_grid(variant.apply(test.input), 30) for variant in question.variants]
        inputs = torch.from_numpy(np.stack(rows)).int()
        blank = torch.zeros(len(inputs), dtype=torch.int32)
        batch = {"inputs": inputs, "labels": inputs, "puzzle_identifiers": blank}
        tokens, q_halt = trainer.evaluate(batch)
        grids = [
            variant.invert(tokens_to_grid(row))
            for variant, row in zip(question.variants, tokens.numpy(), strict=True)
        ]
        found.append(vote(grids, q_halt.sigmoid().tolist()))
    return found


if __name__ == "__main__":
    main()
