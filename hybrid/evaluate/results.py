"""From answers to scores. Here, and only here, predictions meet the true outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from hybrid import storage
from hybrid.arc import Grid, Rate, Scores, Task, grid_hash, pair_hash, score, string_to_grid
from hybrid.checkpoint import Checkpoint
from hybrid.config import Config
from hybrid.dataset import Dataset
from hybrid.evaluate.trm_predictor import Prediction

COVERAGE = (1, 2, 5, 10, 100, 1000)


def score_predictions(
    config: Config,
    dataset: Dataset,
    checkpoint: Checkpoint,
    tasks: Sequence[Task],
    answered: Mapping[str, Prediction],
) -> dict[str, Any]:
    """results.json. It depends on what was asked and answered, not on the order answers came in."""
    ranked = {
        task.id: [_grids(test["candidates"]) for test in answered[task.id]["tests"]]
        for task in tasks
        if task.id in answered
    }
    hybrid = checkpoint.state["kind"] == "hybrid"
    known = all(pair.output is not None for task in tasks for pair in task.test)
    missing = [task.id for task in tasks if task.id not in answered]
    notes = [f"no answer came back for {', '.join(missing)}: counted as wrong"] if missing else []
    results: dict[str, Any] = {
        "title": f"{config.logging.run}, {checkpoint.name}",
        "oracle": hybrid and config.feedback.source == "oracle",
        "feedback": config.feedback.source if hybrid else None,
        "protocol": protocol(config, dataset, checkpoint, tasks, answered),
        "spent": _spent(answered, "spent"),
        "notes": notes if known else [*notes, "the answers are not known: nothing is scored"],
        "tasks": [_task_result(task, ranked.get(task.id, [])) for task in tasks],
    }
    if known:
        results["scores"] = {f"pass@{k}": _plain(score(tasks, ranked, k)) for k in (1, 2)}
        results["coverage"] = {str(k): _rate(score(tasks, ranked, k).outputs) for k in COVERAGE}
        if hybrid:
            results |= _self_correction(tasks, answered)
    return results


def _self_correction(tasks: Sequence[Task], answered: Mapping[str, Prediction]) -> dict[str, Any]:
    """The score after each attempt, and that of the same number of attempts spent on voting."""
    most = max((len(test["curve"]) for p in answered.values() for test in p["tests"]), default=0)

    def scores(candidates: Callable[[Mapping[str, Any]], Sequence[Any]]) -> dict[str, Any]:
        ranked = {
            task.id: [_grids(candidates(test)) for test in answered[task.id]["tests"]]
            for task in tasks
            if task.id in answered
        }
        return {f"pass@{k}": _plain(score(tasks, ranked, k)) for k in (1, 2)}

    found: dict[str, Any] = {
        "curve": [
            {
                "attempt": number + 1,
                "trying": _trying(answered, number),
                **scores(partial(_after, number)),
            }
            for number in range(most)
        ]
    }
    if most > 1 and all("baseline" in test for p in answered.values() for test in p["tests"]):
        views = [test["baseline"] for p in answered.values() for test in p["tests"]]
        found["baseline"] = {
            **scores(lambda test: test["baseline"]["candidates"]),
            "views": sum(view["views"] for view in views),
            "wanted": sum(view["wanted"] for view in views),
            "spent": _spent(answered, "baseline_spent"),
        }
    return found


def _after(number: int, test: Mapping[str, Any]) -> Sequence[Any]:
    """Candidates on a test after attempt `number` + 1."""
    curve: Sequence[Sequence[Any]] = test["curve"]
    return curve[min(number, len(curve) - 1)]


def _trying(answered: Mapping[str, Prediction], number: int) -> int:
    """Tests whose original view made attempt `number` + 1."""
    tests = [test for prediction in answered.values() for test in prediction["tests"]]
    return sum(len(test["attempts"]) > number for test in tests)


def _spent(answered: Mapping[str, Prediction], key: str) -> dict[str, float]:
    total: dict[str, float] = {}
    for prediction in answered.values():
        for name, value in prediction[key].items():
            total[name] = total.get(name, 0) + value
    return total


def questions_key(dataset: Dataset, tasks: Sequence[Task]) -> dict[str, Any]:
    """Two evaluations with the same of these asked the same questions."""
    counts = dataset.meta["evaluation"]
    asked = f"{len(tasks)} of {counts['of']} tasks"
    whole = len(tasks) == counts["of"]
    return {
        "evaluated": asked if whole else f"a subset: {asked} (canvas of side {dataset.canvas})",
        "test outputs evaluated": sum(len(task.test) for task in tasks),
        "dataset fingerprint": dataset.fingerprint[:16],
    }


def protocol(
    config: Config,
    dataset: Dataset,
    checkpoint: Checkpoint,
    tasks: Sequence[Task],
    answered: Mapping[str, Prediction],
) -> dict[str, Any]:
    """What a reader must know to compare the number with another one."""
    key = questions_key(dataset, tasks)
    halts = {
        "published": f"all {checkpoint.state['trm']['halt_max_steps']} ACT steps",
        "fixed": f"{config.evaluation.act_steps} ACT steps",
        "confident": "until the halt head says so",
    }
    same = checkpoint.state["dataset"]["fingerprint"] == dataset.fingerprint
    voting = [test["variants"] for p in answered.values() for test in p["tests"]] or [0]
    fewest, views = min(voting), max(voting)
    hybrid = checkpoint.state["kind"] == "hybrid"
    return {
        "sources": ", ".join(
            f"{name} ({dataset.meta['sources'][name]})"
            for name in dataset.meta["config"]["evaluation"]
        ),
        "evaluated": key["evaluated"],
        "test outputs evaluated": key["test outputs evaluated"],
        "training data": contamination_statement(tasks, checkpoint.trained_on),
        "puzzle ids": _puzzle_ids(config, same),
        "attempts scored": "2 a test output",
        "views voting": views if fewest == views else f"{fewest} to {views}",
        "vote": "count, then mean halt probability; grids that are empty do not vote",
        "canvas": _canvas(dataset, len(tasks)),
        "halting": halts[config.evaluation.halt],
        **(_hybrid_protocol(config, checkpoint, answered) if hybrid else {}),
        "weights": "moving average",
        "computed on": "a GPU" if config.cluster.use_gpu else "CPUs",
        "checkpoint": storage.uri(checkpoint.folder),
        "checkpoint digest": checkpoint.digest[:16],
        "dataset fingerprint": key["dataset fingerprint"],
    }


def _canvas(dataset: Dataset, asked: int) -> str:
    sides = sorted({int(dataset.sides[task]) for task in dataset.evaluated[:asked]})
    if not dataset.bucketed:
        return f"{dataset.canvas} x {dataset.canvas}"
    return f"the smallest of sides {', '.join(map(str, sides))} that holds what is shown"


def _puzzle_ids(config: Config, same: bool) -> str:
    if config.evaluation.puzzle_ids == "blank":
        return "blank: evaluation.puzzle_ids"
    return "as trained" if same else "blank: the dataset is not the trained one"


def _hybrid_protocol(
    config: Config, checkpoint: Checkpoint, answered: Mapping[str, Prediction]
) -> dict[str, Any]:
    trained, llama = checkpoint.state["config"], checkpoint.state["llama"]
    most = config.evaluation.max_attempts or trained["training"]["max_attempts"]
    source = config.feedback.source
    alone = config.adapter.inject == "none" or llama is None
    prompts = [p["prompt"] for p in answered.values() if p.get("prompt")]
    cut = sum(prompt["shown"] < prompt["demonstrations"] for prompt in prompts)
    reads = "nothing: the TRM is alone"
    if not alone:
        reads = f"{llama['model']}, {'frozen' if trained['llama']['frozen'] else 'fine-tuned'}"
    return {
        "halting": f"{trained['training']['act_steps']} ACT steps an attempt",
        "attempts": f"up to {most}, stopped by {'nothing' if source == 'none' else source}",
        "feedback": source if source != "oracle" else "oracle: THE ANSWERS WERE LOOKED AT",
        "trained with feedback": trained["feedback"]["source"],
        "language model": reads,
        "text": config.evaluation.text if not alone else "none",
        "prompts": f"{cut} of {len(prompts)} tasks had demonstrations left out to fit",
        "latent into": trained["adapter"]["inject"] if not alone else "none",
    }


def contamination_statement(tasks: Sequence[Task], trained_on: Sequence[str]) -> str:
    """Whether the model has seen the tasks' demonstrations, or worse, their tests."""
    pairs = set(trained_on)
    inputs = {pair.split("|")[0] for pair in pairs}

    def seen(pair: Any) -> bool:
        return grid_hash(pair.input) in inputs if pair.output is None else pair_hash(pair) in pairs

    leaked = [task.id for task in tasks if any(seen(pair) for pair in task.test)]
    if leaked:
        named = ", ".join(leaked[:5]) + (", ..." if len(leaked) > 5 else "")
        return f"CONTAMINATED: {len(leaked)} tasks have a test among the training pairs ({named})"
    demonstrations = sum(any(seen(pair) for pair in task.train) for task in tasks)
    if demonstrations == 0:
        return "inductive: no pair of these tasks was trained on"
    return f"transductive: demonstrations of {demonstrations} of {len(tasks)} tasks were trained on"


def describe(results: Mapping[str, Any]) -> str:
    """The scores as lines for a terminal, each with numerator, denominator and interval."""
    lines = [f"{key}: {value}" for key, value in results["protocol"].items()]
    names = {"outputs": "test outputs", "task_mean": "mean over tasks", "tasks": "whole tasks"}
    for attempt, metrics in results.get("scores", {}).items():
        lines += [f"{attempt} {names[key]}: {_line(rate)}" for key, rate in metrics.items()]
    lines += [f"coverage@{k}: {_line(rate)}" for k, rate in results.get("coverage", {}).items()]
    lines += _describe_self_correction(results)
    spent = results["spent"]
    tokens = f"{spent['llm_tokens']} LLaMA tokens, " if spent.get("llm_tokens") else ""
    lines.append(
        f"spent: {spent['rows']} rows, {spent['act_steps']} ACT steps, {tokens}"
        f"{spent['seconds']:.1f} s"
    )
    return "\n".join([*lines, *results["notes"]])


def _describe_self_correction(results: Mapping[str, Any]) -> list[str]:
    lines = [
        f"after attempt {point['attempt']}: pass@2 test outputs {_line(point['pass@2']['outputs'])}"
        for point in results.get("curve", ())
    ]
    if "baseline" in results:
        base = results["baseline"]
        lines.append(
            f"the same attempts spent on voting ({base['views']} of {base['wanted']} views there):"
            f" pass@2 test outputs {_line(base['pass@2']['outputs'])}"
        )
    for other in results.get("compare_to", ()):
        if "scores" in other:
            mark = ", ORACLE" if other["oracle"] else ""
            line = _line(other["scores"]["pass@2"]["outputs"])
            lines.append(f"beside, {other['title']}{mark}: pass@2 test outputs {line}")
    if results["oracle"]:
        lines.append(
            "ORACLE: the answers were looked at; an upper bound, no submission was written"
        )
    return lines


def _line(rate: Mapping[str, Any]) -> str:
    return str(Rate(numerator=rate["numerator"], denominator=rate["denominator"]))


def _grids(candidates: Sequence[Mapping[str, Any]]) -> list[Grid]:
    return [string_to_grid("\n".join(candidate["grid"])) for candidate in candidates]


def _task_result(task: Task, ranked: Sequence[Sequence[Grid]]) -> dict[str, Any]:
    outputs = []
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
    known = all(pair.output is not None for pair in task.test)
    solved = all(output["right@2"] for output in outputs) if known else None
    return {"id": task.id, "solved": solved, "outputs": outputs}


def _plain(scores: Scores) -> dict[str, Any]:
    return {key: _rate(getattr(scores, key)) for key in ("outputs", "task_mean", "tasks")}


def _rate(rate: Rate) -> dict[str, Any]:
    return {
        "numerator": rate.numerator,
        "denominator": rate.denominator,
        "value": rate.value,
        "low": rate.low,
        "high": rate.high,
    }
