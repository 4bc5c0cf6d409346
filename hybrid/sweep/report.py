"""The HTML report of a sweep: one panel per swept key, one dot per trial, no external resources."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from html import escape
from importlib import resources
from pathlib import Path
from typing import get_args

from hybrid import storage
from hybrid.sweep.results import (
    Status,
    Trial,
    format_value,
    ranked,
    ranking_header,
    ranking_row,
)
from hybrid.sweep.space import Axis

WIDTH, HEIGHT = 300, 220
LEFT, RIGHT, TOP, BOTTOM = 44, 12, 12, 30


def write_report(path: Path, title: str, trials: Sequence[Trial], axes: Sequence[Axis]) -> None:
    """Write the report of a sweep to `path`."""
    order = ranked(trials)
    template = resources.files("hybrid.sweep").joinpath("report.html").read_text("utf-8")
    parts = {
        "title": escape(title),
        "summary": escape(_summary(order)),
        "panels": "\n".join(_panel(axis, order) for axis in axes),
        "curves": _curves(order),
        "table": _table(order, axes),
    }
    # In one pass, because inserted text may itself contain {{...}}.
    page = re.sub(r"{{(\w+)}}", lambda match: parts[match[1]], template)
    storage.write(path, page)


def _summary(trials: Sequence[Trial]) -> str:
    counts = {status: sum(t.status == status for t in trials) for status in get_args(Status)}
    by_status = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
    return f"{len(trials)} trials: {by_status}"


def _panel(axis: Axis, trials: Sequence[Trial]) -> str:
    """Plot the objective against one key; the best trial's dot is filled."""
    scored = [trial for trial in trials if trial.last]
    if axis.kind in ("grid", "choice"):
        names = [str(value) for value in axis.values]
        position = {name: (n + 0.5) / len(names) for n, name in enumerate(names)}
        ticks = [(position[name], name) for name in names]
        across = [position[str(trial.values[axis.key])] for trial in scored]
    else:
        scale = math.log if axis.kind == "loguniform" else float
        low, high = (scale(value) for value in axis.values)
        ticks = [((scale(v) - low) / (high - low), format_value(v)) for v in axis.values]
        across = [(scale(trial.values[axis.key]) - low) / (high - low) for trial in scored]
    y_max = max((t.last.rate.high for t in scored if t.last), default=1.0)
    dots = [
        _dot(_x(x), y_max, trial, best=trial is scored[0])
        for x, trial in reversed(list(zip(across, scored, strict=True)))
    ]
    labels = [
        f'<text x="{_x(x):.1f}" y="{HEIGHT - 10}" text-anchor="middle">{escape(name)}</text>'
        for x, name in ticks
    ]
    return (
        f"<figure><figcaption>{escape(axis.key)}</figcaption>{_frame(y_max)}"
        f"{''.join(labels)}{''.join(dots)}</svg></figure>"
    )


def _curves(trials: Sequence[Trial]) -> str:
    """Plot the objective against the step, one line per trial."""
    scored = [trial for trial in trials if trial.last]
    last_step = max((trial.step for trial in scored), default=0) or 1
    objectives = [v.objective for trial in scored for v in trial.curve.values()]
    y_max = max(objectives, default=0) or 1.0
    lines = []
    for trial in reversed(scored):
        points = " ".join(
            f"{_x(step / last_step):.1f},{_y(v.objective / y_max):.1f}"
            for step, v in sorted(trial.curve.items())
        )
        kind = "line best" if trial is scored[0] else "line"
        lines.append(f'<polyline class="{kind}" points="{points}">{_title(trial)}</polyline>')
    label = f'<text x="{_x(1):.1f}" y="{HEIGHT - 10}" text-anchor="end">step {last_step}</text>'
    return (
        f"<figure><figcaption>by step</figcaption>{_frame(y_max)}"
        f"{label}{''.join(lines)}</svg></figure>"
    )


def _frame(y_max: float) -> str:
    """Return the opening <svg> tag, the axes, and the labels of the y axis."""
    base, end = HEIGHT - BOTTOM, WIDTH - RIGHT
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">'
        f'<path class="axis" d="M{LEFT},{TOP} V{base} H{end}"/>'
        f'<text x="{LEFT - 6}" y="{TOP + 8}" text-anchor="end">{y_max:.2f}</text>'
        f'<text x="{LEFT - 6}" y="{base}" text-anchor="end">0</text>'
    )


def _dot(x: float, y_max: float, trial: Trial, *, best: bool) -> str:
    """Return a trial's objective as a dot, with the 95% interval of its score as a line."""
    assert trial.last is not None
    low, high = (_y(share / y_max) for share in (trial.last.rate.low, trial.last.rate.high))
    y, kind = _y(trial.last.objective / y_max), "dot best" if best else "dot"
    return (
        f'<path class="interval" d="M{x:.1f},{low:.1f} V{high:.1f}"/>'
        f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="5">{_title(trial)}</circle>'
    )


def _title(trial: Trial) -> str:
    values = ", ".join(f"{key}={format_value(value)}" for key, value in trial.values.items())
    rate = str(trial.last.rate) if trial.last else "no score"
    return f"<title>{escape(f'{trial.name}: {values}: {rate}, step {trial.step}')}</title>"


def _table(trials: Sequence[Trial], axes: Sequence[Axis]) -> str:
    rows = [_row("th", [*ranking_header(axes), ""])]
    for rank, trial in enumerate(trials, start=1):
        status = f"{trial.status}: {trial.error}" if trial.error else trial.status
        rows.append(_row("td", [*ranking_row(rank, trial, axes), status]))
    return "\n".join(rows)


def _row(tag: str, cells: Sequence[str]) -> str:
    return f"<tr>{''.join(f'<{tag}>{escape(cell)}</{tag}>' for cell in cells)}</tr>"


def _x(share: float) -> float:
    return LEFT + share * (WIDTH - LEFT - RIGHT)


def _y(share: float) -> float:
    return HEIGHT - BOTTOM - share * (HEIGHT - BOTTOM - TOP)
