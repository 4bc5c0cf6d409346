"""The JSON records of an evaluation: predictions and results, with their readers and writers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from hybrid import storage
from hybrid.arc import Task

Spent = dict[str, float]
"""Cost: rows, act_steps, llm_tokens, seconds; of a hybrid also attempts."""


class CandidateRecord(TypedDict):
    """A distinct predicted grid of a test input and its votes."""

    grid: list[str]
    """One string of digits per grid row."""
    votes: int
    confidence: float


class AttemptEntry(TypedDict):
    """One self-correction attempt of the original variant."""

    grid: list[str]
    confidence: float
    feedback: str
    reasoning: str
    stopped: bool


class BaselineVote(TypedDict):
    """The vote of the baseline: the attempts spent on more variants, one attempt each."""

    candidates: list[CandidateRecord]
    views: int
    """Variants that voted."""
    wanted: int
    """Variants needed to match the attempts of self-correction."""


class VoteRecord(TypedDict):
    """The vote on one test input, best candidate first; `curve` and below: hybrid only."""

    candidates: list[CandidateRecord]
    variants: int
    empty: int
    """Variants that predicted no grid."""
    curve: NotRequired[list[list[CandidateRecord]]]
    """The best candidates after each attempt."""
    attempts: NotRequired[list[AttemptEntry]]
    baseline: NotRequired[BaselineVote]


class PromptRecord(TypedDict):
    """Demonstrations of a task, those shown to the language model, and the prompt's tokens."""

    demonstrations: int
    shown: int
    tokens: int


class Prediction(TypedDict):
    """The prediction for one task, stored as predictions/{task}.json."""

    task: str
    tests: list[VoteRecord]
    spent: Spent
    oracle: NotRequired[bool]
    feedback: NotRequired[str]
    prompt: NotRequired[PromptRecord | None]
    baseline_spent: NotRequired[Spent]


class RateRecord(TypedDict):
    """A rate with its 95% Wilson interval."""

    numerator: float
    denominator: int
    value: float
    low: float
    high: float


class ScoreRecord(TypedDict):
    """The three scores of `hybrid.arc.Scores`."""

    outputs: RateRecord
    task_mean: RateRecord
    tasks: RateRecord


PassScores = TypedDict("PassScores", {"pass@1": ScoreRecord, "pass@2": ScoreRecord})


class CurvePoint(PassScores):
    """Scores after one attempt; `trying`: tests whose original variant made it."""

    attempt: int
    trying: int


class BaselineResult(PassScores):
    """Scores and cost of the baseline; variants summed over tests."""

    views: int
    wanted: int
    spent: Spent


class Comparison(TypedDict):
    """Scores of another run's evaluation of the same questions."""

    run: str
    title: str
    oracle: bool
    scores: NotRequired[PassScores]
    spent: Spent


OutputResult = TypedDict(
    "OutputResult",
    {
        "right@1": bool | None,
        "right@2": bool | None,
        "right_rank": int | None,
        "candidates": int,
    },
)


class TaskResult(TypedDict):
    """Correctness of one task; None where the test outputs are unknown."""

    id: str
    solved: bool | None
    outputs: list[OutputResult]


QuestionsKey = TypedDict(
    "QuestionsKey", {"evaluated": str, "test outputs evaluated": int, "dataset fingerprint": str}
)
TRMProtocol = TypedDict(
    "TRMProtocol",
    {
        "sources": str,
        "training data": str,
        "puzzle ids": str,
        "attempts scored": str,
        "variants voting": int | str,
        "vote": str,
        "canvas": str,
        "halting": str,
        "weights": str,
        "computed on": str,
        "checkpoint": str,
        "checkpoint digest": str,
    },
)
HybridProtocol = TypedDict(
    "HybridProtocol",
    {
        "attempts": str,
        "feedback": str,
        "trained with feedback": str,
        "language model": str,
        "text": str,
        "prompts": str,
        "latent into": str,
    },
    total=False,
)


class Protocol(QuestionsKey, TRMProtocol, HybridProtocol):
    """The settings a reader needs to compare the scores with other results."""


class Results(TypedDict):
    """The content of results.json; scores only where the test outputs are known."""

    title: str
    oracle: bool
    feedback: str | None
    protocol: Protocol
    spent: Spent
    notes: list[str]
    tasks: list[TaskResult]
    scores: NotRequired[PassScores]
    coverage: NotRequired[dict[str, RateRecord]]
    curve: NotRequired[list[CurvePoint]]
    baseline: NotRequired[BaselineResult]
    compare_to: NotRequired[list[Comparison]]


def write_prediction(folder: Path, prediction: Prediction) -> None:
    """Write predictions/{task}.json of an evaluation folder and upload it."""
    write_json(folder / "predictions" / f"{prediction['task']}.json", prediction)


def read_prediction(folder: Path, task: Task) -> Prediction | None:
    """Download and return a task's prediction; None if it is missing or incomplete."""
    path = folder / "predictions" / f"{task.id}.json"
    storage.download(path)
    try:
        found: Prediction = json.loads(path.read_text())
        complete = found["task"] == task.id and len(found["tests"]) == len(task.test)
        complete &= "spent" in found and all("candidates" in test for test in found["tests"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if complete else None


def write_results(folder: Path, results: Results) -> None:
    """Write results.json of an evaluation folder and upload it."""
    write_json(folder / "results.json", results)


def read_results(folder: Path) -> Results | None:
    """Download and return results.json of an evaluation folder; None if there is none."""
    path = folder / "results.json"
    storage.download(path)
    if not path.exists():
        return None
    found: Results = json.loads(path.read_text())
    return found


def write_json(path: Path, value: Any) -> None:
    """Write a value as one line of JSON, atomically, and upload it."""
    storage.write(path, json.dumps(value) + "\n")
