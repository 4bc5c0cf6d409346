"""The report embeds its input unchanged, and embedded text cannot act on the page."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from hybrid.arc import Task, grid_to_string, load_tasks
from hybrid.evaluate.report import CANDIDATES_SHOWN, write_report

HOSTILE = "</script><script>alert(1)</script><!--<script>{{data}}\u2028&amp;\"'"


@pytest.fixture(scope="module")
def tasks() -> list[Task]:
    return load_tasks("arc1-evaluation")[:12]


class Page(HTMLParser):
    """The elements of a page, in order, and the text of its scripts."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text = path.read_text(encoding="utf-8")
        self.feed(self.text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.elements and self.elements[-1][0] == "script" and data.strip():
            self.scripts.append(data)

    @property
    def data(self) -> Any:
        return json.loads(self.scripts[0])


def candidate(rows: list[str], votes: int = 1) -> dict[str, Any]:
    return {"grid": rows, "votes": votes, "confidence": 0.5}


def answer_rows(task: Task, test: int = 0) -> list[str]:
    answer = task.test[test].output
    assert answer is not None
    return grid_to_string(answer).split("\n")


def prediction(task: Task, candidates: list[dict[str, Any]]) -> dict[str, Any]:
    votes = {"candidates": candidates, "variants": 32, "empty": 2}
    spent = {"rows": 32, "act_steps": 512, "seconds": 1.5}
    return {"task": task.id, "tests": [votes] * len(task.test), "spent": spent}


def hybrid_prediction(task: Task, *, oracle: bool = False, text: str = "look") -> dict[str, Any]:
    first, second = candidate(["01"]), candidate(["10"])
    attempt = {"grid": ["01"], "confidence": 0.3, "feedback": text, "reasoning": text}
    found = {
        "attempts": [
            {**attempt, "stopped": False},
            {**attempt, "grid": [], "stopped": False},
            {**attempt, "grid": answer_rows(task), "stopped": True},
        ],
        "curve": [[first], [first], [second, first], [second, first]],
        "baseline": {"candidates": [first], "views": 40, "wanted": 64},
    }
    plain = prediction(task, [second, first])
    return plain | {
        "tests": [test | found for test in plain["tests"]],
        "oracle": oracle,
        "feedback": "oracle" if oracle else "confidence",
        "prompt": {"demonstrations": 4, "shown": 3, "tokens": 900},
        "spent": plain["spent"] | {"llm_tokens": 70_000, "attempts": 96},
        "baseline_spent": {"rows": 8, "act_steps": 128, "llm_tokens": 5000, "attempts": 8},
    }


def hybrid_results_of(tasks: list[Task], *, oracle: bool = False) -> dict[str, Any]:
    plain = results_of(tasks)
    scores = plain["scores"]
    other = {"run": "trm", "title": "trm alone", "oracle": False, "scores": scores}
    return plain | {
        "oracle": oracle,
        "feedback": "oracle" if oracle else "confidence",
        "curve": [{"attempt": n, "trying": 12, **scores} for n in (1, 2, 3, 4)],
        "baseline": {**scores, "views": 480, "wanted": 768, "spent": {"rows": 96}},
        "compare_to": [other | {"spent": plain["spent"]}],
    }


def results_of(tasks: list[Task], **changes: Any) -> dict[str, Any]:
    rate = {"numerator": 1.0, "denominator": 12, "value": 1 / 12, "low": 0.01, "high": 0.35}
    metrics = {"outputs": rate, "task_mean": rate, "tasks": rate}
    output = {"right@1": False, "right@2": False, "right_rank": None, "empty": 2}
    return {
        "title": "twelve tasks",
        "oracle": False,
        "protocol": {"variants": 32, "weights": "EMA"},
        "scores": {"pass@1": metrics, "pass@2": metrics},
        "coverage": {"1": rate, "10": rate},
        "spent": {"rows": 384, "act_steps": 6144, "seconds": 18.0},
        "notes": ["a subset"],
        "tasks": [
            {"id": task.id, "solved": False, "outputs": [output] * len(task.test)} for task in tasks
        ],
    } | changes


def test_embedded_data_equals_the_input(tmp_path: Path, tasks: list[Task]) -> None:
    right = [candidate(answer_rows(tasks[0]), votes=29), candidate(["012", "345"])]
    results = results_of(tasks)
    write_report(tmp_path / "r.html", tasks, {tasks[0].id: prediction(tasks[0], right)}, results)
    data = Page(tmp_path / "r.html").data
    assert data["results"] == results
    first = data["tasks"][0]
    for [before, after], pair in zip(first["train"], tasks[0].train, strict=True):
        assert pair.output is not None
        assert before.split("|") == grid_to_string(pair.input).split("\n")
        assert after.split("|") == grid_to_string(pair.output).split("\n")
    test = first["tests"][0]
    assert test["answer"].split("|") == answer_rows(tasks[0])
    embedded = [{**c, "grid": c["grid"].split("|")} for c in test["candidates"]]
    assert embedded == [{**c, "rank": rank} for rank, c in enumerate(right, start=1)]
    assert (test["variants"], test["empty"], test["distinct"]) == (32, 2, 2)
    assert first["spent"] == {"rows": 32, "act_steps": 512, "seconds": 1.5}


def test_tasks_without_a_prediction_appear(tmp_path: Path, tasks: list[Task]) -> None:
    predicted = {task.id: prediction(task, []) for task in tasks[1::3]}
    write_report(tmp_path / "r.html", tasks, predicted, results_of(tasks))
    data = Page(tmp_path / "r.html").data
    assert [task["id"] for task in data["tasks"]] == [task.id for task in tasks]
    assert [len(task["tests"]) for task in data["tasks"]] == [len(task.test) for task in tasks]
    missing = [task["id"] for task in data["tasks"] if task["tests"][0]["variants"] is None]
    assert missing == [task.id for task in tasks if task.id not in predicted]


def test_low_ranked_correct_candidate_is_kept_and_others_counted(
    tmp_path: Path, tasks: list[Task]
) -> None:
    wrong = [candidate([f"{n:03d}"]) for n in range(40)]
    ranked = [*wrong[:30], candidate(answer_rows(tasks[0])), *wrong[30:]]
    predicted = {tasks[0].id: prediction(tasks[0], ranked)}
    write_report(tmp_path / "r.html", tasks[:1], predicted, results_of(tasks[:1]))
    test = Page(tmp_path / "r.html").data["tasks"][0]["tests"][0]
    ranks = [c["rank"] for c in test["candidates"]]
    assert ranks == [*range(1, CANDIDATES_SHOWN + 1), 31]
    assert test["candidates"][-1]["grid"] == test["answer"]
    assert test["distinct"] == 41


def test_hostile_text_adds_no_element_and_is_preserved(tmp_path: Path, tasks: list[Task]) -> None:
    write_report(tmp_path / "plain.html", tasks[:1], {}, results_of(tasks[:1]))
    evil = [replace(tasks[0], id=HOSTILE)]
    results = results_of(
        evil, title=HOSTILE, notes=[HOSTILE], protocol={HOSTILE: HOSTILE}, training={"x": HOSTILE}
    )
    write_report(tmp_path / "evil.html", evil, {HOSTILE: prediction(evil[0], [])}, results)
    page = Page(tmp_path / "evil.html")
    assert page.elements == Page(tmp_path / "plain.html").elements
    assert "<" not in page.scripts[0]
    assert page.data["tasks"][0]["id"] == HOSTILE
    assert page.data["results"] == results


def test_script_never_parses_text_as_html(tmp_path: Path, tasks: list[Task]) -> None:
    write_report(tmp_path / "r.html", tasks, {}, results_of(tasks))
    script = Page(tmp_path / "r.html").scripts[1]
    for sink in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
        assert sink not in script


def test_page_fetches_nothing(tmp_path: Path, tasks: list[Task]) -> None:
    write_report(tmp_path / "r.html", tasks, {}, results_of(tasks))
    page = Page(tmp_path / "r.html")
    for fetch in ("http://", "https://", "url(", "@import", "fetch(", "XMLHttpRequest", "import("):
        assert fetch not in page.text
    assert not [tag for tag, attributes in page.elements if {"src", "href"} & attributes.keys()]
    assert "link" not in {tag for tag, _ in page.elements}
    policies = [attributes.get("content") or "" for _, attributes in page.elements]
    assert any(policy.startswith("default-src 'none'") for policy in policies)


def test_unknown_answers_stay_unknown(tmp_path: Path, tasks: list[Task]) -> None:
    blind = [task.without_answers() for task in tasks]
    predicted = {task.id: prediction(task, [candidate(["01"])]) for task in blind}
    unscored = [
        {"id": task.id, "solved": None, "outputs": [{"right@1": None, "right@2": None}]}
        for task in blind
    ]
    results = results_of(blind, scores=None, coverage=None) | {"tasks": unscored}
    write_report(tmp_path / "r.html", blind, predicted, results)
    data = Page(tmp_path / "r.html").data
    assert all(test["answer"] is None for task in data["tasks"] for test in task["tests"])
    assert data["results"]["tasks"] == unscored


def test_nan_and_infinity_become_null(tmp_path: Path, tasks: list[Task]) -> None:
    results = results_of(tasks[:1], spent={"rows": math.nan, "seconds": math.inf, "act_steps": 1})
    write_report(tmp_path / "r.html", tasks[:1], {}, results)
    page = Page(tmp_path / "r.html")
    assert page.data["results"]["spent"] == {"rows": None, "seconds": None, "act_steps": 1}
    assert "NaN" not in page.scripts[0] and "Infinity" not in page.scripts[0]


def test_failed_write_leaves_the_old_report_and_no_temporary_file(
    tmp_path: Path, tasks: list[Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "r.html"
    path.write_text("the old report")

    def fail(source: Path, target: Path) -> None:
        assert Page(source).data["results"]["title"] == "twelve tasks", (
            "the temporary file is incomplete"
        )
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_report(path, tasks, {}, results_of(tasks))
    assert path.read_text() == "the old report"
    assert list(tmp_path.iterdir()) == [path]


def test_report_of_400_tasks_stays_below_4_mb(tmp_path: Path) -> None:
    tasks = load_tasks("arc1-evaluation")
    ranked = [candidate(["0123456789" * 2] * 20) for _ in range(50)]
    predicted = {task.id: prediction(task, ranked) for task in tasks}
    write_report(tmp_path / "r.html", tasks, predicted, results_of(tasks))
    assert (tmp_path / "r.html").stat().st_size < 4_000_000


def test_attempts_are_embedded_in_order_without_unused_data(
    tmp_path: Path, tasks: list[Task]
) -> None:
    predicted = {task.id: hybrid_prediction(task) for task in tasks}
    write_report(tmp_path / "r.html", tasks, predicted, hybrid_results_of(tasks))
    data = Page(tmp_path / "r.html").data
    assert data["results"] == hybrid_results_of(tasks)
    for task, shown in zip(tasks, data["tasks"], strict=True):
        assert shown["prompt"] == {"demonstrations": 4, "shown": 3, "tokens": 900}
        assert shown.keys() == {"id", "train", "tests", "spent", "prompt"}
        test = shown["tests"][0]
        assert [a["grid"] for a in test["attempts"]] == ["01", "", "|".join(answer_rows(task))]
        assert [a["stopped"] for a in test["attempts"]] == [False, False, True]
        assert test["most"] == 4
        assert not {"curve", "baseline"} & test.keys()


def test_embedded_attempts_hold_no_correctness(tmp_path: Path, tasks: list[Task]) -> None:
    predicted = {task.id: hybrid_prediction(task) for task in tasks}
    write_report(tmp_path / "r.html", tasks, predicted, hybrid_results_of(tasks))
    for task in Page(tmp_path / "r.html").data["tasks"]:
        for attempt in task["tests"][0]["attempts"]:
            assert attempt.keys() == {"grid", "confidence", "feedback", "reasoning", "stopped"}


def test_reasoning_text_adds_no_element_and_is_preserved(tmp_path: Path, tasks: list[Task]) -> None:
    for name, text in (("plain", "look"), ("evil", HOSTILE + "<img src=x onerror=alert(1)>")):
        predicted = {tasks[0].id: hybrid_prediction(tasks[0], text=text)}
        path = tmp_path / f"{name}.html"
        write_report(path, tasks[:1], predicted, hybrid_results_of(tasks[:1]))
    page = Page(tmp_path / "evil.html")
    assert page.elements == Page(tmp_path / "plain.html").elements
    assert "<" not in page.scripts[0]
    for attempt in page.data["tasks"][0]["tests"][0]["attempts"]:
        assert attempt["reasoning"] == attempt["feedback"] == text


@pytest.mark.parametrize("oracle", [True, False])
def test_oracle_banner_appears_only_for_oracle_results(
    tmp_path: Path, tasks: list[Task], oracle: bool
) -> None:
    predicted = {task.id: hybrid_prediction(task, oracle=oracle) for task in tasks}
    write_report(tmp_path / "r.html", tasks, predicted, hybrid_results_of(tasks, oracle=oracle))
    page = Page(tmp_path / "r.html")
    banners = [attributes for _, attributes in page.elements if attributes.get("role") == "alert"]
    assert [banner["class"] for banner in banners] == ["banner oracle"] * oracle
    assert ("ORACLE: the answers were looked at" in page.text) == oracle
    assert "{{" not in page.text


def test_trm_report_has_no_self_correction_data(tmp_path: Path, tasks: list[Task]) -> None:
    """The script draws self-correction only if these keys are present."""
    predicted = {task.id: prediction(task, [candidate(["01"])]) for task in tasks}
    results = results_of(tasks, feedback=None, compare_to=[])
    write_report(tmp_path / "r.html", tasks, predicted, results)
    page = Page(tmp_path / "r.html")
    assert not {"curve", "baseline"} & page.data["results"].keys()
    for task in page.data["tasks"]:
        assert task.keys() == {"id", "train", "tests", "spent"}
        assert not any({"attempts", "most"} & test.keys() for test in task["tests"])
    assert "oracle" not in {attributes.get("class") for _, attributes in page.elements}


def test_prompt_is_absent_without_a_language_model_or_a_prediction(
    tmp_path: Path, tasks: list[Task]
) -> None:
    alone = hybrid_prediction(tasks[0]) | {"prompt": None}
    write_report(tmp_path / "r.html", tasks[:2], {tasks[0].id: alone}, hybrid_results_of(tasks[:2]))
    first, second = Page(tmp_path / "r.html").data["tasks"]
    assert "prompt" not in first and "attempts" in first["tests"][0]
    assert "prompt" not in second and "attempts" not in second["tests"][0]
