"""Smaller canvases share weights and positions with the full canvas."""

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
INDICES = [*range(P), *CELLS]
"""Positions of the small canvas in the full sequence, computed independently."""
POSITIONS = ["rope", "learned", "none"]


def model_of(tiny: Tiny, side: int, seed: int = 1, **changes: Any) -> TRM:
    return TRM(tiny(seq_len=side**2, forward_dtype="float64", **changes), seed=seed)


def rows_of(side: int, rows: int = 3, seed: int = 0) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.randint(12, (2, rows, side**2), generator=draw, dtype=torch.int32)
    ids = torch.randint(5, (rows,), generator=draw, dtype=torch.int32)
    return {"inputs": tokens[0], "labels": tokens[1], "puzzle_identifiers": ids}


def pad_to_full(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the rows in the corner of a full canvas, surrounded by other tokens."""
    full = dict(batch)
    for name in ("inputs", "labels"):
        wide = torch.full((len(batch[name]), FULL**2), 7, dtype=torch.int32)
        wide[:, [cell - P for cell in CELLS]] = batch[name]
        full[name] = wide
    return full


def with_random_table(model: TRM) -> TRM:
    model.puzzle_table.normal_(generator=torch.Generator().manual_seed(3))
    return model


def recurse(model: TRM, batch: dict[str, Tensor], **keys: Any) -> tuple[Tensor, Tensor, Any]:
    z_H, z_L = model.fresh_states(batch["inputs"])
    return model.recurse(batch, z_H, z_L, **keys)


def test_rotary_angles_are_those_of_the_full_canvas(tiny: Tiny) -> None:
    model = model_of(tiny, FULL)
    full = model._rotary_table(P + FULL**2, torch.device("cpu"))
    small = model._rotary_table(P + SMALL**2, torch.device("cpu"))
    assert full is not None and small is not None
    for table, part in zip(full, small, strict=True):
        assert torch.equal(part, table[INDICES])
    for table, expected in zip(full, rotary_table(torch.arange(38), 4, 10000.0), strict=True):
        assert torch.equal(table, expected)
    assert not torch.equal(small[0], full[0][: len(INDICES)])
    again = model._rotary_table(P + FULL**2, torch.device("cpu"))
    assert again is not None and torch.equal(again[0], full[0]), (
        "the cache returned the table of another canvas"
    )


@pytest.mark.parametrize("side", range(1, FULL))
@pytest.mark.parametrize("prefix", [0, 2])
def test_position_indices_are_cells_of_the_full_canvas(tiny: Tiny, side: int, prefix: int) -> None:
    model = model_of(tiny, FULL, puzzle_emb_ndim=8 if prefix else 0)
    indices = model.position_indices(prefix + side**2)
    expected = [*range(prefix), *(prefix + FULL * r + c for r in range(side) for c in range(side))]
    assert indices is not None and indices.tolist() == expected
    assert model.position_indices(prefix + FULL**2) is None


@pytest.mark.parametrize("positions", [P + 15, P + 49, P + 37])
def test_position_indices_reject_sizes_that_are_no_canvas(tiny: Tiny, positions: int) -> None:
    with pytest.raises(AssertionError):
        model_of(tiny, FULL).position_indices(positions)


def test_mlp_t_rejects_a_smaller_canvas(tiny: Tiny) -> None:
    model = model_of(tiny, FULL, mlp_t=True, pos_encodings="learned")
    recurse(model, rows_of(FULL))
    with pytest.raises(AssertionError, match="mlp_t"):
        recurse(model, rows_of(SMALL))


@pytest.mark.parametrize("kind", POSITIONS)
def test_embedded_question_matches_the_full_canvas(tiny: Tiny, kind: Any) -> None:
    model = with_random_table(model_of(tiny, FULL, pos_encodings=kind))
    small, _ = model._embed(rows_of(SMALL), None)
    full, _ = model._embed(pad_to_full(rows_of(SMALL)), None)
    assert torch.equal(small, full[:, INDICES])


def small_model(model: TRM, tiny: Tiny, kind: Any) -> TRM:
    """Return a model whose full canvas is the small one, with the weights of `model`."""
    small = model_of(tiny, SMALL, seed=9, pos_encodings=kind)
    weights = model.state_dict()
    if kind == "learned":
        weights["embed_pos"] = weights["embed_pos"][INDICES]
    small.load_state_dict(weights)
    if kind == "rope":
        indices = torch.tensor(INDICES)
        small._rotary[P + SMALL**2] = rotary_table(indices, 4, small.config.rope_theta)
    return small


@pytest.mark.parametrize("kind", POSITIONS)
def test_small_canvas_matches_a_small_model_with_these_positions(tiny: Tiny, kind: Any) -> None:
    """Outputs and gradients of four ACT steps are equal bit for bit."""
    large = with_random_table(model_of(tiny, FULL, pos_encodings=kind))
    small = small_model(large, tiny, kind)
    batch = rows_of(SMALL)
    carries = [model.initial_carry(batch) for model in (large, small)]
    for _ in range(4):
        outputs = []
        for n, model in enumerate((large, small)):
            draws = (torch.zeros(3), torch.zeros(3))
            carries[n], out = model.act_step(carries[n], batch, exploration=draws)
            out.logits.square().sum().backward()
            outputs.append(out)
        assert torch.equal(outputs[0].logits, outputs[1].logits)
        assert torch.equal(outputs[0].q_halt, outputs[1].q_halt)
        assert torch.equal(carries[0].z_H, carries[1].z_H)
        assert outputs[0].logits.shape == (3, SMALL**2, 12)
    for name, weight in large.named_parameters():
        if name.startswith("q_head"):
            continue
        grad, expected = weight.grad, small.get_parameter(name).grad
        assert grad is not None and expected is not None
        if name == "embed_pos":
            assert torch.equal(grad[INDICES], expected)
            assert grad.any(1).nonzero().flatten().tolist() == INDICES
        else:
            assert torch.equal(grad, expected), name


@pytest.mark.parametrize("kind", ["rope", "learned"])
def test_contiguous_positions_give_other_outputs(tiny: Tiny, kind: Any) -> None:
    """Otherwise the test above would pass with any positions."""
    large = with_random_table(model_of(tiny, FULL, pos_encodings=kind))
    small = model_of(tiny, SMALL, pos_encodings=kind)
    weights = large.state_dict()
    if kind == "learned":
        weights["embed_pos"] = weights["embed_pos"][: P + SMALL**2]
    small.load_state_dict(weights)
    logits = [recurse(model, rows_of(SMALL))[2].logits for model in (large, small)]
    assert (logits[0] - logits[1]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", POSITIONS)
def test_small_canvas_matches_the_full_canvas_with_masked_attention(
    tiny: Tiny, kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only attention mixes cells, so masking the other cells must give the same outputs."""
    model = with_random_table(model_of(tiny, FULL, pos_encodings=kind))
    small = recurse(model, rows_of(SMALL))
    mask = torch.zeros(P + FULL**2, dtype=torch.bool)
    mask[INDICES] = True
    attention = F.scaled_dot_product_attention

    def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, attn_mask=mask.expand(q.shape[2], -1))

    monkeypatch.setattr("hybrid.trm.layers.F.scaled_dot_product_attention", masked)
    full = recurse(model, pad_to_full(rows_of(SMALL)))
    torch.testing.assert_close(small[0], full[0][:, INDICES], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(small[1], full[1][:, INDICES], rtol=1e-9, atol=1e-9)
    cells = [cell - P for cell in CELLS]
    torch.testing.assert_close(small[2].logits, full[2].logits[:, cells], rtol=1e-9, atol=1e-9)


def test_rotary_table_cached_in_inference_mode_works_in_training(tiny: Tiny) -> None:
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


def test_select_truncates_slots_to_their_canvas(tiny: Tiny) -> None:
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


def test_scatter_restores_slots_and_pads_with_zeros(tiny: Tiny) -> None:
    carry = drawn_carry(tiny)
    small, large = [4, 1, 2], [0, 3]
    parts = [(small, carry.select(small, SMALL**2)), (large, carry.select(large, FULL**2))]
    merged = carry.scatter(parts).to_tensors()
    for name, value in carry.to_tensors().items():
        expected = value.clone()
        if value.dim() > 1:
            width = SMALL**2 + (P if name.startswith("z") else 0)
            expected[small, width:] = 0
        assert merged[name].dtype == value.dtype and torch.equal(merged[name], expected), name


def test_scatter_of_a_small_canvas_keeps_the_full_width(tiny: Tiny) -> None:
    """The next batch may have larger canvases."""
    carry = drawn_carry(tiny)
    merged = carry.scatter([(slice(None), carry.select(slice(None), SMALL**2))])
    assert merged.z_H.shape == carry.z_H.shape and not merged.z_H[:, P + SMALL**2 :].any()
    assert torch.equal(merged.z_H[:, : P + SMALL**2], carry.z_H[:, : P + SMALL**2])
    assert carry.scatter([(slice(None), carry)]) is carry


@pytest.mark.parametrize("refilled", [SMALL, FULL])
def test_refilled_slot_may_change_its_canvas(tiny: Tiny, refilled: int) -> None:
    """The previous contents of a slot must not affect its next row."""
    model = with_random_table(model_of(tiny, FULL))
    carry = drawn_carry(tiny, 3).scatter([])  # zeros
    before = drawn_carry(tiny, 3)
    halted = torch.ones(3, dtype=torch.bool)
    dirty = Carry.from_tensors({**before.to_tensors(), "halted": halted}).select(
        slice(None), refilled**2
    )
    clean = Carry.from_tensors({**carry.to_tensors(), "halted": halted}).select(
        slice(None), refilled**2
    )
    draws = (torch.zeros(3), torch.zeros(3))
    logits = [
        model.act_step(start, rows_of(refilled), exploration=draws)[1].logits
        for start in (dirty, clean)
    ]
    assert torch.equal(*logits)
