"""From trials to a ranking, a table, a config and a picture."""

from __future__ import annotations

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
    best_yaml,
    describe,
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


def trial(name: str, right: int | None = 0, cells: float = 0.5, **more: Any) -> Trial:
    curve = {}
    if right is not None:
        curve = {
            step: Validation(right=right, evaluated=9, cells=cells * step / 12) for step in (4, 12)
        }
    fixed = {"values": {HIDDEN.key: 8, LR.key: 1e-3}, "status": "done", "seconds": 1.5}
    return Trial(name=name, curve=curve, **(fixed | more))


def test_the_best_is_first_and_equals_are_in_the_order_of_names() -> None:
    order = [
        trial("e", 3, 0.1),
        trial("d", 2, 0.9, status="stopped early"),
        trial("b", 2, 0.8),
        trial("c", 2, 0.8),
        trial("z", None, status="unfinished"),
        trial("a", 9, 1.0, status="failed", error="OSError: x"),
        trial("f", None, status="failed", error="OSError: x"),
    ]
    assert [t.name for t in ranked(order[::-1])] == [t.name for t in order]


def test_a_trial_is_judged_by_its_newest_validation() -> None:
    curve = {
        12: Validation(right=1, evaluated=9, cells=0),
        4: Validation(right=5, evaluated=9, cells=0),
    }
    late = Trial(name="a", values={}, status="done", curve=curve, seconds=0)
    assert late.step == 12 and late.last is not None and late.last.right == 1
    empty = Trial(name="a", values={}, status="failed", curve={}, seconds=0)
    assert empty.step == 0 and empty.last is None


def test_a_noted_trial_is_read_again(tmp_path: Path) -> None:
    assert read_trial(tmp_path / "t") is None
    write_trial(tmp_path / "t", {"adapter.hidden": 8}, "failed", 2.5, "OSError: disk")
    read = read_trial(tmp_path / "t")
    assert read == trial(
        "t", None, values={"adapter.hidden": 8}, status="failed", seconds=2.5, error="OSError: disk"
    )
    (tmp_path / "t" / "trial.json").write_text("{")
    with pytest.raises(UserError, match=r"t/trial\.json: cannot be read"):
        read_trial(tmp_path / "t")


def test_what_a_trial_says_as_it_is_ended_does_not_change_how_it_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sweep ends it, and only then does it fall over what was taken from it."""

    values = {"adapter.hidden": 8}
    base = hybrid_of(tmp_path)
    folder = base.runs_folder / trial_name(values)
    write_reason(folder, "what an earlier one said")

    def ended(*_: object) -> None:
        assert read_reason(folder) == ""
        write_trial(folder, values, "stopped early", 2.5)
        raise RuntimeError("the placement group was removed")

    from hybrid.cluster import tuner

    monkeypatch.setattr(tuner, "check", ended)
    tuner._train_trial(values, configs.to_dict(base))
    read = read_trial(folder)
    assert read is not None and read.status == "stopped early" and read.error == ""
    assert read.seconds == 2.5
    assert read_reason(folder) == "RuntimeError: the placement group was removed"


@pytest.mark.parametrize(
    ("values", "read"),
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
def test_the_table_takes_values_of_any_kind(
    values: list[Any], read: list[Any], tmp_path: Path
) -> None:
    trials = [trial(str(n), 5 - n, values={HIDDEN.key: value}) for n, value in enumerate(values)]
    write_results(tmp_path / "sweep.parquet", trials, [HIDDEN])
    table = pq.read_table(tmp_path / "sweep.parquet")
    assert table[HIDDEN.key].to_pylist() == read
    assert table["trial"].to_pylist() == ["0", "1"] and table["right"].to_pylist() == [5, 4]
    assert table["step"].to_pylist() == [12, 12] and table["error"].to_pylist() == [None, None]
    assert [path.name for path in tmp_path.iterdir()] == ["sweep.parquet"]


def test_the_table_of_failures_alone_is_one(tmp_path: Path) -> None:
    write_results(tmp_path / "t", [trial("a", None, status="failed", error="OSError: x")], [HIDDEN])
    [row] = pq.read_table(tmp_path / "t").to_pylist()
    assert row["objective"] is None and row["error"] == "OSError: x"


def test_the_best_is_a_config_that_loads(tmp_path: Path) -> None:
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


def test_a_value_with_a_line_break_stays_in_its_comment(tmp_path: Path) -> None:
    strange = trial("a", 1, values={"llama.model": "x\nlogging: {run: y}"})
    (tmp_path / "best.yaml").write_text(best_yaml(hybrid_of(tmp_path), [strange]))
    loaded = configs.load(tmp_path / "best.yaml")
    assert loaded.llama.model == "x\nlogging: {run: y}" and loaded.logging.run == "run-best"


def test_without_a_score_there_is_no_best(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no trial of the sweep has a score"):
        best_yaml(hybrid_of(tmp_path), [trial("a", 5, status="failed"), trial("b", None)])


def test_the_ranking_is_printed_with_failures_and_their_reasons() -> None:
    bad = trial("x", None, status="failed", error="OutOfMemoryError: 3 GiB")
    said = describe([bad, trial("a", 1), trial("b", 2)], [HIDDEN, LR])
    lines = said.splitlines()
    assert [line.split()[0] for line in lines[1:4]] == ["1", "2", "3"]
    assert "2/9 = 22.2%" in lines[1] and "failed" in lines[3]
    assert "x failed: OutOfMemoryError: 3 GiB" in lines
    assert lines[-1].startswith("on held-out training tasks; the best of 2 is a lucky pick")


class Page(HTMLParser):
    """Whether tags are closed as they were opened; their attributes, and all text."""

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


def page(tmp_path: Path, trials: list[Trial], axes: list[Axis], title: str = "run") -> Page:
    write_report(tmp_path / "report.html", title, trials, axes)
    text = (tmp_path / "report.html").read_text()
    given = [title, *(str(value) for t in trials for value in t.values.values())]
    if not any("{{" in value for value in given):
        assert "{{" not in text, "a place that was not filled"
    assert not re.search(r"https?:|//|@import|url\(|src=|href=", text.replace("default-src=", ""))
    for number in re.findall(r'\s(?:c[xy]|[xyr])="([^"]*)"', text):
        assert 0 <= float(number) <= 300
    return Page(text)


def test_every_scored_trial_is_a_dot_a_panel_and_one_of_them_is_the_best(tmp_path: Path) -> None:
    trials = [
        trial("a", 1, values={HIDDEN.key: 8, LR.key: 1e-4}),
        trial("b", 3, values={HIDDEN.key: 32, LR.key: 1e-2}),
        trial("c", None, status="failed", error="x"),
    ]
    found = page(tmp_path, trials, [HIDDEN, LR])
    assert found.count("circle") == 4 and found.count("circle", "dot best") == 2
    assert found.count("polyline") == 2 and found.count("polyline", "line best") == 1
    assert found.count("figure") == 3 and found.count("tr") == 4
    assert "3 trials: 2 done, 1 failed" in found.text
    ends = sorted(float(a["cx"] or 0) for t, a in found.tags if t == "circle")
    assert ends[0] == 44 and ends[-1] == 288, "both ends of the logarithmic axis"


@pytest.mark.parametrize(
    "trials",
    [
        [],
        [trial("a", 0, 0.0)],
        [trial("a", 2), trial("b", 2), trial("c", 2)],
        [trial("a", None, status="failed", error="x"), trial("b", None, status="unfinished")],
        [trial("a", 9, 1.0, status="failed", error="x")],
    ],
    ids=["none", "one without a cell", "equals", "no score", "only failed"],
)
def test_the_report_stands_whatever_there_is_to_show(tmp_path: Path, trials: list[Trial]) -> None:
    found = page(tmp_path, trials, [HIDDEN, LR])
    assert found.count("figure") == 3 and found.count("tr") == len(trials) + 1


@pytest.mark.parametrize("hostile", ['<script>alert("x")</script>', "{{table}}", "&lt;'\"><b>"])
def test_what_comes_from_outside_is_text(tmp_path: Path, hostile: str) -> None:
    axis = Axis(key="llama.model", kind="choice", values=(hostile, "b"))
    trials = [
        trial("a", 1, values={axis.key: hostile}),
        trial("b", None, values={axis.key: "b"}, status="failed", error=hostile),
    ]
    found = page(tmp_path, trials, [axis], title=hostile)
    plain = page(tmp_path, trials, [axis], title="run")
    assert found.count("script") == found.count("b") == 0
    assert found.text.count(hostile) >= 5
    assert [tag for tag, _ in found.tags] == [tag for tag, _ in plain.tags]
