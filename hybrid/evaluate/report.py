"""The gallery of an evaluation: one HTML file that opens from disk and fetches nothing."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from hybrid.arc import Grid, Task, grid_to_string

DATA_SLOT = "{{data}}"
ORACLE_SLOT = "{{oracle}}"
CANDIDATES_SHOWN = 12
ORACLE_BANNER = """\
<div class="banner oracle" role="alert"><strong>ORACLE: the answers were looked at</strong>
The solver was told what was wrong with each try. These numbers are an upper bound and must not be
reported as a result.</div>"""
"""Part of the page itself, so that it is there even if no script runs."""


def write_report(
    path: Path,
    tasks: Sequence[Task],
    predictions: Mapping[str, Mapping[str, Any]],
    results: Mapping[str, Any],
) -> None:
    """Write the gallery of `tasks` to `path`, whole or not at all.

    Every task asked for gets a card; one without an entry in `predictions` is shown unanswered.
    Per test input the file holds the best `CANDIDATES_SHOWN` candidates, and the right one when it
    ranks lower; of the others it holds only how many there were. Of a hybrid it holds the attempts
    of the original view. `results` is embedded as it is, except that numbers which are not finite
    become null (JSON has no name for them).
    """
    data = {
        "results": results,
        "tasks": [_task_data(task, predictions.get(task.id)) for task in tasks],
    }
    template = resources.files("hybrid.evaluate").joinpath("report.html").read_text("utf-8")
    template = template.replace(ORACLE_SLOT, ORACLE_BANNER if results["oracle"] else "")
    before, after = template.split(DATA_SLOT)
    _write_atomically(path, before + _script_json(data) + after)


def _task_data(task: Task, prediction: Mapping[str, Any] | None) -> dict[str, Any]:
    answered = prediction["tests"] if prediction else [None] * len(task.test)
    assert len(answered) == len(task.test), f"task {task.id}: {len(answered)} tests predicted"
    return {
        "id": task.id,
        "train": [[_text(pair.input), _text(pair.output)] for pair in task.train],
        "tests": [
            {"input": _text(pair.input), "answer": (answer := _text(pair.output))}
            | _votes_data(votes, answer)
            for pair, votes in zip(task.test, answered, strict=True)
        ],
        "spent": prediction.get("spent") if prediction else None,
    } | ({"prompt": prediction["prompt"]} if prediction and prediction.get("prompt") else {})


def _votes_data(votes: Mapping[str, Any] | None, answer: str | None) -> dict[str, Any]:
    if votes is None:
        return {"candidates": [], "distinct": 0, "variants": None, "empty": 0}
    ranked = [
        {**candidate, "grid": "|".join(candidate["grid"]), "rank": rank}
        for rank, candidate in enumerate(votes["candidates"], start=1)
    ]
    return {
        "candidates": [
            candidate
            for candidate in ranked
            if candidate["rank"] <= CANDIDATES_SHOWN or candidate["grid"] == answer
        ],
        "distinct": len(ranked),
        "variants": votes["variants"],
        "empty": votes["empty"],
    } | (_attempts_data(votes) if "attempts" in votes else {})


def _attempts_data(votes: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "attempts": [
            {**attempt, "grid": "|".join(attempt["grid"])} for attempt in votes["attempts"]
        ],
        "most": len(votes["curve"]),
    }


def _text(grid: Grid | None) -> str | None:
    """Rows of digits joined by bars, "012|345"; None stays None."""
    return None if grid is None else grid_to_string(grid).replace("\n", "|")


def _script_json(data: Any) -> str:
    """JSON that cannot leave a script element: no `<`, so neither `</script` nor `<!--`."""
    return json.dumps(_finite(data), separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write_atomically(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
