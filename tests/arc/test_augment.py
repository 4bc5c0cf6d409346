from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybrid.arc import DIHEDRAL, Augmentation, Task, parse_grid
from hybrid.errors import UserError

augmentations = st.builds(
    lambda k, colours: Augmentation(task="t", dihedral=k, colours=(0, *colours)),
    st.integers(0, 7),
    st.permutations(range(1, 10)),
)
grids = st.tuples(st.integers(1, 30), st.integers(1, 30), st.integers(0, 2**32 - 1)).map(
    lambda s: np.random.default_rng(s[2]).integers(0, 10, s[:2], dtype=np.uint8)
)


def test_transforms_and_inverses_match_the_published_code(golden: Path) -> None:
    recorded = json.loads((golden / "E_augment.json").read_text())
    assert len(recorded["items"]) == 50
    for item in recorded["items"]:
        augmentation = Augmentation.parse(item["aug_name"])
        grid = parse_grid(item["grid"], "grid")
        assert augmentation.task == item["task"]
        assert augmentation.name == item["aug_name"]
        assert augmentation.apply(grid).tolist() == item["transformed"]
        assert augmentation.invert(grid).tolist() == item["inverse_applied_to_grid"]
        undone = augmentation.invert(augmentation.apply(grid))
        assert undone.tolist() == item["inverse_of_transformed"]
    two_by_three = np.arange(6, dtype=np.uint8).reshape(2, 3)
    for k, pair in recorded["dihedral_2x3"].items():
        augmentation = Augmentation(task="x", dihedral=int(k))
        assert augmentation.apply(two_by_three).tolist() == pair["forward"]
        assert augmentation.invert(two_by_three).tolist() == pair["inverse"]


@given(augmentations, grids)
def test_invert_undoes_apply_and_the_name_round_trips(
    augmentation: Augmentation, grid: np.ndarray
) -> None:
    applied = augmentation.apply(grid)
    assert applied.dtype == np.uint8 and applied.flags.c_contiguous
    assert np.array_equal(augmentation.invert(applied), grid)
    assert np.array_equal(augmentation.apply(augmentation.invert(grid)), grid)
    assert Augmentation.parse(augmentation.name) == augmentation


def test_the_eight_transforms_differ() -> None:
    grid = np.arange(6, dtype=np.uint8).reshape(2, 3)
    assert len({(t(grid).shape, t(grid).tobytes()) for t in DIHEDRAL}) == 8


def test_the_identity_is_named_by_the_bare_id() -> None:
    assert Augmentation(task="abc").name == "abc"
    assert Augmentation.parse("abc") == Augmentation(task="abc")
    assert Augmentation.parse("abc|||t0|||0123456789") == Augmentation(task="abc")


def test_inverting_an_empty_grid_gives_an_empty_grid() -> None:
    empty = np.zeros((0, 0), np.uint8)
    assert Augmentation(task="a", dihedral=7).invert(empty).shape == (0, 0)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "|||t0|||0123456789",
        "a|||t8|||0123456789",
        "a|||t1|||1023456789",  # colour 0 moved
        "a|||t1|||0113456789",  # colour 1 twice
        "a|||t1|||012345678",
        "a|||t1|||01234567890",
        "a|||t1",
        "a|||",
        "a|||t1|||0123456789|||t1|||0123456789",
        "a|||t1|||0123456789\n",
        "a|||t1|||01234٥6789",  # an Arabic digit
    ],
)
def test_malformed_names_raise_a_user_error(name: str) -> None:
    with pytest.raises(UserError) as error:
        Augmentation.parse(name)
    assert repr(name) in str(error.value) and "\n" not in str(error.value)


def test_apply_task_augments_every_grid_the_same_way(toy: Task) -> None:
    augmentation = Augmentation.parse("toy|||t1|||0213456798")
    variant = augmentation.apply_task(toy)
    assert variant.id == augmentation.name
    for before, after in zip(toy.pairs, variant.pairs, strict=True):
        assert np.array_equal(augmentation.apply(before.input), after.input)
        assert before.output is not None and after.output is not None
        assert np.array_equal(augmentation.apply(before.output), after.output)
    assert augmentation.apply_task(toy.without_answers()) == variant.without_answers()
    assert len(variant.train) == len(toy.train)
