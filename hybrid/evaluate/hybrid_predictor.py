"""From a trained hybrid to predictions: every view makes its attempts, the last of each votes.

Beside the vote after the last attempt stands the vote after each one, and the baseline: the same
number of attempts, spent on more views with one attempt each.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hybrid.arc import Augmentation, Grid, Pair, Task, grid_to_string, tokenize_grid
from hybrid.checkpoint import Checkpoint
from hybrid.config import Config, from_dict
from hybrid.device import fuse
from hybrid.errors import UserError
from hybrid.evaluate.questions import Question
from hybrid.evaluate.trm_predictor import Prediction, PuzzleTable, load_averaged, tally_votes
from hybrid.llm import Prompt, Reader, open_reader
from hybrid.solver import (
    Confidence,
    Demos,
    FeedbackSource,
    HybridModel,
    NoFeedback,
    Oracle,
    Vote,
    attempts,
)
from hybrid.trm import TRM, TRMConfig

CURVE_CANDIDATES = 2
"""Candidates kept of the vote after each attempt: what pass@2 needs."""


@dataclass(frozen=True, kw_only=True)
class AttemptRecord:
    """One attempt at one row."""

    tokens: npt.NDArray[np.uint8]
    grid: Grid
    """In the row's own orientation and colours."""
    confidence: float
    feedback: str
    reasoning: str
    llm_tokens: int
    """Tokens the language model took; in the first attempt with those of the problem."""
    stopped: bool
    """By the feedback; the last attempt that is allowed ends a row as well."""


@torch.no_grad()
def run_attempts(
    solver: HybridModel,
    inputs: npt.NDArray[np.uint8],
    puzzle_rows: Tensor,
    prompts: Sequence[Prompt] | None,
    judge: FeedbackSource,
    *,
    most: int,
    history: int,
) -> list[list[AttemptRecord]]:
    """Up to `most` attempts at token rows [n, L], per row; `prompts` of them if somebody reads."""
    device = solver.trm.H_init.device
    batch = {"inputs": torch.from_numpy(inputs).int().to(device)}
    encoding, costs = None, [0] * len(inputs)
    if prompts and solver.to_latent is not None:
        assert solver.reader is not None
        encoding = solver.reader.prefill(prompts)
        costs = solver.reader.caching_costs(prompts)
    turns: list[list[AttemptRecord]] = [[] for _ in inputs]
    begun = solver.begin(batch, puzzle_rows.to(device), encoding)
    for attempt in attempts(solver, begun, judge, most=most, history=history):
        reading = attempt.reading
        for n, (seen, feedback) in enumerate(zip(attempt.seen, attempt.feedbacks, strict=True)):
            before = costs[seen.row] if attempt.number == 1 else 0
            turns[seen.row].append(
                AttemptRecord(
                    tokens=seen.tokens,
                    grid=seen.grid,
                    confidence=seen.confidence,
                    feedback=feedback.text,
                    reasoning=reading.reasoning[n],
                    llm_tokens=before + reading.llm_tokens[n],
                    stopped=feedback.stop,
                )
            )
    return turns


@dataclass(frozen=True, kw_only=True)
class QuestionRow:
    """One row of a question."""

    view: int
    """Number of the view, spare ones behind the others."""
    test: int | None
    """Number of the test input; None asks the held-out demonstration."""


class HybridPredictor:
    """A trained hybrid: averaged weights in memory, puzzle table on disk, its language model."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: Config,
        device: torch.device,
        reader: Reader | None = None,
    ) -> None:
        """`reader`: the language model that it was trained with, where it is open already."""
        self.config = config
        trained = from_dict(checkpoint.state["config"])
        adapter = trained.adapter
        if config.adapter.inject == "none":
            adapter = replace(adapter, inject="none")
        if adapter.inject == "none":
            reader = None
        elif reader is None:
            reader = _reader(checkpoint, config, trained, device)
        trm = TRM(replace(TRMConfig(**checkpoint.state["trm"]), num_puzzle_identifiers=1))
        steps = trained.training.act_steps
        self.solver = HybridModel(trm, reader, adapter, act_steps=steps, seed=0)
        load_averaged(self.solver, checkpoint, only="" if reader else "trm.")
        self.solver.to(device).eval()
        fuse(trm, config.cluster.compiles)
        self.table = PuzzleTable(checkpoint)
        self.most = config.evaluation.max_attempts or trained.training.max_attempts

    def solve(self, question: Question) -> Prediction:
        """See `Solver.solve`; also the curve over attempts, the attempts, and the baseline."""
        started = time.perf_counter()
        tests, views = range(len(question.task.test)), range(len(question.views))
        held_out = self.config.feedback.source == "demos"
        per_view = len(tests) + held_out
        size = max(1, self.config.evaluation.batch_size // per_view)
        if self.config.feedback.source == "vote":
            size = len(views)  # they look at each other
        turns: dict[QuestionRow, list[AttemptRecord]] = {}
        for first in range(0, len(views), size):
            asked = [
                QuestionRow(view=view, test=test)
                for view in views[first : first + size]
                for test in (*tests, *((None,) if held_out else ()))
            ]
            turns |= self._run_attempts(question, asked, self._judge(question, asked), self.most)
        prediction: Prediction = {
            "task": question.task.id,
            "oracle": question.answers is not None,
            "feedback": self.config.feedback.source,
            "tests": [self._test(question, test, turns) for test in tests],
            "prompt": self._prompt_report(question),
            "spent": {**self._spent(turns), "seconds": time.perf_counter() - started},
        }
        if self.config.evaluation.baseline and self.most > 1:
            self._baseline(question, turns, prediction)
        return prediction

    def _run_attempts(
        self, question: Question, asked: Sequence[QuestionRow], judge: FeedbackSource, most: int
    ) -> dict[QuestionRow, list[AttemptRecord]]:
        table = self.table.rows(question, len(question.views) + len(question.spare_views))
        reader = self.solver.reader
        played = run_attempts(
            self.solver,
            np.stack([tokenize_grid(_input(question, one), question.side) for one in asked]),
            table[[one.view for one in asked]],
            [reader.prompt(_problem(question, one)) for one in asked] if reader else None,
            judge,
            most=most,
            history=self.config.feedback.history,
        )
        return dict(zip(asked, played, strict=True))

    def _spent(self, turns: dict[QuestionRow, list[AttemptRecord]]) -> dict[str, int]:
        made = [turn for row in turns.values() for turn in row]
        return {
            "rows": len(turns),
            "attempts": len(made),
            "act_steps": self.solver.act_steps * len(made),
            "llm_tokens": sum(turn.llm_tokens for turn in made),
        }

    def _baseline(
        self,
        question: Question,
        turns: dict[QuestionRow, list[AttemptRecord]],
        prediction: Prediction,
    ) -> None:
        """As many attempts as were used, one a view, on as many views as there are.

        Its first views are the ones that self-correction began with.
        """
        tests = range(len(question.task.test))
        used = sum(map(len, turns.values()))
        wanted = max(len(question.views), used // len(tests))
        there = min(wanted, len(question.views) + len(question.spare_views))
        alone = {one: made[:1] for one, made in turns.items() if one.test is not None}
        size = max(1, self.config.evaluation.batch_size // len(tests))
        for first in range(len(question.views), there, size):
            views = range(first, min(first + size, there))
            asked = [QuestionRow(view=view, test=test) for view in views for test in tests]
            alone |= self._run_attempts(question, asked, NoFeedback(), 1)
        for test, found in zip(tests, prediction["tests"], strict=True):
            counted = _count(question, test, alone, 1)
            found["baseline"] = {
                "candidates": counted["candidates"][:CURVE_CANDIDATES],
                "views": there,
                "wanted": wanted,
            }
        prediction["baseline_spent"] = self._spent(alone)

    def _judge(self, question: Question, asked: Sequence[QuestionRow]) -> FeedbackSource:
        feedback = self.config.feedback
        if feedback.source == "confidence":
            return Confidence(feedback)
        views = [question.views[one.view] for one in asked]
        if feedback.source == "vote":
            return Vote(feedback, [one.test or 0 for one in asked], views)
        if feedback.source == "demos":
            assert question.held_out is not None and question.held_out.output is not None
            places = {one.view: n for n, one in enumerate(asked) if one.test is None}
            outputs = {n: views[n].apply(question.held_out.output) for n in places.values()}
            return Demos(feedback, [places[one.view] for one in asked], outputs)
        if feedback.source == "oracle":
            assert question.answers is not None
            answers = [
                view.apply(question.answers[one.test or 0])
                for view, one in zip(views, asked, strict=True)
            ]
            return Oracle(feedback, answers)
        return NoFeedback()

    def _test(
        self, question: Question, test: int, turns: dict[QuestionRow, list[AttemptRecord]]
    ) -> dict[str, Any]:
        curve = [_count(question, test, turns, number) for number in range(1, self.most + 1)]
        view = question.views[0]
        return {
            **curve[-1],
            "curve": [c["candidates"][:CURVE_CANDIDATES] for c in curve],
            "attempts": [
                {
                    "grid": grid_to_string(view.invert(turn.grid)).splitlines(),
                    "confidence": turn.confidence,
                    "feedback": turn.feedback,
                    "reasoning": turn.reasoning,
                    "stopped": turn.stopped,
                }
                for turn in turns[QuestionRow(view=0, test=test)]
            ],
        }

    def _prompt_report(self, question: Question) -> dict[str, int] | None:
        """How much of the problem the language model was shown, in the original view."""
        if not self.solver.reader:
            return None
        prompts = [
            self.solver.reader.prompt(_problem(question, QuestionRow(view=0, test=test)))
            for test in range(len(question.task.test))
        ]
        return {
            "demonstrations": prompts[0].demonstrations,
            "shown": min(prompt.shown for prompt in prompts),
            "tokens": max(len(prompt.tokens) for prompt in prompts),
        }


def _reader(
    checkpoint: Checkpoint, config: Config, trained: Config, device: torch.device
) -> Reader:
    """The language model that the hybrid was trained with, wherever it lies on this machine."""
    here = config.llama
    try:
        llama = replace(
            trained.llama,
            model=here.model,
            revision=here.revision,
            dtype=here.dtype,
            batch_size=here.batch_size,
            max_new_tokens=here.max_new_tokens,
            prompt_cache=here.prompt_cache,
        )
    except ValueError as error:
        raise UserError(f"llama.{error}, as {checkpoint.folder} was trained") from None
    reader = open_reader(
        llama, device, models=config.models_folder, prompt_cache=config.prompt_cache_folder
    )
    known = checkpoint.state["llama"]
    if trained.llama.frozen:
        same = known["fingerprint"] == reader.backbone.fingerprint()
    else:  # its weights are in the checkpoint, and need a place
        decoder = reader.backbone.model.model.named_parameters(prefix="llama")
        kept = checkpoint.tensors("ema")
        shapes = {name: value.shape for name, value in kept.items() if name.startswith("llama.")}
        same = shapes == {name: value.shape for name, value in decoder}
    if not same:
        raise UserError(
            f"llama.model: {here.model} is not the model that {checkpoint.folder} was trained with"
            f" ({known['model']}, revision {known['revision']})"
        )
    return reader


def _input(question: Question, one: QuestionRow) -> Grid:
    """The input grid of a row, in its view."""
    pair = question.held_out if one.test is None else question.task.test[one.test]
    assert pair is not None
    return _view(question, one).apply(pair.input)


def _problem(question: Question, one: QuestionRow) -> Task:
    """What the language model is shown of a row; in the ablation another task's problem."""
    shown, view = question.task, _view(question, one)
    asked = question.held_out if one.test is None else shown.test[one.test]
    assert asked is not None
    if question.read_instead is not None:
        shown = question.read_instead
        asked = shown.test[0]
    problem = Task(id=shown.id, train=shown.train, test=(Pair(input=asked.input, output=None),))
    return replace(view, task=shown.id).apply_task(problem)


def _view(question: Question, one: QuestionRow) -> Augmentation:
    return (question.views + question.spare_views)[one.view]


def _count(
    question: Question, test: int, turns: dict[QuestionRow, list[AttemptRecord]], number: int
) -> dict[str, Any]:
    """The vote on a test after attempt `number`; rows that had stopped vote with their last."""
    grids, confidences = [], []
    for one, made in turns.items():
        if one.test == test:
            turn = made[min(number, len(made)) - 1]
            grids.append(_view(question, one).invert(turn.grid))
            confidences.append(turn.confidence)
    return tally_votes(grids, confidences)
