"""Initial weights, initial carry, and the puzzle prefix."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from hybrid.trm import TRM, TRMConfig

Tiny = Callable[..., TRMConfig]
BatchOf = Callable[..., dict[str, Tensor]]

CUT_STD = 0.8796
"""Deviation of a unit normal truncated at two deviations."""


@pytest.mark.parametrize("mlp_t", [False, True])
def test_weights_have_the_documented_deviation(tiny: Tiny, mlp_t: bool) -> None:
    """The deviation of torch's trunc_normal_ would be 12% too small."""
    config = tiny(
        hidden_size=64, puzzle_emb_ndim=64, seq_len=62, pos_encodings="learned", mlp_t=mlp_t
    )
    model = TRM(config)
    checked = 0
    for name, weight in model.named_parameters():
        if name.startswith("q_head"):
            continue
        checked += 1
        std = 1 / math.sqrt(weight.shape[1])  # D for the embeddings, fan-in for the others
        error = float(weight.detach().std()) / std - 1
        # Five standard errors of 0.59 / sqrt(n), given the kurtosis.
        assert abs(error) < 5 * 0.59 / math.sqrt(weight.numel()), name
        largest = float(weight.detach().abs().max()) / (2 * std / CUT_STD)
        assert 0.97 < largest < 1.0001, name
        assert abs(float(weight.detach().mean())) < 5 * std / math.sqrt(weight.numel()), name
    assert checked == 7


def test_initial_states_have_deviation_one(tiny: Tiny) -> None:
    models = [TRM(tiny(hidden_size=64, puzzle_emb_ndim=64), seed=seed) for seed in range(60)]
    states = torch.cat([torch.cat((model.H_init, model.L_init)) for model in models])
    assert states.numel() == 7680
    assert float(states.std()) == pytest.approx(1.0, abs=5 * 0.59 / math.sqrt(7680))
    assert 2.25 < float(states.abs().max()) < 2.0001 / CUT_STD
    assert not any(torch.equal(model.H_init, model.L_init) for model in models)


def test_initial_halt_logit_is_minus_five_and_puzzle_table_zero(
    tiny: Tiny, batch_of: BatchOf
) -> None:
    model = TRM(tiny())
    assert model.puzzle_table.shape == (5, 8) and not model.puzzle_table.any()
    assert not model.q_head.weight.any()
    assert model.q_head.bias is not None and model.q_head.bias.tolist() == [-5.0, -5.0]
    batch = batch_of(model.config)
    out = model.act_step(model.initial_carry(batch), batch)[1]
    assert out.q_halt.tolist() == [-5.0] * 4 and out.q_halt.dtype == torch.float32


def test_seed_determines_every_weight(tiny: Tiny) -> None:
    torch.manual_seed(1)
    one = TRM(tiny(), seed=3).state_dict()
    torch.manual_seed(2)
    state = torch.get_rng_state()
    model = TRM(tiny(), seed=3)
    assert torch.equal(torch.get_rng_state(), state), "the global generator was advanced"
    assert all(torch.equal(value, one[name]) for name, value in model.state_dict().items())
    other = TRM(tiny(), seed=4).state_dict()
    drawn = [n for n in one if not n.startswith("q_head") and n != "puzzle_table"]
    assert not any(torch.equal(one[name], other[name]) for name in drawn)
    with torch.no_grad():
        for value in model.state_dict().values():
            value.fill_(7.0)
    model.init_weights(3)
    assert all(torch.equal(value, one[name]) for name, value in model.state_dict().items())


@pytest.fixture
def _poisoned_memory() -> Iterator[None]:
    """Fill uninitialised tensors with NaN or the largest integer."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("_poisoned_memory")
@pytest.mark.parametrize("positions", ["rope", "learned"])
def test_all_tensors_are_initialised(tiny: Tiny, batch_of: BatchOf, positions: str) -> None:
    model = TRM(tiny(pos_encodings=positions))
    assert all(value.isfinite().all() for value in model.state_dict().values())
    batch = batch_of(model.config)
    carry = model.initial_carry(batch)
    assert carry.halted.all() and not carry.steps.any()
    for held in (carry.z_H, carry.z_L, *carry.current.values()):
        assert held.isfinite().all()
        assert held.abs().max() < 100
    assert {n: (v.shape, v.dtype) for n, v in carry.current.items()} == {
        n: (v.shape, v.dtype) for n, v in batch.items()
    }


def embedded(model: TRM, batch: dict[str, Tensor]) -> Tensor:
    """Return x [B, P+L, D], the first block's input if both states are zero."""
    inputs: list[Tensor] = []
    with torch.no_grad():
        model.H_init.zero_()
        model.L_init.zero_()
        handle = model.blocks[0].register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
        model.act_step(model.initial_carry(batch), batch)
        handle.remove()
    return inputs[0]


@pytest.mark.parametrize("positions", ["rope", "learned", "none"])
@pytest.mark.parametrize("ndim", [8, 5, 20])
def test_puzzle_row_fills_the_prefix_from_its_start(
    tiny: Tiny, batch_of: BatchOf, ndim: int, positions: str
) -> None:
    """A row as wide as the model fills prefix position 0; the rest of the prefix is zero."""
    config = tiny(puzzle_emb_ndim=ndim, puzzle_emb_len=3, pos_encodings=positions)
    model = TRM(config)
    batch = batch_of(config)
    model.puzzle_table.normal_(generator=torch.Generator().manual_seed(0))
    x = embedded(model, batch)
    assert x.shape == (4, 3 + 6, 8)
    rows = model.puzzle_table[batch["puzzle_identifiers"].long()]
    prefix = torch.cat((rows, torch.zeros(4, 24 - ndim)), dim=1).view(4, 3, 8)
    expected = torch.cat((prefix, model.embed_tokens.detach()[batch["inputs"].long()]), dim=1)
    if positions == "learned":
        expected = (expected + model.embed_pos.detach()) / math.sqrt(2)
    torch.testing.assert_close(x, expected * math.sqrt(8), atol=1e-5, rtol=1e-5)
    if ndim == 8 and positions != "learned":
        assert x[:, 0].any() and not x[:, 1:3].any()


def test_without_puzzle_embeddings_there_is_no_prefix(tiny: Tiny, batch_of: BatchOf) -> None:
    model = TRM(tiny(puzzle_emb_ndim=0)).train()
    batch = batch_of(model.config)
    assert embedded(model, batch).shape == (4, 6, 8)
    assert model.act_step(model.initial_carry(batch), batch)[1].puzzle_rows is None


def test_given_puzzle_rows_replace_those_of_the_table(tiny: Tiny, batch_of: BatchOf) -> None:
    model = TRM(tiny()).eval()
    batch = batch_of(model.config)
    rows = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        given = model.act_step(model.initial_carry(batch), batch, puzzle_rows=rows)[1]
        blank = model.act_step(model.initial_carry(batch), batch)[1]
        model.puzzle_table[:4] = rows
        own = batch | {"puzzle_identifiers": torch.arange(4)}
        looked_up = model.act_step(model.initial_carry(own), own)[1]
    assert torch.equal(given.logits, looked_up.logits)
    assert (given.logits - blank.logits).abs().max() > 1e-3
