"""Parsing of sweep.space with all its errors, and reproducible sampling from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers import hybrid_of
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid.config import Config
from hybrid.errors import UserError
from hybrid.sweep import Axis, draw, parse_space, trial_config, trial_name


def config_of_space(space: dict[str, Any], **sweep: Any) -> Config:
    return hybrid_of(Path("/nowhere"), sweep={"space": space} | sweep)


def error_of(space: dict[str, Any], **sweep: Any) -> str:
    with pytest.raises(UserError) as caught:
        parse_space(config_of_space(space, **sweep))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_space_with_every_kind_is_parsed() -> None:
    space = {
        "adapter.hidden": {"grid": [8, 16]},
        "feedback.source": {"choice": ["none", "confidence"]},
        "training.ema_rate": {"uniform": [0.9, 0.999]},
        "adapter.lr": {"loguniform": [1e-4, 1e-2]},
        "training.max_attempts": {"int": [1, 4]},
    }
    axes = parse_space(config_of_space(space))
    assert {axis.key: {axis.kind: list(axis.values)} for axis in axes} == space


def test_relative_model_path_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray gives every trial its own working directory."""
    monkeypatch.chdir(tmp_path)
    error = error_of({"llama.model": {"choice": ["./model", "owner/name", "/model"]}})
    assert error == (
        "sweep.space.llama.model: relative path ./model depends on the trial's working directory;"
        f" write {tmp_path / 'model'}"
    )


def test_one_error_lists_all_problems() -> None:
    error = error_of(
        {
            "x": {"grid": [1]},
            "data.seed": {"grid": [1]},
            "adapter.hidden": {"choice": [0, 8]},
            "adapter.lr": {"loguniform": [0, 1]},
            "training.lr": {"uniform": [2, 1]},
            "training.clip_norm": {"normal": [1, 2]},
            "training.beta1": [0.1, 0.2],
            "training.max_attempts": {"int": [1.5, 2]},
            "training.act_steps": {"grid": [1, 1]},
        }
    )
    assert sorted(error.split("; ")) == sorted(
        [
            "sweep.space.x: must be of the form section.key",
            "sweep.space.data.seed: data cannot be swept over, all trials use the same tasks",
            "sweep.space.adapter.hidden: adapter.hidden=0: adapter.hidden must be at least 1,"
            " got 0",
            "sweep.space.adapter.lr: loguniform must be finite and above 0, got [0, 1]",
            "sweep.space.training.lr: uniform must be two numbers, the smaller one first,"
            " got [2, 1]",
            "sweep.space.training.clip_norm: 'normal' is not one of grid, choice, uniform,"
            " loguniform, int",
            "sweep.space.training.beta1: must be one of grid, choice, uniform, loguniform, int"
            " with its values",
            "sweep.space.training.max_attempts: int must be two integers, the smaller one"
            " first, got [1.5, 2]",
            "sweep.space.training.act_steps: grid has duplicate values: [1, 1]",
        ]
    )


@pytest.mark.parametrize(
    ("space", "expected"),
    [
        ({}, "sweep.space: names no key"),
        ({"adapter.hiden": {"grid": [8]}}, "did you mean adapter.hidden?"),
        ({"adaptor.hidden": {"grid": [8]}}, "did you mean adapter?"),
        ({"adapter.lr": {"grid": []}}, "grid must be a list of values"),
        ({"adapter.lr": {"grid": "1e-3"}}, "grid must be a list of values"),
        ({"adapter.lr": {"grid": [1e-3], "choice": [1]}}, "must be one of"),
        ({"adapter.lr": {"uniform": [0, float("inf")]}}, "must be finite"),
        ({"adapter.lr": {"uniform": [float("nan"), 1]}}, "two numbers"),
        ({"adapter.lr": {"uniform": [True, 2]}}, "two numbers"),
        ({"adapter.lr": {"uniform": [1, 2, 3]}}, "two numbers"),
        ({"training.ema_rate": {"uniform": [0.9, 1.5]}}, "ema_rate must be at most"),
        ({"feedback.source": {"choice": ["none", "votes"]}}, "got 'votes'"),
        ({"trm.num_heads": {"choice": [2, 3]}}, "not a multiple of num_heads 3"),
        ({"trm.seq_len": {"choice": [2, 3]}}, "cannot be set"),
        ({"sweep.num_samples": {"choice": [2, 3]}}, "cannot be swept over"),
        ({"cluster.num_workers": {"choice": [0, 1]}}, "cannot be swept over"),
        ({"evaluation.variants": {"choice": [1, 2]}}, "cannot be swept over"),
    ],
)
def test_invalid_space_is_rejected(space: dict[str, Any], expected: str) -> None:
    assert expected in error_of(space)


def test_continuous_range_for_an_integer_key_is_rejected() -> None:
    """Both ends are valid values; the values between them are not."""
    assert "training.max_attempts" in error_of({"training.max_attempts": {"uniform": [1, 4]}})


def test_integer_beyond_float_range_is_rejected() -> None:
    assert "training.seed" in error_of({"training.seed": {"int": [0, 10**400]}})


def test_integer_range_must_end_below_2_to_the_53() -> None:
    axes = parse_space(config_of_space({"training.seed": {"int": [2**53 - 2, 2**53 - 1]}}))
    drawn = {values["training.seed"] for values in draw(axes, 40, 0)}
    assert drawn == {2**53 - 2, 2**53 - 1}
    for large in (2**63, 10**400):
        assert "below 2**53" in error_of({"training.seed": {"int": [0, large]}})


@pytest.mark.parametrize("source", ["vote", "demos"])
def test_feedback_source_unavailable_in_training_is_rejected(source: str) -> None:
    assert source in error_of({"feedback.source": {"choice": ["none", source]}})


def test_grid_with_optuna_is_rejected() -> None:
    error = error_of({"adapter.hidden": {"grid": [8, 16]}}, search="optuna")
    assert error == "sweep.space.adapter.hidden: optuna cannot use grid; use choice"


numbers = st.floats(1e-6, 1e6)
ordered = st.tuples(numbers, numbers).filter(lambda ends: ends[0] < ends[1])
ints = st.tuples(st.integers(-(10**9), 10**9), st.integers(1, 5)).map(lambda p: (p[0], sum(p)))
values = st.lists(st.integers(0, 99), min_size=1, max_size=4, unique=True).map(tuple)
axes_ = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["uniform", "loguniform"]), ordered),
        st.tuples(st.just("int"), ints),
        st.tuples(st.sampled_from(["grid", "choice"]), values),
    ),
    min_size=1,
    max_size=4,
).map(lambda drawn: [Axis(key=f"a.{n}", kind=k, values=v) for n, (k, v) in enumerate(drawn)])


@settings(deadline=None, max_examples=200)
@given(axes_, st.integers(1, 12), st.integers(0, 2**32 - 1))
def test_draws_are_in_range_distinct_and_reproducible(
    axes: list[Axis], num_samples: int, seed: int
) -> None:
    drawn = draw(axes, num_samples, seed)
    assert drawn == draw(axes, num_samples, seed)
    assert draw(axes, num_samples + 3, seed)[: len(drawn)] == drawn, (
        "a larger num_samples changed the first trials"
    )
    names = [trial_name(trial) for trial in drawn]
    assert len(set(names)) == len(names) and drawn
    for trial in drawn:
        assert list(trial) == [axis.key for axis in axes]
        for axis in axes:
            value = trial[axis.key]
            if axis.kind in ("grid", "choice"):
                assert value in axis.values
            else:
                assert axis.values[0] <= value <= axis.values[1]
                assert axis.kind != "int" or isinstance(value, int)


def test_draw_contains_every_combination_of_grids() -> None:
    grids = [Axis(key=f"a.{n}", kind="grid", values=(1, 2, 3)) for n in range(2)]
    drawn = {tuple(trial.values()) for trial in draw(grids, 5, 0)}
    assert len(draw(grids, 5, 0)) == 9 and drawn == {(a, b) for a in (1, 2, 3) for b in (1, 2, 3)}
    axes = [*grids, Axis(key="b.x", kind="uniform", values=(0.0, 1.0))]
    assert len(draw(axes, 5, 0)) == 45


def test_int_range_includes_both_ends() -> None:
    axis = Axis(key="a.b", kind="int", values=(1, 3))
    assert {trial["a.b"] for trial in draw([axis], 60, 0)} == {1, 2, 3}


def test_different_seeds_give_different_draws() -> None:
    axis = Axis(key="a.b", kind="uniform", values=(0.0, 1.0))
    assert len({tuple(trial["a.b"] for trial in draw([axis], 3, seed)) for seed in range(20)}) == 20


def test_trial_config_is_the_experiment_with_the_trial_values(tmp_path: Path) -> None:
    config = hybrid_of(tmp_path)
    trial = trial_config(config, {"adapter.hidden": 64, "training.lr": 0.5})
    assert (trial.adapter.hidden, trial.training.lr) == (64, 0.5)
    assert trial.paths == config.paths and trial.trm == config.trm
    with pytest.raises(UserError, match=r"adapter\.hidden=0, training\.lr=0\.5: adapter"):
        trial_config(config, {"adapter.hidden": 0, "training.lr": 0.5})
