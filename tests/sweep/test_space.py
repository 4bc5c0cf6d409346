"""A space is understood or refused whole, and what is drawn from it is always the same."""

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


def problems(space: dict[str, Any], **sweep: Any) -> str:
    with pytest.raises(UserError) as caught:
        parse_space(config_of_space(space, **sweep))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_space_of_every_kind_is_understood() -> None:
    space = {
        "adapter.hidden": {"grid": [8, 16]},
        "feedback.source": {"choice": ["none", "confidence"]},
        "training.ema_rate": {"uniform": [0.9, 0.999]},
        "adapter.lr": {"loguniform": [1e-4, 1e-2]},
        "training.max_attempts": {"int": [1, 4]},
    }
    axes = parse_space(config_of_space(space))
    assert {axis.key: {axis.kind: list(axis.values)} for axis in axes} == space


def test_a_folder_that_each_trial_would_look_for_elsewhere_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray gives every trial another working directory."""
    monkeypatch.chdir(tmp_path)
    said = problems({"llama.model": {"choice": ["./mine", "owner/name", "/mine"]}})
    assert said == (
        "sweep.space.llama.model: ./mine is another folder to each trial: write"
        f" {tmp_path / 'mine'}"
    )


def test_all_problems_are_named_at_once() -> None:
    said = problems(
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
    assert sorted(said.split("; ")) == sorted(
        [
            "sweep.space.x: not a section.key",
            "sweep.space.data.seed: data cannot be swept over, all trials are asked the same",
            "sweep.space.adapter.hidden: adapter.hidden=0: adapter.hidden must be at least 1,"
            " got 0",
            "sweep.space.adapter.lr: loguniform must be finite and above 0: [0, 1]",
            "sweep.space.training.lr: uniform must be two numbers, the smaller one first,"
            " got [2, 1]",
            "sweep.space.training.clip_norm: 'normal' is not one of grid, choice, uniform,"
            " loguniform, int",
            "sweep.space.training.beta1: must be one of grid, choice, uniform, loguniform, int"
            " with its values",
            "sweep.space.training.max_attempts: int must be two whole numbers, the smaller one"
            " first, got [1.5, 2]",
            "sweep.space.training.act_steps: grid has a value twice: [1, 1]",
        ]
    )


@pytest.mark.parametrize(
    ("given", "says"),
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
def test_what_no_trial_could_have_is_refused(given: dict[str, Any], says: str) -> None:
    assert says in problems(given)


def test_fractions_of_a_whole_number_are_refused() -> None:
    """Both ends of the range are fine, nothing between them is."""
    assert "training.max_attempts" in problems({"training.max_attempts": {"uniform": [1, 4]}})


def test_numbers_beyond_any_float_are_refused() -> None:
    assert "training.seed" in problems({"training.seed": {"int": [0, 10**400]}})


def test_whole_numbers_end_where_not_every_one_is_a_number() -> None:
    axes = parse_space(config_of_space({"training.seed": {"int": [2**53 - 2, 2**53 - 1]}}))
    drawn = {values["training.seed"] for values in draw(axes, 40, 0)}
    assert drawn == {2**53 - 2, 2**53 - 1}
    for large in (2**63, 10**400):
        assert "below 2**53" in problems({"training.seed": {"int": [0, large]}})


@pytest.mark.parametrize("source", ["vote", "demos"])
def test_feedback_that_training_rows_cannot_have_is_refused(source: str) -> None:
    assert source in problems({"feedback.source": {"choice": ["none", source]}})


def test_optuna_is_not_asked_to_search_a_grid() -> None:
    said = problems({"adapter.hidden": {"grid": [8, 16]}}, search="optuna")
    assert said == "sweep.space.adapter.hidden: optuna searches no grid, use choice"


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
).map(lambda all_: [Axis(key=f"a.{n}", kind=k, values=v) for n, (k, v) in enumerate(all_)])


@settings(deadline=None, max_examples=200)
@given(axes_, st.integers(1, 12), st.integers(0, 2**32 - 1))
def test_draws_are_in_range_different_and_the_same_every_time(
    axes: list[Axis], num_samples: int, seed: int
) -> None:
    drawn = draw(axes, num_samples, seed)
    assert drawn == draw(axes, num_samples, seed)
    assert draw(axes, num_samples + 3, seed)[: len(drawn)] == drawn, (
        "more samples begin with the same"
    )
    names = [trial_name(one) for one in drawn]
    assert len(set(names)) == len(names) and drawn
    for one in drawn:
        assert list(one) == [axis.key for axis in axes]
        for axis in axes:
            value = one[axis.key]
            if axis.kind in ("grid", "choice"):
                assert value in axis.values
            else:
                assert axis.values[0] <= value <= axis.values[1]
                assert axis.kind != "int" or isinstance(value, int)


def test_every_combination_of_grids_is_there() -> None:
    grids = [Axis(key=f"a.{n}", kind="grid", values=(1, 2, 3)) for n in range(2)]
    found = {tuple(one.values()) for one in draw(grids, 5, 0)}
    assert len(draw(grids, 5, 0)) == 9 and found == {(a, b) for a in (1, 2, 3) for b in (1, 2, 3)}
    drawn = [*grids, Axis(key="b.x", kind="uniform", values=(0.0, 1.0))]
    assert len(draw(drawn, 5, 0)) == 45


def test_both_ends_of_whole_numbers_are_drawn() -> None:
    axis = Axis(key="a.b", kind="int", values=(1, 3))
    assert {one["a.b"] for one in draw([axis], 60, 0)} == {1, 2, 3}


def test_seeds_differ() -> None:
    axis = Axis(key="a.b", kind="uniform", values=(0.0, 1.0))
    assert len({tuple(one["a.b"] for one in draw([axis], 3, seed)) for seed in range(20)}) == 20


def test_a_trial_is_the_experiment_with_its_values(tmp_path: Path) -> None:
    config = hybrid_of(tmp_path)
    trial = trial_config(config, {"adapter.hidden": 64, "training.lr": 0.5})
    assert (trial.adapter.hidden, trial.training.lr) == (64, 0.5)
    assert trial.paths == config.paths and trial.trm == config.trm
    with pytest.raises(UserError, match=r"adapter\.hidden=0, training\.lr=0\.5: adapter"):
        trial_config(config, {"adapter.hidden": 0, "training.lr": 0.5})
