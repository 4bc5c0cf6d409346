"""Trial records, the ranking of trials, and the files written from it."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from helpers import hybrid_of

from hybrid import config as configs
from hybrid.errors import UserError
from hybrid.evaluate import Validation
from hybrid.sweep import (
    Axis,
    Trial,
    TrialRecord,
    best_yaml,
    format_ranking,
    ranked,
    read_reason,
    read_trial,
    trial_name,
    write_reason,
    write_report,
    write_results,
    write_trial,
)

HIDDEN = Axis(key="adapter.hidden", kind="choice", values=(8, 16, 32))
LR = Axis(key="adapter.lr", kind="loguniform", values=(1e-4, 1e-2))


def trial(name: str, right: int | None = 0, cells: float = 0.5, **fields: Any) -> Trial:
    """Make a finished trial with two validations; without any if `right` is None."""
    curve = {}
    if right is not None:
        curve = {
            step: Validation(right=right, evaluated=9, cells=cells * step / 12) for step in (4, 12)
        }
    defaults = {"values": {HIDDEN.key: 8, LR.key: 1e-3}, "status": "done", "seconds": 1.5}
    return Trial(name=name, curve=curve, **(defaults | fields))


def test_ranking_is_best_first_with_ties_sorted_by_name() -> None:
    expected = [
        trial("e", 3, 0.1),
        trial("d", 2, 0.9, status="stopped early"),
        trial("b", 2, 0.8),
        trial("c", 2, 0.8),
        trial("z", None, status="unfinished"),
        trial("a", 9, 1.0, status="failed", error="OSError: x"),
        trial("f", None, status="failed", error="OSError: x"),
    ]
    assert [t.name for t in ranked(expected[::-1])] == [t.name for t in expected]


def test_trial_score_is_its_newest_validation() -> None:
    curve = {
        12: Validation(right=1, evaluated=9, cells=0),
        4: Validation(right=5, evaluated=9, cells=0),
    }
    scored = Trial(name="a", values={}, status="done", curve=curve, seconds=0)
    assert scored.step == 12 and scored.last is not None and scored.last.right == 1
    empty = Trial(name="a", values={}, status="failed", curve={}, seconds=0)
    assert empty.step == 0 and empty.last is None


def test_written_trial_record_is_read_back(tmp_path: Path) -> None:
    assert read_trial(tmp_path / "t") is None
    fields: dict[str, Any] = {
        "values": {"adapter.hidden": 8},
        "status": "failed",
        "seconds": 2.5,
        "error": "OSError: disk",
    }
    write_trial(tmp_path / "t", TrialRecord(**fields))
    assert read_trial(tmp_path / "t") == trial("t", None, **fields)
    assert json.loads((tmp_path / "t" / "trial.json").read_text()) == fields
    (tmp_path / "t" / "trial.json").write_text("{")
    with pytest.raises(UserError, match=r"t/trial\.json: cannot be read"):
        read_trial(tmp_path / "t")


def test_error_of_a_stopped_trial_does_not_change_its_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sweep stops the trial, and its process then fails because its resources are gone."""

    values = {"adapter.hidden": 8}
    base = hybrid_of(tmp_path)
    folder = base.runs_folder / trial_name(values)
    write_reason(folder, "error of an earlier run")

    def stop_and_fail(*_: object) -> None:
        assert read_reason(folder) == ""
        write_trial(folder, TrialRecord(values=values, status="stopped early", seconds=2.5))
        raise RuntimeError("the placement group was removed")

    from hybrid.cluster import tuner

    monkeypatch.setattr(tuner, "check", stop_and_fail)
    tuner._train_trial(values, configs.to_dict(base))
    read = read_trial(folder)
    assert read is not None and read.status == "stopped early" and read.error == ""
    assert read.seconds == 2.5
    assert read_reason(folder) == "RuntimeError: the placement group was removed"


@pytest.mark.parametrize(
    ("values", "stored"),
    [
        ([8, 16], [8, 16]),
        ([1e-3, 2e-3], [1e-3, 2e-3]),
        ([True, False], [True, False]),
        (["auto", 3], ["auto", "3"]),
        ([True, 3], ["True", "3"]),
        ([None, 3], [None, 3]),
        ([None, None], [None, None]),
        ([1, 2.5], [1.0, 2.5]),
        ([2**63, 1], [str(2**63), "1"]),
    ],
)
def test_parquet_stores_values_of_mixed_types(
    values: list[Any], stored: list[Any], tmp_path: Path
) -> None:
    trials = [trial(str(n), 5 - n, values={HIDDEN.key: value}) for n, value in enumerate(values)]
    write_results(tmp_path / "sweep.parquet", trials, [HIDDEN])
    table = pq.read_table(tmp_path / "sweep.parquet")
    assert table[HIDDEN.key].to_pylist() == stored
    assert table["trial"].to_pylist() == ["0", "1"] and table["right"].to_pylist() == [5, 4]
    assert table["step"].to_pylist() == [12, 12] and table["error"].to_pylist() == [None, None]
    assert [path.name for path in tmp_path.iterdir()] == ["sweep.parquet"]


def test_parquet_of_only_failed_trials_is_valid(tmp_path: Path) -> None:
    write_results(tmp_path / "t", [trial("a", None, status="failed", error="OSError: x")], [HIDDEN])
    [row] = pq.read_table(tmp_path / "t").to_pylist()
    assert row["objective"] is None and row["error"] == "OSError: x"


def test_best_yaml_is_a_loadable_config(tmp_path: Path) -> None:
    config = hybrid_of(tmp_path, sweep={"space": {HIDDEN.key: {"choice": [8, 16, 32]}}})
    best = trial("b", 3, values={HIDDEN.key: 32, LR.key: 0.005})
    failed = trial("c", 9, status="failed")
    (tmp_path / "best.yaml").write_text(best_yaml(config, [trial("a", 1), best, failed]))
    loaded = configs.load(tmp_path / "best.yaml")
    assert (loaded.adapter.hidden, loaded.adapter.lr) == (32, 0.005)
    assert loaded.logging.run == "run-best" and not loaded.sweep.space
    assert loaded.data == config.data and loaded.paths == config.paths
    first, second = (tmp_path / "best.yaml").read_text().splitlines()[:2]
    assert first == "# The best of 2 trials, b: adapter.hidden=32, adapter.lr=0.005"
    assert second.startswith("# Held-out training tasks right at step 12: 3/9 = 33.3%")


def test_line_break_in_a_value_stays_inside_the_yaml_comment(tmp_path: Path) -> None:
    multiline = trial("a", 1, values={"llama.model": "x\nlogging: {run: y}"})
    (tmp_path / "best.yaml").write_text(best_yaml(hybrid_of(tmp_path), [multiline]))
    loaded = configs.load(tmp_path / "best.yaml")
    assert loaded.llama.model == "x\nlogging: {run: y}" and loaded.logging.run == "run-best"


def test_best_yaml_without_a_score_raises(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no trial of the sweep has a score"):
        best_yaml(hybrid_of(tmp_path), [trial("a", 5, status="failed"), trial("b", None)])


def test_printed_ranking_lists_failed_trials_with_their_errors() -> None:
    failed = trial("x", None, status="failed", error="OutOfMemoryError: 3 GiB")
    text = format_ranking([failed, trial("a", 1), trial("b", 2)], [HIDDEN, LR])
    lines = text.splitlines()
    assert [line.split()[0] for line in lines[1:4]] == ["1", "2", "3"]
    assert "2/9 = 22.2%" in lines[1] and "failed" in lines[3]
    assert "x failed: OutOfMemoryError: 3 GiB" in lines
    assert lines[-1].startswith("scores are on held-out training tasks; the best of 2 was selected")


class Page(HTMLParser):
    """Parser that collects tags, attributes and text, and asserts that tags are nested."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "path"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def count(self, tag: str, kind: str = "") -> int:
        return sum(t == tag and (not kind or a.get("class") == kind) for t, a in self.tags)


def render(tmp_path: Path, trials: list[Trial], axes: list[Axis], title: str = "run") -> Page:
    write_report(tmp_path / "report.html", title, trials, axes)
    text = (tmp_path / "report.html").read_text()
    inserted = [title, *(str(value) for t in trials for value in t.values.values())]
    if not any("{{" in value for value in inserted):
        assert "{{" not in text, "a placeholder was not replaced"
    assert not re.search(r"https?:|//|@import|url\(|src=|href=", text.replace("default-src=", ""))
    for number in re.findall(r'\s(?:c[xy]|[xyr])="([^"]*)"', text):
        assert 0 <= float(number) <= 300
    return Page(text)


def test_report_has_one_dot_per_scored_trial_and_panel_and_marks_the_best(tmp_path: Path) -> None:
    trials = [
        trial("a", 1, values={HIDDEN.key: 8, LR.key: 1e-4}),
        trial("b", 3, values={HIDDEN.key: 32, LR.key: 1e-2}),
        trial("c", None, status="failed", error="x"),
    ]
    page = render(tmp_path, trials, [HIDDEN, LR])
    assert page.count("circle") == 4 and page.count("circle", "dot best") == 2
    assert page.count("polyline") == 2 and page.count("polyline", "line best") == 1
    assert page.count("figure") == 3 and page.count("tr") == 4
    assert "3 trials: 2 done, 1 failed" in page.text
    xs = sorted(float(a["cx"] or 0) for t, a in page.tags if t == "circle")
    assert xs[0] == 44 and xs[-1] == 288, "the dots are not at the ends of the logarithmic axis"


@pytest.mark.parametrize(
    "trials",
    [
        [],
        [trial("a", 0, 0.0)],
        [trial("a", 2), trial("b", 2), trial("c", 2)],
        [trial("a", None, status="failed", error="x"), trial("b", None, status="unfinished")],
        [trial("a", 9, 1.0, status="failed", error="x")],
    ],
    ids=["no trials", "score zero", "ties", "no score", "only failed"],
)
def test_report_is_valid_html_for_degenerate_sweeps(tmp_path: Path, trials: list[Trial]) -> None:
    page = render(tmp_path, trials, [HIDDEN, LR])
    assert page.count("figure") == 3 and page.count("tr") == len(trials) + 1


@pytest.mark.parametrize("hostile", ['<script>alert("x")</script>', "{{table}}", "&lt;'\"><b>"])
def test_report_escapes_user_input(tmp_path: Path, hostile: str) -> None:
    axis = Axis(key="llama.model", kind="choice", values=(hostile, "b"))
    trials = [
        trial("a", 1, values={axis.key: hostile}),
        trial("b", None, values={axis.key: "b"}, status="failed", error=hostile),
    ]
    page = render(tmp_path, trials, [axis], title=hostile)
    plain = render(tmp_path, trials, [axis], title="run")
    assert page.count("script") == page.count("b") == 0
    assert page.text.count(hostile) >= 5
    assert [tag for tag, _ in page.tags] == [tag for tag, _ in plain.tags]
