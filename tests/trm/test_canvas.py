"""A smaller canvas is a part of the full one: same weights, same positions, fewer cells."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hybrid.trm import TRM, TRMConfig
from hybrid.trm.layers import rotary_table
from hybrid.trm.model import Carry

Tiny = Callable[..., TRMConfig]
FULL, SMALL, P = 6, 4, 2
CELLS = [P + FULL * row + column for row in range(SMALL) for column in range(SMALL)]
PLACES = [*range(P), *CELLS]
"""Where the small canvas' prefix and cells are in the full sequence, said another way."""
POSITIONS = ["rope", "learned", "none"]


def model_of(tiny: Tiny, side: int, seed: int = 1, **changes: Any) -> TRM:
    return TRM(tiny(seq_len=side**2, forward_dtype="float64", **changes), seed=seed)


def rows_of(side: int, rows: int = 3, seed: int = 0) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.randint(12, (2, rows, side**2), generator=draw, dtype=torch.int32)
    ids = torch.randint(5, (rows,), generator=draw, dtype=torch.int32)
    return {"inputs": tokens[0], "labels": tokens[1], "puzzle_identifiers": ids}


def on_full(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The rows in the corner of a full canvas, other tokens around them."""
    found = dict(batch)
    for name in ("inputs", "labels"):
        wide = torch.full((len(batch[name]), FULL**2), 7, dtype=torch.int32)
        wide[:, [cell - P for cell in CELLS]] = batch[name]
        found[name] = wide
    return found


def scattered(model: TRM) -> TRM:
    model.puzzle_table.normal_(generator=torch.Generator().manual_seed(3))
    return model


def recurse(model: TRM, batch: dict[str, Tensor], **keys: Any) -> tuple[Tensor, Tensor, Any]:
    z_H, z_L = model.fresh_states(batch["inputs"])
    return model.recurse(batch, z_H, z_L, **keys)


def test_rotary_angles_are_those_of_the_cells_on_the_full_canvas(tiny: Tiny) -> None:
    model = model_of(tiny, FULL)
    whole = model._rotary_table(P + FULL**2, torch.device("cpu"))
    few = model._rotary_table(P + SMALL**2, torch.device("cpu"))
    assert whole is not None and few is not None
    for table, part in zip(whole, few, strict=True):
        assert torch.equal(part, table[PLACES])
    for table, fresh in zip(whole, rotary_table(torch.arange(38), 4, 10000.0), strict=True):
        assert torch.equal(table, fresh)
    assert not torch.equal(few[0], whole[0][: len(PLACES)])
    again = model._rotary_table(P + FULL**2, torch.device("cpu"))
    assert again is not None and torch.equal(again[0], whole[0]), "one canvas took another's table"


@pytest.mark.parametrize("side", range(1, FULL))
@pytest.mark.parametrize("prefix", [0, 2])
def test_places_are_rows_and_columns_of_the_full_canvas(tiny: Tiny, side: int, prefix: int) -> None:
    model = model_of(tiny, FULL, puzzle_emb_ndim=8 if prefix else 0)
    places = model.position_indices(prefix + side**2)
    expected = [*range(prefix), *(prefix + FULL * r + c for r in range(side) for c in range(side))]
    assert places is not None and places.tolist() == expected
    assert model.position_indices(prefix + FULL**2) is None


@pytest.mark.parametrize("positions", [P + 15, P + 49, P + 37])
def test_what_is_no_square_of_the_canvas_is_refused(tiny: Tiny, positions: int) -> None:
    with pytest.raises(AssertionError):
        model_of(tiny, FULL).position_indices(positions)


def test_a_weight_for_every_cell_knows_no_smaller_canvas(tiny: Tiny) -> None:
    model = model_of(tiny, FULL, mlp_t=True, pos_encodings="learned")
    recurse(model, rows_of(FULL))
    with pytest.raises(AssertionError, match="mlp_t"):
        recurse(model, rows_of(SMALL))


@pytest.mark.parametrize("kind", POSITIONS)
def test_the_embedded_question_is_the_full_canvas_there(tiny: Tiny, kind: Any) -> None:
    model = scattered(model_of(tiny, FULL, pos_encodings=kind))
    few, _ = model._embed(rows_of(SMALL), None)
    whole, _ = model._embed(on_full(rows_of(SMALL)), None)
    assert torch.equal(few, whole[:, PLACES])


def native(model: TRM, tiny: Tiny, kind: Any) -> TRM:
    """A model whose full canvas is the small one, with the weights of the large one."""
    small = model_of(tiny, SMALL, seed=9, pos_encodings=kind)
    weights = model.state_dict()
    if kind == "learned":
        weights["embed_pos"] = weights["embed_pos"][PLACES]
    small.load_state_dict(weights)
    if kind == "rope":
        places = torch.tensor(PLACES)
        small._rotary[P + SMALL**2] = rotary_table(places, 4, small.config.rope_theta)
    return small


@pytest.mark.parametrize("kind", POSITIONS)
def test_it_is_the_model_of_that_canvas_with_these_positions(tiny: Tiny, kind: Any) -> None:
    """Bit for bit, through four ACT steps, and so are the gradients."""
    large = scattered(model_of(tiny, FULL, pos_encodings=kind))
    small = native(large, tiny, kind)
    batch = rows_of(SMALL)
    carries = [model.initial_carry(batch) for model in (large, small)]
    for _ in range(4):
        made = []
        for n, model in enumerate((large, small)):
            never = (torch.zeros(3), torch.zeros(3))
            carries[n], outputs = model.act_step(carries[n], batch, exploration=never)
            outputs.logits.square().sum().backward()
            made.append(outputs)
        assert torch.equal(made[0].logits, made[1].logits)
        assert torch.equal(made[0].q_halt, made[1].q_halt)
        assert torch.equal(carries[0].z_H, carries[1].z_H)
        assert made[0].logits.shape == (3, SMALL**2, 12)
    for name, weight in large.named_parameters():
        if name.startswith("q_head"):
            continue
        grad, theirs = weight.grad, small.get_parameter(name).grad
        assert grad is not None and theirs is not None
        if name == "embed_pos":
            assert torch.equal(grad[PLACES], theirs)
            assert grad.any(1).nonzero().flatten().tolist() == PLACES
        else:
            assert torch.equal(grad, theirs), name


@pytest.mark.parametrize("kind", ["rope", "learned"])
def test_positions_of_its_own_would_say_something_else(tiny: Tiny, kind: Any) -> None:
    """Else the test above would see nothing."""
    large = scattered(model_of(tiny, FULL, pos_encodings=kind))
    small = model_of(tiny, SMALL, pos_encodings=kind)
    weights = large.state_dict()
    if kind == "learned":
        weights["embed_pos"] = weights["embed_pos"][: P + SMALL**2]
    small.load_state_dict(weights)
    said = [recurse(model, rows_of(SMALL))[2].logits for model in (large, small)]
    assert (said[0] - said[1]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", POSITIONS)
def test_it_is_the_full_canvas_with_nobody_looking_beyond_the_small_one(
    tiny: Tiny, kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attention alone mixes cells: where no cell sees those beyond, the rest is the same."""
    model = scattered(model_of(tiny, FULL, pos_encodings=kind))
    few = recurse(model, rows_of(SMALL))
    seen = torch.zeros(P + FULL**2, dtype=torch.bool)
    seen[PLACES] = True
    attention = F.scaled_dot_product_attention

    def blinkered(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, attn_mask=seen.expand(q.shape[2], -1))

    monkeypatch.setattr("hybrid.trm.layers.F.scaled_dot_product_attention", blinkered)
    whole = recurse(model, on_full(rows_of(SMALL)))
    torch.testing.assert_close(few[0], whole[0][:, PLACES], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(few[1], whole[1][:, PLACES], rtol=1e-9, atol=1e-9)
    cells = [cell - P for cell in CELLS]
    torch.testing.assert_close(few[2].logits, whole[2].logits[:, cells], rtol=1e-9, atol=1e-9)


def test_a_table_made_in_inference_serves_training(tiny: Tiny) -> None:
    model = model_of(tiny, FULL)
    with torch.inference_mode():
        recurse(model, rows_of(SMALL))
    recurse(model, rows_of(SMALL))[2].logits.sum().backward()
    assert model.lm_head.weight.grad is not None


def drawn_carry(tiny: Tiny, rows: int = 5) -> Carry:
    model = model_of(tiny, FULL)
    carry = model.initial_carry(rows_of(FULL, rows))
    draw = torch.Generator().manual_seed(1)
    return Carry.from_tensors(
        {
            name: torch.randint(1, 9, value.shape, generator=draw).to(value.dtype)
            for name, value in carry.to_tensors().items()
        }
    )


def test_some_slots_of_a_carry_are_cut_to_their_canvas(tiny: Tiny) -> None:
    carry = drawn_carry(tiny)
    part = carry.select([3, 0], SMALL**2)
    assert part.z_H.shape == (2, P + SMALL**2, 8)
    assert torch.equal(part.z_H, carry.z_H[[3, 0], : P + SMALL**2])
    assert torch.equal(part.z_L, carry.z_L[[3, 0], : P + SMALL**2])
    assert torch.equal(part.steps, carry.steps[[3, 0]])
    assert part.current.keys() == carry.current.keys()
    assert torch.equal(part.current["labels"], carry.current["labels"][[3, 0], : SMALL**2])
    assert torch.equal(
        part.current["puzzle_identifiers"], carry.current["puzzle_identifiers"][[3, 0]]
    )


def test_parts_are_put_back_where_they_were_and_beyond_them_is_nothing(tiny: Tiny) -> None:
    carry = drawn_carry(tiny)
    small, large = [4, 1, 2], [0, 3]
    back = carry.scatter(
        [(small, carry.select(small, SMALL**2)), (large, carry.select(large, FULL**2))]
    ).to_tensors()
    for name, value in carry.to_tensors().items():
        expected = value.clone()
        if value.dim() > 1:
            kept = SMALL**2 + (P if name.startswith("z") else 0)
            expected[small, kept:] = 0
        assert back[name].dtype == value.dtype and torch.equal(back[name], expected), name


def test_a_carry_of_one_small_canvas_keeps_its_width(tiny: Tiny) -> None:
    """What the next batch brings may be larger."""
    carry = drawn_carry(tiny)
    back = carry.scatter([(slice(None), carry.select(slice(None), SMALL**2))])
    assert back.z_H.shape == carry.z_H.shape and not back.z_H[:, P + SMALL**2 :].any()
    assert torch.equal(back.z_H[:, : P + SMALL**2], carry.z_H[:, : P + SMALL**2])
    whole = carry.scatter([(slice(None), carry)])
    assert whole is carry


@pytest.mark.parametrize("refilled", [SMALL, FULL])
def test_a_slot_may_change_its_canvas_with_its_row(tiny: Tiny, refilled: int) -> None:
    """What a slot held before is not in what its next row starts from."""
    model = scattered(model_of(tiny, FULL))
    carry = drawn_carry(tiny, 3).scatter([])  # of the right widths
    before = drawn_carry(tiny, 3)
    halted = torch.ones(3, dtype=torch.bool)
    dirty = Carry.from_tensors({**before.to_tensors(), "halted": halted}).select(slice(None), refilled**2)
    clean = Carry.from_tensors({**carry.to_tensors(), "halted": halted}).select(slice(None), refilled**2)
    never = (torch.zeros(3), torch.zeros(3))
    said = [
        model.act_step(start, rows_of(refilled), exploration=never)[1].logits
        for start in (dirty, clean)
    ]
    assert torch.equal(*said)
