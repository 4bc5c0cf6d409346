"""Predict with a trained hybrid: each variant makes its attempts and votes with the last one.

A prediction also holds the vote after every attempt, and a baseline: the same number of attempts
spent on more variants with one attempt each.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hybrid.arc import Augmentation, Grid, Pair, Task, grid_to_string, tokenize_grid
from hybrid.checkpoint import Checkpoint
from hybrid.config import Config, from_dict
from hybrid.device import compile_if_enabled
from hybrid.errors import UserError
from hybrid.evaluate.questions import Question
from hybrid.evaluate.records import Prediction, PromptRecord, Spent, VoteRecord
from hybrid.evaluate.trm_predictor import PuzzleTable, load_averaged, tally_votes
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
"""Candidates kept of the vote after each attempt, enough for pass@2."""


@dataclass(frozen=True, kw_only=True)
class AttemptRecord:
    """One attempt at one row."""

    tokens: npt.NDArray[np.uint8]
    grid: Grid
    """Predicted grid in the row's own orientation and colours."""
    confidence: float
    feedback: str
    reasoning: str
    llm_tokens: int
    """Tokens the language model processed; the first attempt includes the prompt's."""
    stopped: bool
    """True if feedback stopped the row (not if attempts ran out)."""


Records = dict["QuestionRow", list[AttemptRecord]]


@torch.no_grad()
def run_attempts(
    model: HybridModel,
    inputs: npt.NDArray[np.uint8],
    puzzle_rows: Tensor,
    prompts: Sequence[Prompt] | None,
    feedback_source: FeedbackSource,
    *,
    max_attempts: int,
    history: int,
) -> list[list[AttemptRecord]]:
    """Return up to `max_attempts` attempts for each of the token rows [n, L].

    `prompts`: one per row; None without a language model.
    """
    device = model.trm.H_init.device
    batch = {"inputs": torch.from_numpy(inputs).int().to(device)}
    cache, costs = None, [0] * len(inputs)
    if prompts and model.to_latent is not None:
        assert model.reader is not None
        cache = model.reader.prefill(prompts)
        costs = model.reader.caching_costs(prompts)
    records: list[list[AttemptRecord]] = [[] for _ in inputs]
    state = model.initial_state(batch, puzzle_rows.to(device), cache)
    for attempt in attempts(
        model, state, feedback_source, max_attempts=max_attempts, history=history
    ):
        reading = attempt.reading
        for n, (result, feedback) in enumerate(
            zip(attempt.results, attempt.feedbacks, strict=True)
        ):
            prompt_cost = costs[result.row] if attempt.number == 1 else 0
            records[result.row].append(
                AttemptRecord(
                    tokens=result.tokens,
                    grid=result.grid,
                    confidence=result.confidence,
                    feedback=feedback.text,
                    reasoning=reading.reasoning[n],
                    llm_tokens=prompt_cost + reading.llm_tokens[n],
                    stopped=feedback.stop,
                )
            )
    return records


@dataclass(frozen=True, kw_only=True)
class QuestionRow:
    """One row of a question: a variant of a test input or of the held-out demonstration."""

    variant: int
    """Index into the question's variants, spare ones after the others."""
    test: int | None
    """Index of the test input; None for the held-out demonstration."""


class HybridPredictor:
    """A trained hybrid: EMA weights in memory, puzzle table on disk, and its language model."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: Config,
        device: torch.device,
        reader: Reader | None = None,
    ) -> None:
        """`reader`: the language model of the checkpoint, if it is loaded already."""
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
        self.model = HybridModel(trm, reader, adapter, act_steps=steps, seed=0)
        load_averaged(self.model, checkpoint, only="" if reader else "trm.")
        self.model.to(device).eval()
        compile_if_enabled(trm, config.cluster.compiles)
        self.table = PuzzleTable(checkpoint)
        self.max_attempts = config.evaluation.max_attempts or trained.training.max_attempts

    def predict(self, question: Question) -> Prediction:
        """Return votes, votes after each attempt, baseline and cost for all tests of a task."""
        started = time.perf_counter()
        tests, variants = range(len(question.task.test)), range(len(question.variants))
        held_out = self.config.feedback.source == "demos"
        rows_per_variant = len(tests) + held_out
        size = max(1, self.config.evaluation.batch_size // rows_per_variant)
        if self.config.feedback.source == "vote":
            size = len(variants)  # the feedback compares all variants
        records: Records = {}
        for first in range(0, len(variants), size):
            rows = [
                QuestionRow(variant=variant, test=test)
                for variant in variants[first : first + size]
                for test in (*tests, *((None,) if held_out else ()))
            ]
            source = self._feedback_source(question, rows)
            records |= self._run_attempts(question, rows, source, self.max_attempts)
        prediction: Prediction = {
            "task": question.task.id,
            "oracle": question.answers is not None,
            "feedback": self.config.feedback.source,
            "tests": [self._vote(question, test, records) for test in tests],
            "prompt": self._prompt_record(question),
            "spent": {**self._spent(records), "seconds": time.perf_counter() - started},
        }
        if self.config.evaluation.baseline and self.max_attempts > 1:
            self._add_baseline(question, records, prediction)
        return prediction

    def _run_attempts(
        self,
        question: Question,
        rows: Sequence[QuestionRow],
        feedback_source: FeedbackSource,
        max_attempts: int,
    ) -> Records:
        table = self.table.rows(question, len(question.variants) + len(question.spare_variants))
        reader = self.model.reader
        records = run_attempts(
            self.model,
            np.stack([tokenize_grid(_input(question, row), question.side) for row in rows]),
            table[[row.variant for row in rows]],
            [reader.prompt(_problem(question, row)) for row in rows] if reader else None,
            feedback_source,
            max_attempts=max_attempts,
            history=self.config.feedback.history,
        )
        return dict(zip(rows, records, strict=True))

    def _spent(self, records: Records) -> Spent:
        made = [record for row in records.values() for record in row]
        return {
            "rows": len(records),
            "attempts": len(made),
            "act_steps": self.model.act_steps * len(made),
            "llm_tokens": sum(record.llm_tokens for record in made),
        }

    def _add_baseline(self, question: Question, records: Records, prediction: Prediction) -> None:
        """Spend the attempts of self-correction on as many variants, one attempt each.

        The first variants reuse the first attempt of self-correction. Fewer vote if the dataset
        has no more.
        """
        tests = range(len(question.task.test))
        used = sum(map(len, records.values()))
        wanted = max(len(question.variants), used // len(tests))
        available = min(wanted, len(question.variants) + len(question.spare_variants))
        single = {row: made[:1] for row, made in records.items() if row.test is not None}
        size = max(1, self.config.evaluation.batch_size // len(tests))
        for first in range(len(question.variants), available, size):
            variants = range(first, min(first + size, available))
            rows = [QuestionRow(variant=v, test=test) for v in variants for test in tests]
            single |= self._run_attempts(question, rows, NoFeedback(), 1)
        for test, vote in zip(tests, prediction["tests"], strict=True):
            vote["baseline"] = {
                "candidates": _tally(question, test, single, 1)["candidates"][:CURVE_CANDIDATES],
                "views": available,
                "wanted": wanted,
            }
        prediction["baseline_spent"] = self._spent(single)

    def _feedback_source(self, question: Question, rows: Sequence[QuestionRow]) -> FeedbackSource:
        feedback = self.config.feedback
        if feedback.source == "confidence":
            return Confidence(feedback)
        variants = [question.variants[row.variant] for row in rows]
        if feedback.source == "vote":
            return Vote(feedback, [row.test or 0 for row in rows], variants)
        if feedback.source == "demos":
            assert question.held_out is not None and question.held_out.output is not None
            partners = {row.variant: n for n, row in enumerate(rows) if row.test is None}
            outputs = {n: variants[n].apply(question.held_out.output) for n in partners.values()}
            return Demos(feedback, [partners[row.variant] for row in rows], outputs)
        if feedback.source == "oracle":
            assert question.answers is not None
            answers = [
                variant.apply(question.answers[row.test or 0])
                for variant, row in zip(variants, rows, strict=True)
            ]
            return Oracle(feedback, answers)
        return NoFeedback()

    def _vote(self, question: Question, test: int, records: Records) -> VoteRecord:
        curve = [_tally(question, test, records, n) for n in range(1, self.max_attempts + 1)]
        original = question.variants[0]
        return {
            **curve[-1],
            "curve": [vote["candidates"][:CURVE_CANDIDATES] for vote in curve],
            "attempts": [
                {
                    "grid": grid_to_string(original.invert(record.grid)).splitlines(),
                    "confidence": record.confidence,
                    "feedback": record.feedback,
                    "reasoning": record.reasoning,
                    "stopped": record.stopped,
                }
                for record in records[QuestionRow(variant=0, test=test)]
            ],
        }

    def _prompt_record(self, question: Question) -> PromptRecord | None:
        """Return the demonstrations that fit into the prompts of the original variant."""
        if not self.model.reader:
            return None
        prompts = [
            self.model.reader.prompt(_problem(question, QuestionRow(variant=0, test=test)))
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
    """Open the checkpoint's language model; raise UserError if llama.model is another one."""
    given = config.llama
    try:
        llama = replace(
            trained.llama,
            model=given.model,
            revision=given.revision,
            dtype=given.dtype,
            batch_size=given.batch_size,
            max_new_tokens=given.max_new_tokens,
            prompt_cache=given.prompt_cache,
        )
    except ValueError as error:
        raise UserError(f"llama.{error} (with the settings of {checkpoint.folder})") from None
    reader = open_reader(
        llama, device, models=config.models_folder, prompt_cache=config.prompt_cache_folder
    )
    recorded = checkpoint.state["llama"]
    if trained.llama.frozen:
        same = recorded["fingerprint"] == reader.backbone.fingerprint()
    else:  # the weights come from the checkpoint, so only their shapes must match
        decoder = reader.backbone.model.model.named_parameters(prefix="llama")
        ema = checkpoint.tensors("ema")
        shapes = {name: value.shape for name, value in ema.items() if name.startswith("llama.")}
        same = shapes == {name: value.shape for name, value in decoder}
    if not same:
        raise UserError(
            f"llama.model: {given.model} is not the model that {checkpoint.folder} was trained with"
            f" ({recorded['model']}, revision {recorded['revision']})"
        )
    return reader


def _input(question: Question, row: QuestionRow) -> Grid:
    """Return the input grid of a row, augmented."""
    pair = question.held_out if row.test is None else question.task.test[row.test]
    assert pair is not None
    return _augmentation(question, row).apply(pair.input)


def _problem(question: Question, row: QuestionRow) -> Task:
    """Return the problem the language model reads for a row; another task's if shuffled."""
    task = question.task
    pair = question.held_out if row.test is None else task.test[row.test]
    assert pair is not None
    if question.read_instead is not None:
        task = question.read_instead
        pair = task.test[0]
    problem = Task(id=task.id, train=task.train, test=(Pair(input=pair.input, output=None),))
    return replace(_augmentation(question, row), task=task.id).apply_task(problem)


def _augmentation(question: Question, row: QuestionRow) -> Augmentation:
    return (question.variants + question.spare_variants)[row.variant]


def _tally(question: Question, test: int, records: Records, number: int) -> VoteRecord:
    """Return the vote on a test after attempt `number`; stopped rows vote with their last one."""
    grids, confidences = [], []
    for row, made in records.items():
        if row.test == test:
            record = made[min(number, len(made)) - 1]
            grids.append(_augmentation(question, row).invert(record.grid))
            confidences.append(record.confidence)
    return tally_votes(grids, confidences)
