from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybrid.arc import EOS, PAD, Pair, Task, offset_range, parse_grid, tokenize_grid, tokens_to_grid


def test_decoding_matches_the_published_code(golden: Path) -> None:
    recorded = np.load(golden / "D_crop.npz")
    kinds = json.loads((golden / "D_crop.json").read_text())["kind"]
    ends = recorded["offsets"]
    assert len(kinds) == 200
    for i, kind in enumerate(kinds):
        expected = recorded["crops_flat"][ends[i] : ends[i + 1]].reshape(recorded["shapes"][i])
        decoded = tokens_to_grid(recorded["grids"][i])
        assert decoded.dtype == np.uint8
        # An empty rectangle is (0, 0) here, regardless of the recorded sides.
        assert decoded.shape == (expected.shape if expected.size else (0, 0)), (i, kind)
        assert decoded.tobytes() == expected.tobytes(), (i, kind)


def test_tokens_and_translations_match_the_published_code(golden: Path) -> None:
    recorded = np.load(golden / "E_translation.npz")
    rows = json.loads((golden / "E_augment.json").read_text())["translation"]
    for i, row in enumerate(rows):
        pair = Pair(input=parse_grid(row["inp"], "i"), output=parse_grid(row["out"], "o"))
        offset = (row["pad_r"], row["pad_c"])
        assert np.array_equal(tokenize_grid(pair.input, offset=offset), recorded["inp_seq"][i])
        assert np.array_equal(tokenize_grid(pair.grids[1], offset=offset), recorded["out_seq"][i])
        highest = offset_range(pair)
        assert offset[0] < highest[0] and offset[1] < highest[1]
    assert len(rows) == 50


def test_offset_range_is_the_number_of_offsets_that_fit() -> None:
    wide, tall = np.ones((2, 7), np.uint8), np.ones((5, 1), np.uint8)
    pair = Pair(input=wide, output=tall)
    assert offset_range(pair, canvas=8) == (4, 2)
    assert offset_range(Pair(input=wide, output=None), canvas=8) == (7, 2)
    tokenize_grid(tall, 8, (3, 1)), tokenize_grid(wide, 8, (3, 1))
    for grid, offset in ((tall, (4, 0)), (wide, (0, 2)), (wide, (-1, 0))):
        with pytest.raises(AssertionError, match="does not fit a canvas"):
            tokenize_grid(grid, 8, offset)


def test_real_grids_round_trip_through_tokens(sets: dict[str, list[Task]]) -> None:
    for task in (task for tasks in sets.values() for task in tasks):
        for grid in (grid for pair in task.pairs for grid in pair.grids):
            tokens = tokenize_grid(grid)
            assert np.array_equal(tokens_to_grid(tokens), grid), task.id
            labels = np.where(tokens == PAD, -100, tokens.astype(np.int64))
            assert np.array_equal(tokens_to_grid(labels), grid), task.id


@given(st.data())
def test_eos_borders_the_grid_on_any_canvas(data: st.DataObject) -> None:
    canvas = data.draw(st.integers(1, 30))
    height, width = data.draw(st.integers(1, canvas)), data.draw(st.integers(1, canvas))
    top, left = (data.draw(st.integers(0, canvas - side)) for side in (height, width))
    grid = np.full((height, width), data.draw(st.integers(0, 9)), np.uint8)
    tokens = tokenize_grid(grid, canvas, (top, left))
    assert tokens.shape == (canvas * canvas,) and tokens.dtype == np.uint8
    rows = tokens.reshape(canvas, canvas)
    for r, c in np.ndindex(canvas, canvas):
        inside_rows, inside_columns = top <= r < top + height, left <= c < left + width
        if inside_rows and inside_columns:
            expected = grid[0, 0] + 2
        elif (r == top + height and inside_columns) or (c == left + width and inside_rows):
            expected = EOS
        else:
            expected = PAD
        assert rows[r, c] == expected
    if (top, left) == (0, 0):
        assert np.array_equal(tokens_to_grid(tokens, canvas), grid)
    else:
        assert tokens_to_grid(tokens, canvas).shape == (0, 0)


def decode_by_brute_force(rows: np.ndarray) -> list[list[int]]:
    best: list[list[int]] = []
    for height, width in np.ndindex(len(rows) + 1, len(rows) + 1):
        block = rows[:height, :width]
        larger = block.size > sum(map(len, best))
        if larger and ((block >= 2) & (block <= 11)).all():
            best = (block - 2).tolist()
    return best


@given(st.integers(1, 6), st.integers(0, 2**32 - 1), st.sampled_from([0.05, 0.3, 0.9]))
def test_decoding_finds_the_largest_rectangle(side: int, seed: int, holes: float) -> None:
    generator = np.random.default_rng(seed)
    rows = generator.integers(2, 12, (side, side))
    rows[generator.random((side, side)) < holes] = generator.choice([-100, 0, 1, 12])
    assert tokens_to_grid(rows.ravel()).tolist() == decode_by_brute_force(rows)
