"""Write report.html: one self-contained HTML file that shows every task of an evaluation."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from hybrid import storage
from hybrid.arc import Grid, Task, grid_to_string
from hybrid.evaluate.records import Prediction, Results, VoteRecord

DATA_SLOT = "{{data}}"
ORACLE_SLOT = "{{oracle}}"
CANDIDATES_SHOWN = 12
ORACLE_BANNER = """\
<div class="banner oracle" role="alert"><strong>ORACLE: the answers were looked at</strong>
The feedback on each attempt was computed from the answers. These scores are an upper bound and must
not be reported as a result.</div>"""
"""Static HTML, so that it shows even where scripts are disabled."""


def write_report(
    path: Path,
    tasks: Sequence[Task],
    predictions: Mapping[str, Prediction],
    results: Results,
) -> None:
    """Write the report on `tasks` to `path` atomically and upload it.

    Every task has a card, with or without a prediction. Per test input the file holds the best
    `CANDIDATES_SHOWN` candidates, the correct one if it ranks lower, and the number of all
    candidates; for a hybrid also the attempts of the original variant. `results` is embedded
    unchanged, except that NaN and infinity become null, because JSON has no such numbers.
    """
    data = {
        "results": results,
        "tasks": [_task_data(task, predictions.get(task.id)) for task in tasks],
    }
    template = resources.files("hybrid.evaluate").joinpath("report.html").read_text("utf-8")
    template = template.replace(ORACLE_SLOT, ORACLE_BANNER if results["oracle"] else "")
    before, after = template.split(DATA_SLOT)
    path.parent.mkdir(parents=True, exist_ok=True)
    storage.write(path, before + _script_json(data) + after)


def _task_data(task: Task, prediction: Prediction | None) -> dict[str, Any]:
    votes = prediction["tests"] if prediction else [None] * len(task.test)
    assert len(votes) == len(task.test), f"task {task.id}: {len(votes)} tests predicted"
    return {
        "id": task.id,
        "train": [[_text(pair.input), _text(pair.output)] for pair in task.train],
        "tests": [
            {"input": _text(pair.input), "answer": (answer := _text(pair.output))}
            | _vote_data(vote, answer)
            for pair, vote in zip(task.test, votes, strict=True)
        ],
        "spent": prediction.get("spent") if prediction else None,
    } | ({"prompt": prediction["prompt"]} if prediction and prediction.get("prompt") else {})


def _vote_data(vote: VoteRecord | None, answer: str | None) -> dict[str, Any]:
    if vote is None:
        return {"candidates": [], "distinct": 0, "variants": None, "empty": 0}
    ranked: list[dict[str, Any]] = [
        {**candidate, "grid": "|".join(candidate["grid"]), "rank": rank}
        for rank, candidate in enumerate(vote["candidates"], start=1)
    ]
    return {
        "candidates": [
            candidate
            for candidate in ranked
            if candidate["rank"] <= CANDIDATES_SHOWN or candidate["grid"] == answer
        ],
        "distinct": len(ranked),
        "variants": vote["variants"],
        "empty": vote["empty"],
    } | (_attempts_data(vote) if "attempts" in vote else {})


def _attempts_data(vote: VoteRecord) -> dict[str, Any]:
    return {
        "attempts": [
            {**attempt, "grid": "|".join(attempt["grid"])} for attempt in vote["attempts"]
        ],
        "most": len(vote["curve"]),
    }


def _text(grid: Grid | None) -> str | None:
    """Return the rows of digits joined by bars, "012|345"; None for None."""
    return None if grid is None else grid_to_string(grid).replace("\n", "|")


def _script_json(data: Any) -> str:
    """Return JSON without `<`, so that no `</script` or `<!--` ends the script element."""
    return json.dumps(_finite(data), separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
