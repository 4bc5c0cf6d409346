"""The benchmarks measure the quantities that they report."""

from __future__ import annotations

import importlib
import json
import time
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import (
    canvas,
    checkpoints,
    measure,
    page,
    ray_overhead,
    steps,
    stream,
    vote,
)
from benchmarks.__main__ import BENCHMARKS
from hybrid.arc import grid_to_string
from hybrid.dataset import Dataset, prepare
from hybrid.trm import TRM, TRMConfig

CPU = torch.device("cpu")
TINY = TRMConfig(
    hidden_size=16,
    num_heads=2,
    expansion=1,
    L_layers=1,
    H_cycles=1,
    L_cycles=1,
    halt_max_steps=2,
    puzzle_emb_ndim=16,
    puzzle_emb_len=1,
    seq_len=9,
    num_puzzle_identifiers=5,
)


def test_flops_per_step_match_the_paper() -> None:
    """The full config takes 398 GFLOP per training step, 239 forward; 3.82 TFLOP in 16 steps."""
    full = TRMConfig()
    assert steps.flops(full, train=True) == pytest.approx(398e9, rel=5e-3)
    assert steps.flops(full, train=False) == pytest.approx(239e9, rel=5e-3)
    assert 16 * steps.flops(full, train=False) == pytest.approx(3.82e12, rel=5e-3)


def test_sides_alternate_and_ratios_are_computed_per_round() -> None:
    turns: list[str] = []
    seconds = measure.in_turns(
        {
            "slow": lambda: (turns.append("slow"), time.sleep(0.02)),
            "fast": lambda: (turns.append("fast"), time.sleep(0.005)),
        },
        rounds=3,
        calls=2,
    )
    assert turns == ["slow", "slow", "fast", "fast"] * 3
    assert all(0.02 <= value < 0.2 for value in seconds["slow"])
    assert measure.faster([2.0, 4.0, 9.0], [1.0, 1.0, 1.0]) == {
        "median": 4.0,
        "from": 3.0,
        "to": 6.5,
    }
    assert measure.faster([3.0], [2.0]) == {"median": 1.5, "from": 1.5, "to": 1.5}


def test_recorded_results_include_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    for number in (1, 2):
        measure.record("thing", [{"ms": number}])
    newest = json.loads((tmp_path / "thing.json").read_text())
    assert newest["found"] == [{"ms": 2}]
    assert newest["torch"] == torch.__version__ and newest["processor"] and newest["commit"]
    lines = (tmp_path / "history.jsonl").read_text().splitlines()
    assert [json.loads(line)["found"][0]["ms"] for line in lines] == [1, 2]
    measure.record("thing", [{"ms": 3}], tmp_path / "elsewhere")
    assert json.loads((tmp_path / "elsewhere" / "thing.json").read_text())["found"] == [{"ms": 3}]


def test_commit_is_unknown_without_git(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COMMIT", raising=False)
    monkeypatch.setenv("PATH", "")
    assert measure.commit() == "unknown"
    monkeypatch.setenv("COMMIT", "abc1234")
    assert measure.commit() == "abc1234"


@pytest.mark.parametrize(
    "sides",
    [
        ["plain", "eager", "plain bfloat16", "eager bfloat16"],
        pytest.param(
            ["compiled", "plain", "compiled bfloat16", "plain compiled"], marks=pytest.mark.slow
        ),
        pytest.param(["compiled static", "plain"], marks=pytest.mark.slow),
    ],
)
def test_steps_measures_every_side(sides: list[str]) -> None:
    lines = steps.compare("tiny", TINY, 4, CPU, sides, rounds=2, calls=1)
    assert [(line["what"], line["side"]) for line in lines] == [
        (what, side) for what in ("train", "evaluate") for side in sides
    ]
    for line in lines:
        assert line["times plain"]["median"] > 0 and line["ms"] > 0
        assert line["dtype"] == ("bfloat16" if "bfloat16" in line["side"] else "float32")
        assert line["floor ms"] > 0 and line["floor / time"] > 0
        acts = 1 if line["what"] == "train" else TINY.halt_max_steps
        assert line["samples/s"] == pytest.approx(4 * acts / line["ms"] * 1000, rel=1e-2)
        compared = line.get("times plain compiled", "")
        comparable = line["side"] in ("compiled", "plain compiled", "compiled static")
        assert bool(compared) == ("plain compiled" in sides and comparable)
    assert measure.table(lines).count("\n") == len(lines)


def test_out_of_memory_on_one_side_keeps_the_results_of_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    train = steps.Side.train

    def full(side: steps.Side, batch: dict[str, torch.Tensor]) -> None:
        if side.plain:
            raise torch.OutOfMemoryError("CUDA out of memory")
        train(side, batch)

    monkeypatch.setattr(steps.Side, "train", full)
    lines = steps.compare("tiny", TINY, 4, CPU, ["plain", "eager"], rounds=2, calls=1)
    assert [line["ms"] for line in lines if line["side"] == "plain"] == ["out of memory"] * 2
    assert all(line["ms"] > 0 for line in lines if line["side"] == "eager")
    assert measure.table(lines).count("out of memory") == 2


def test_alternation_continues_without_a_side_that_runs_out_of_memory() -> None:
    calls = iter(range(10))

    def full() -> None:
        if next(calls):
            raise torch.OutOfMemoryError("CUDA out of memory")

    seconds = measure.in_turns({"full": full, "small": lambda: None}, rounds=3)
    assert len(seconds.pop("small")) == 3 and not seconds


def test_memory_of_a_failed_side_is_free_when_it_is_released(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tensors: list[weakref.ref[torch.Tensor]] = []
    freed: list[bool] = []
    state = {"full": torch.zeros(3)}

    def full() -> None:
        local = torch.zeros(3)
        tensors.extend((weakref.ref(local), weakref.ref(state["full"])))
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(
        measure, "release_memory", lambda: freed.extend(ref() is None for ref in tensors)
    )
    measure.in_turns({"full": full}, rounds=2, drop=state.pop)
    assert freed == [True, True]


def test_side_that_fails_in_training_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    sides: list[weakref.ref[steps.Side]] = []
    alive: list[bool] = []
    train = steps.Side.train

    def full(side: steps.Side, batch: dict[str, torch.Tensor]) -> None:
        if side.plain and side.plain.t == 2:  # after the warm-up
            sides.append(weakref.ref(side))
            raise torch.OutOfMemoryError("CUDA out of memory")
        alive.extend(ref() is not None for ref in sides)
        train(side, batch)

    monkeypatch.setattr(steps.Side, "train", full)
    lines = steps.compare("tiny", TINY, 4, CPU, ["plain", "eager"], rounds=2, calls=1)
    assert [line["ms"] for line in lines if line["side"] == "plain"] == ["out of memory"] * 2
    assert alive and not any(alive)


def test_cpu_compares_compiled_with_compiled() -> None:
    sides = steps.sides_on(CPU)
    assert {"compiled", "plain compiled"} < set(sides)
    assert ("compiled bfloat16" in sides) == ("plain compiled bfloat16" in sides)
    assert "times plain compiled" in steps._columns(sides, CPU)


def test_all_sides_train_the_same_weights() -> None:
    config = replace(TINY, halt_exploration_prob=0.0)
    sides = {name: steps.Side(name, config, 4, CPU) for name in ("plain", "eager")}
    for seed in range(5):
        rows = steps.random_rows(config, 4, seed, CPU)
        for side in sides.values():
            side.train(rows)
    plain, eager = sides["plain"].plain, sides["eager"].state
    assert plain is not None and plain.t == eager.optimizer.t == 5
    plain_weights, initial = plain.model.state_dict(), TRM(config, seed=0).state_dict()
    for name, value in eager.model.state_dict().items():
        torch.testing.assert_close(plain_weights[name], value, rtol=0, atol=5e-6)
    assert any(not torch.equal(plain_weights[name], value) for name, value in initial.items())
    for name, value in eager.ema.values.items():
        torch.testing.assert_close(plain.values[name], value, rtol=0, atol=5e-6)


def test_stream_measures_opening_rows_and_memory(tmp_path: Path) -> None:
    challenges = tmp_path / "synthetic_challenges.json"
    challenges.write_text(json.dumps(stream.synthetic(5)))
    config = stream.DataConfig(training=(str(challenges),), evaluation=(), variants=2)
    assert stream.timed_prepare(config, tmp_path / "data") >= 0
    found = stream.measure_stream(tmp_path / "data")
    assert found["tasks"] == 5 and found["variants"] == 15 and found["rows/s"] > 0
    assert 0 <= found["open MiB"] <= found["peak MiB"] + 1


def test_vote_uses_the_same_tasks_on_both_canvases(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = vote.questions(tmp_path, "full", 3, 2)
    small = vote.questions(tmp_path, "bucketed", 3, 2)
    assert [q.task for q in full] == [q.task for q in small]
    assert {q.side for q in full} == {30} and min(q.side for q in small) < 30
    assert all(len(q.variants) == 2 for q in full)
    assert np.all([q.side >= max(q.task.test[0].input.shape) for q in small])


def test_checkpoint_sides_write_the_same_number_of_bytes(tmp_path: Path) -> None:
    small = ("data.variants=1", "trm.hidden_size=64", "trm.puzzle_emb_ndim=64", "data.max_side=10")
    rows = checkpoints.compare(tmp_path, *small, "trm.puzzle_emb_len=1")
    assert [(row["what"], row["side"]) for row in rows] == [
        (what, side) for what in ("save", "load") for side in ("torch", "ours", "bytes alone")
    ]
    assert len({row["MB"] for row in rows}) == 1
    assert all(row["times torch"]["median"] > 0 for row in rows)
    torch_mb = (tmp_path / "torch.pt").stat().st_size / 1e6
    assert rows[0]["MB"] == pytest.approx(torch_mb, rel=0.05)
    assert (tmp_path / "data" / "dataset.json").exists(), "dataset in another folder"


def test_performance_page_has_the_newest_results() -> None:
    """If this fails, run `python -m benchmarks.page`."""
    text = page.PAGE.read_text()
    assert page.filled(text) == text
    blocks = page.BLOCK.findall(text)
    assert len(blocks) >= 6 and all((measure.RESULTS / f"{name}.json").exists() for name in blocks)


def test_markdown_formats_one_line_per_row() -> None:
    ratio = {"median": 1.5, "from": 1.25, "to": 1.75}
    assert measure.markdown([{"side": "ours", "ms": 12345.6, "ratio": ratio}]).splitlines() == [
        "| side | ms | ratio |",
        "| --- | --- | --- |",
        "| ours | 12346 | 1.50 (1.25-1.75) |",
    ]


def test_make_bench_names_existing_modules() -> None:
    for module in BENCHMARKS.values():
        assert callable(importlib.import_module(module).main), module


def test_random_rows_are_on_the_requested_device() -> None:
    rows = steps.random_rows(TINY, 2, 0, torch.device("meta"))
    assert all(value.is_meta for value in rows.values())


def test_a_slower_side_has_a_speed_up_below_one() -> None:
    def run(step: float) -> dict[str, float]:
        return {"step": step, "overhead": 10 * step, "waiting": 0.25}

    runs = {0: [run(1.0), run(2.0)], 1: [run(2.0), run(4.0)], 2: [run(0.5), run(1.0)]}
    lines = ray_overhead.compare("some", runs)
    assert [line["side"] for line in lines] == list(ray_overhead.SIDES.values())
    assert [line["times one process"]["median"] for line in lines] == [1.0, 0.5, 2.0]
    assert [line["ms a step"] for line in lines] == [1500, 3000, 750]


def test_canvas_accuracy_counts_cells_of_tasks_of_both_sizes(tmp_path: Path) -> None:
    canvas.write_tasks(tmp_path / "tasks", 6)
    config = canvas.demo_config(tmp_path, "bucketed", 10)
    prepare(config.data, config.data_folder, say=lambda line: None)
    dataset = Dataset.open(config.data_folder, answers=True)
    assert sorted(dataset.sides) == [11, 11, 11, 16, 16, 16]

    # Three correct predictions, one with a wrong cell, one with only the first row, the rest empty.
    expected = []
    (tmp_path / "predictions").mkdir()
    for n, task in enumerate(dataset.tasks):
        tests: list[dict[str, Any]] = []
        for pair in task.test:
            assert pair.output is not None
            grid = pair.output.copy()
            if n == 3:
                grid[0, 0] = (grid[0, 0] + 1) % 10
            elif n == 4:
                assert len(grid) > 1
                grid = grid[:1]
            lines = grid_to_string(grid).splitlines()
            tests.append({"candidates": [{"grid": lines}] if n < 5 else []})
            expected.append({3: 1 - 1 / grid.size}.get(n, float(n < 3)))
        text = json.dumps({"tests": tests})
        (tmp_path / "predictions" / f"{task.id}.json").write_text(text)
    outputs = {"numerator": 3, "denominator": len(expected)}
    found = canvas.accuracy(tmp_path, dataset.tasks, {"scores": {"pass@2": {"outputs": outputs}}})
    assert found["right"].startswith(f"3/{len(expected)} = ")
    assert found["cells"] == round(float(np.mean(expected)), 3)
