"""Score the predictions of an evaluation against the true test outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np

from hybrid import storage
from hybrid.arc import Grid, Pair, Rate, Scores, Task, grid_hash, pair_hash, score, string_to_grid
from hybrid.checkpoint import Checkpoint
from hybrid.config import Config
from hybrid.dataset import Dataset
from hybrid.evaluate.records import (
    BaselineResult,
    CandidateRecord,
    CurvePoint,
    HybridProtocol,
    OutputResult,
    PassScores,
    Prediction,
    Protocol,
    QuestionsKey,
    RateRecord,
    Results,
    ScoreRecord,
    Spent,
    TaskResult,
    VoteRecord,
)

COVERAGE = (1, 2, 5, 10, 100, 1000)
Ranked = Mapping[str, Sequence[Sequence[Grid]]]
"""Candidate grids, best first, per test input of a task."""


def score_predictions(
    config: Config,
    dataset: Dataset,
    checkpoint: Checkpoint,
    tasks: Sequence[Task],
    predictions: Mapping[str, Prediction],
) -> Results:
    """Return the content of results.json, independent of the order predictions arrived in.

    `tasks`: the evaluated tasks with their test outputs; one without a prediction counts as wrong.
    """
    ranked = _ranked(tasks, predictions, lambda test: test["candidates"])
    hybrid = checkpoint.state["kind"] == "hybrid"
    scorable = all(pair.output is not None for task in tasks for pair in task.test)
    missing = [task.id for task in tasks if task.id not in predictions]
    notes = [f"no prediction for {', '.join(missing)}: counted as wrong"] if missing else []
    if not scorable:
        notes.append("the answers are not known: nothing is scored")
    results: Results = {
        "title": f"{config.logging.run}, {checkpoint.name}",
        "oracle": hybrid and config.feedback.source == "oracle",
        "feedback": config.feedback.source if hybrid else None,
        "protocol": protocol(config, dataset, checkpoint, tasks, predictions),
        "spent": _total([prediction["spent"] for prediction in predictions.values()]),
        "notes": notes,
        "tasks": [_task_result(task, ranked.get(task.id, [])) for task in tasks],
    }
    if scorable:
        results["scores"] = _pass_scores(tasks, ranked)
        results["coverage"] = {str(k): _rate(score(tasks, ranked, k).outputs) for k in COVERAGE}
        if hybrid:
            _add_self_correction(results, tasks, predictions)
    return results


def _add_self_correction(
    results: Results, tasks: Sequence[Task], predictions: Mapping[str, Prediction]
) -> None:
    """Add the score after each attempt, and the score of as many attempts spent on voting."""
    tests = [test for prediction in predictions.values() for test in prediction["tests"]]

    def scores(candidates: Callable[[VoteRecord], Sequence[CandidateRecord]]) -> PassScores:
        return _pass_scores(tasks, _ranked(tasks, predictions, candidates))

    max_attempts = max((len(test["curve"]) for test in tests), default=0)
    curve: list[CurvePoint] = [
        {
            "attempt": index + 1,
            "trying": sum(len(test["attempts"]) > index for test in tests),
            **scores(partial(_after_attempt, index)),
        }
        for index in range(max_attempts)
    ]
    results["curve"] = curve
    if max_attempts > 1 and all("baseline" in test for test in tests):
        baseline: BaselineResult = {
            **scores(lambda test: test["baseline"]["candidates"]),
            "views": sum(test["baseline"]["views"] for test in tests),
            "wanted": sum(test["baseline"]["wanted"] for test in tests),
            "spent": _total([prediction["baseline_spent"] for prediction in predictions.values()]),
        }
        results["baseline"] = baseline


def _after_attempt(index: int, test: VoteRecord) -> Sequence[CandidateRecord]:
    return test["curve"][min(index, len(test["curve"]) - 1)]


def _ranked(
    tasks: Sequence[Task],
    predictions: Mapping[str, Prediction],
    candidates: Callable[[VoteRecord], Sequence[CandidateRecord]],
) -> Ranked:
    return {
        task.id: [_grids(candidates(test)) for test in predictions[task.id]["tests"]]
        for task in tasks
        if task.id in predictions
    }


def _total(costs: Sequence[Spent]) -> Spent:
    total: Spent = {}
    for cost in costs:
        for name, value in cost.items():
            total[name] = total.get(name, 0) + value
    return total


def questions_key(dataset: Dataset, tasks: Sequence[Task]) -> QuestionsKey:
    """Return the protocol entries that are equal for evaluations of the same questions."""
    available = dataset.meta["evaluation"]["of"]
    counts = f"{len(tasks)} of {available} tasks"
    subset = f"a subset: {counts} (canvas of side {dataset.canvas})"
    return {
        "evaluated": counts if len(tasks) == available else subset,
        "test outputs evaluated": sum(len(task.test) for task in tasks),
        "dataset fingerprint": dataset.fingerprint[:16],
    }


def protocol(
    config: Config,
    dataset: Dataset,
    checkpoint: Checkpoint,
    tasks: Sequence[Task],
    predictions: Mapping[str, Prediction],
) -> Protocol:
    """Return the settings a reader needs to compare the scores with other results."""
    key = questions_key(dataset, tasks)
    halting = {
        "published": f"all {checkpoint.state['trm']['halt_max_steps']} ACT steps",
        "fixed": f"{config.evaluation.act_steps} ACT steps",
        "confident": "when the halt head's logit is positive",
    }[config.evaluation.halt]
    hybrid_protocol: HybridProtocol = {}
    if checkpoint.state["kind"] == "hybrid":
        hybrid_protocol = _hybrid_protocol(config, checkpoint, predictions)
        halting = f"{checkpoint.state['config']['training']['act_steps']} ACT steps per attempt"
    same_dataset = checkpoint.state["dataset"]["fingerprint"] == dataset.fingerprint
    counts = [test["variants"] for p in predictions.values() for test in p["tests"]] or [0]
    fewest, voting = min(counts), max(counts)
    return {
        "sources": ", ".join(
            f"{name} ({dataset.meta['sources'][name]})"
            for name in dataset.meta["config"]["evaluation"]
        ),
        "evaluated": key["evaluated"],
        "test outputs evaluated": key["test outputs evaluated"],
        "training data": contamination_statement(tasks, checkpoint.trained_on),
        "puzzle ids": _puzzle_ids(config, same_dataset),
        "attempts scored": "2 per test output",
        "variants voting": voting if fewest == voting else f"{fewest} to {voting}",
        "vote": "by count, then mean halt probability; empty grids do not vote",
        "canvas": _canvas(dataset, len(tasks)),
        "halting": halting,
        **hybrid_protocol,
        "weights": "exponential moving average",
        "computed on": "a GPU" if config.cluster.use_gpu else "CPUs",
        "checkpoint": storage.uri(checkpoint.folder),
        "checkpoint digest": checkpoint.digest[:16],
        "dataset fingerprint": key["dataset fingerprint"],
    }


def _canvas(dataset: Dataset, n_tasks: int) -> str:
    sides = sorted({int(dataset.sides[task]) for task in dataset.evaluated[:n_tasks]})
    if not dataset.bucketed:
        return f"{dataset.canvas} x {dataset.canvas}"
    return f"the smallest of sides {', '.join(map(str, sides))} that fits a task's given grids"


def _puzzle_ids(config: Config, same_dataset: bool) -> str:
    if config.evaluation.puzzle_ids == "blank":
        return "blank: evaluation.puzzle_ids"
    return "as trained" if same_dataset else "blank: the dataset differs from the training dataset"


def _hybrid_protocol(
    config: Config, checkpoint: Checkpoint, predictions: Mapping[str, Prediction]
) -> HybridProtocol:
    trained, llama = checkpoint.state["config"], checkpoint.state["llama"]
    max_attempts = config.evaluation.max_attempts or trained["training"]["max_attempts"]
    source = config.feedback.source
    trm_only = config.adapter.inject == "none" or llama is None
    prompts = [prompt for p in predictions.values() if (prompt := p.get("prompt"))]
    cut = sum(prompt["shown"] < prompt["demonstrations"] for prompt in prompts)
    model = "none: the TRM alone"
    if not trm_only:
        model = f"{llama['model']}, {'frozen' if trained['llama']['frozen'] else 'fine-tuned'}"
    stopping = "without early stopping" if source == "none" else f"stopped by {source}"
    return {
        "attempts": f"up to {max_attempts}, {stopping}",
        "feedback": source if source != "oracle" else "oracle: THE ANSWERS WERE LOOKED AT",
        "trained with feedback": trained["feedback"]["source"],
        "language model": model,
        "text": "none" if trm_only else config.evaluation.text,
        "prompts": f"{cut} of {len(prompts)} tasks had demonstrations left out to fit",
        "latent into": "none" if trm_only else trained["adapter"]["inject"],
    }


def contamination_statement(tasks: Sequence[Task], trained_on: Sequence[str]) -> str:
    """Return whether the model was trained on the tasks' demonstrations or on their tests."""
    pairs = set(trained_on)
    inputs = {pair.split("|")[0] for pair in pairs}

    def in_training(pair: Pair) -> bool:
        return grid_hash(pair.input) in inputs if pair.output is None else pair_hash(pair) in pairs

    leaked = [task.id for task in tasks if any(in_training(pair) for pair in task.test)]
    if leaked:
        ids = ", ".join(leaked[:5]) + (", ..." if len(leaked) > 5 else "")
        return f"CONTAMINATED: {len(leaked)} tasks have a test among the training pairs ({ids})"
    shared = sum(any(in_training(pair) for pair in task.train) for task in tasks)
    if shared == 0:
        return "inductive: no pair of these tasks was trained on"
    return f"transductive: demonstrations of {shared} of {len(tasks)} tasks were trained on"


def describe(results: Results) -> str:
    """Format protocol, scores, cost and notes as lines for a terminal."""
    lines = [f"{key}: {value}" for key, value in results["protocol"].items()]
    for passes in ("pass@1", "pass@2") if "scores" in results else ():
        scores = results["scores"][passes]
        lines += [
            f"{passes} test outputs: {_line(scores['outputs'])}",
            f"{passes} mean over tasks: {_line(scores['task_mean'])}",
            f"{passes} whole tasks: {_line(scores['tasks'])}",
        ]
    lines += [f"coverage@{k}: {_line(rate)}" for k, rate in results.get("coverage", {}).items()]
    lines += _describe_self_correction(results)
    spent = results["spent"]
    tokens = f"{spent['llm_tokens']} LLaMA tokens, " if spent.get("llm_tokens") else ""
    lines.append(
        f"spent: {spent['rows']} rows, {spent['act_steps']} ACT steps, {tokens}"
        f"{spent['seconds']:.1f} s"
    )
    return "\n".join([*lines, *results["notes"]])


def _describe_self_correction(results: Results) -> list[str]:
    lines = [
        f"after attempt {point['attempt']}: pass@2 test outputs {_line(point['pass@2']['outputs'])}"
        for point in results.get("curve", ())
    ]
    if "baseline" in results:
        base = results["baseline"]
        lines.append(
            f"same attempts spent on voting ({base['views']} of {base['wanted']} variants"
            f" available): pass@2 test outputs {_line(base['pass@2']['outputs'])}"
        )
    for other in results.get("compare_to", ()):
        if "scores" in other:
            mark = ", ORACLE" if other["oracle"] else ""
            line = _line(other["scores"]["pass@2"]["outputs"])
            lines.append(f"compared to {other['title']}{mark}: pass@2 test outputs {line}")
    if results["oracle"]:
        lines.append(
            "ORACLE: the answers were looked at; an upper bound, no submission was written"
        )
    return lines


def _line(rate: RateRecord) -> str:
    return str(Rate(numerator=rate["numerator"], denominator=rate["denominator"]))


def _grids(candidates: Sequence[CandidateRecord]) -> list[Grid]:
    return [string_to_grid("\n".join(candidate["grid"])) for candidate in candidates]


def _task_result(task: Task, ranked: Sequence[Sequence[Grid]]) -> TaskResult:
    outputs: list[OutputResult] = []
    for index, pair in enumerate(task.test):
        candidates = ranked[index] if index < len(ranked) else ()
        rank = None
        if pair.output is not None:
            hits = (n for n, grid in enumerate(candidates, 1) if np.array_equal(grid, pair.output))
            rank = next(hits, None)
        outputs.append(
            {
                "right@1": None if pair.output is None else rank == 1,
                "right@2": None if pair.output is None else rank in (1, 2),
                "right_rank": rank,
                "candidates": len(candidates),
            }
        )
    scorable = all(pair.output is not None for pair in task.test)
    solved = all(output["right@2"] for output in outputs) if scorable else None
    return {"id": task.id, "solved": solved, "outputs": outputs}


def _pass_scores(tasks: Sequence[Task], ranked: Ranked) -> PassScores:
    return {
        "pass@1": _scores(score(tasks, ranked, 1)),
        "pass@2": _scores(score(tasks, ranked, 2)),
    }


def _scores(scores: Scores) -> ScoreRecord:
    return {
        "outputs": _rate(scores.outputs),
        "task_mean": _rate(scores.task_mean),
        "tasks": _rate(scores.tasks),
    }


def _rate(rate: Rate) -> RateRecord:
    return {
        "numerator": rate.numerator,
        "denominator": rate.denominator,
        "value": rate.value,
        "low": rate.low,
        "high": rate.high,
    }
