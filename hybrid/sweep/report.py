"""The picture of a sweep: one panel a key, one dot a trial; one HTML file that fetches nothing."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from hybrid import storage
from hybrid.sweep.results import Trial, ranked
from hybrid.sweep.space import Axis

WIDTH, HEIGHT = 300, 220
LEFT, RIGHT, TOP, BOTTOM = 44, 12, 12, 30


def write_report(path: Path, title: str, trials: Sequence[Trial], axes: Sequence[Axis]) -> None:
    """Write the report of a sweep to `path`, whole or not at all."""
    order = ranked(trials)
    template = resources.files("hybrid.sweep").joinpath("report.html").read_text("utf-8")
    parts = {
        "title": escape(title),
        "summary": escape(_summary(order)),
        "panels": "\n".join(_panel(axis, order) for axis in axes),
        "curves": _curves(order),
        "table": _table(order, axes),
    }
    # In one pass: what is filled in may look like a place to fill.
    page = re.sub(r"{{(\w+)}}", lambda place: parts[place[1]], template)
    partial = path.with_name(f".{path.name}.tmp")
    partial.write_text(page, encoding="utf-8")
    os.replace(partial, path)
    storage.upload(path)


def _summary(trials: Sequence[Trial]) -> str:
    counts = {status: sum(t.status == status for t in trials) for status in _STATUS}
    said = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
    return f"{len(trials)} trials: {said}"


_STATUS = ("done", "stopped early", "failed", "unfinished")


def _panel(axis: Axis, trials: Sequence[Trial]) -> str:
    """Score against one key; the best trial is filled."""
    scored = [trial for trial in trials if trial.last]
    if axis.kind in ("grid", "choice"):
        names = [str(value) for value in axis.values]
        places = {name: (n + 0.5) / len(names) for n, name in enumerate(names)}
        ticks = [(places[name], name) for name in names]
        across = [places[str(trial.values[axis.key])] for trial in scored]
    else:
        scale = math.log if axis.kind == "loguniform" else float
        low, high = (scale(value) for value in axis.values)
        ticks = [((scale(v) - low) / (high - low), _number(v)) for v in axis.values]
        across = [(scale(trial.values[axis.key]) - low) / (high - low) for trial in scored]
    top = max((t.last.rate.high for t in scored if t.last), default=1.0)
    dots = [
        _dot(_x(x), top, trial, best=trial is scored[0])
        for x, trial in reversed(list(zip(across, scored, strict=True)))
    ]
    marks = [
        f'<text x="{_x(x):.1f}" y="{HEIGHT - 10}" text-anchor="middle">{escape(name)}</text>'
        for x, name in ticks
    ]
    return (
        f"<figure><figcaption>{escape(axis.key)}</figcaption>{_frame(top)}"
        f"{''.join(marks)}{''.join(dots)}</svg></figure>"
    )


def _curves(trials: Sequence[Trial]) -> str:
    """Score against step, a line a trial."""
    scored = [trial for trial in trials if trial.last]
    last = max((trial.step for trial in scored), default=0) or 1
    shares = [v.objective for trial in scored for v in trial.curve.values()]
    top = max(shares, default=0) or 1.0
    lines = []
    for trial in reversed(scored):
        points = " ".join(
            f"{_x(step / last):.1f},{_y(v.objective / top):.1f}"
            for step, v in sorted(trial.curve.items())
        )
        kind = "line best" if trial is scored[0] else "line"
        lines.append(f'<polyline class="{kind}" points="{points}">{_title(trial)}</polyline>')
    mark = f'<text x="{_x(1):.1f}" y="{HEIGHT - 10}" text-anchor="end">step {last}</text>'
    return (
        f"<figure><figcaption>over the steps</figcaption>{_frame(top)}"
        f"{mark}{''.join(lines)}</svg></figure>"
    )


def _frame(top: float) -> str:
    """An opened svg with its axes and the two numbers of the vertical one."""
    base, end = HEIGHT - BOTTOM, WIDTH - RIGHT
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">'
        f'<path class="axis" d="M{LEFT},{TOP} V{base} H{end}"/>'
        f'<text x="{LEFT - 6}" y="{TOP + 8}" text-anchor="end">{top:.2f}</text>'
        f'<text x="{LEFT - 6}" y="{base}" text-anchor="end">0</text>'
    )


def _dot(x: float, top: float, trial: Trial, *, best: bool) -> str:
    """A trial's objective, and the interval of what it got right."""
    assert trial.last is not None
    low, high = (_y(share / top) for share in (trial.last.rate.low, trial.last.rate.high))
    y, kind = _y(trial.last.objective / top), "dot best" if best else "dot"
    return (
        f'<path class="interval" d="M{x:.1f},{low:.1f} V{high:.1f}"/>'
        f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="5">{_title(trial)}</circle>'
    )


def _title(trial: Trial) -> str:
    values = ", ".join(f"{key}={_number(value)}" for key, value in trial.values.items())
    rate = str(trial.last.rate) if trial.last else "no score"
    return f"<title>{escape(f'{trial.name}: {values}: {rate}, step {trial.step}')}</title>"


def _table(trials: Sequence[Trial], axes: Sequence[Axis]) -> str:
    heads = ("", *(axis.key for axis in axes), "right of held-out", "cells", "step", "seconds", "")
    rows = [f"<tr>{''.join(f'<th>{escape(head)}</th>' for head in heads)}</tr>"]
    for place, trial in enumerate(trials, start=1):
        last = trial.last
        cells = (
            str(place),
            *(_number(trial.values.get(axis.key)) for axis in axes),
            str(last.rate) if last else "no score",
            f"{last.cells:.1%}" if last else "",
            str(trial.step),
            f"{trial.seconds:.0f}",
            f"{trial.status}: {trial.error}" if trial.error else trial.status,
        )
        rows.append(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>")
    return "\n".join(rows)


def _x(share: float) -> float:
    return LEFT + share * (WIDTH - LEFT - RIGHT)


def _y(share: float) -> float:
    return HEIGHT - BOTTOM - share * (HEIGHT - BOTTOM - TOP)


def _number(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
