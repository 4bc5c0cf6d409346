"""The results of the GPU check as text."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks.gpu.session import RESULTS
from benchmarks.measure import table

Line = Mapping[str, Any]


def read(out: Path) -> list[Line]:
    """Load the results written so far."""
    file = out / RESULTS
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def failures(lines: Sequence[Line]) -> list[str]:
    """Name the checks that failed and the parts that crashed."""
    return [_name(line) for line in lines if line.get("ok") is False]


def not_finished(lines: Sequence[Line]) -> list[str]:
    """Name the checks that ran out of time or memory."""
    return [_name(line) for line in lines if line.get("finished") is False]


def text(lines: Sequence[Line]) -> str:
    """Format all results as tables by part, then the verdict."""
    blocks = ["\nPredictions are for one H100, made before any GPU had run the code."]
    for part, of_part in groupby(lines, key=lambda line: line["part"]):
        blocks.append(f"\n{part}")
        blocks += [table(rows) for rows in _same_columns([_row(line) for line in of_part])]
    checks = [line for line in lines if "ok" in line]
    failed = failures(lines)
    blocks.append(f"\n{len(checks) - len(failed)} of {len(checks)} checks passed")
    blocks += [f"FAILED  {what}" for what in failed]
    blocks += [f"NOT FINISHED  {what}" for what in not_finished(lines)]
    return "\n".join(blocks)


def _name(line: Line) -> str:
    return f"{line['part']}: {line['what']}"


def _row(line: Line) -> dict[str, Any]:
    row = {key: value for key, value in line.items() if key not in ("part", "ok", "finished")}
    if "ok" in line:
        row["check"] = "passed" if line["ok"] else "FAILED"
    elif "finished" in line:
        row["check"] = "not finished"
    return row


def _same_columns(rows: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    return [list(group) for _, group in groupby(rows, key=list)]
