"""Adapters: zero output before training, scales and shapes; and the variance of latents."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hybrid.adapters import STATES, AdapterConfig, LatentToTextAdapter, TextToLatentAdapter
from hybrid.train.joint import latent_variance

Cases = Callable[..., Any]
SHAPES = [(1, 1), (3, 5), (4, 2)]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def to_latent(seed: int = 0, **changes: Any) -> TextToLatentAdapter:
    return TextToLatentAdapter(24, 7, 8, AdapterConfig(**{"hidden": 16, **changes}), seed)


def randomized(adapter: TextToLatentAdapter) -> TextToLatentAdapter:
    with torch.no_grad():
        adapter.mlp.layers[-1].weight.normal_(generator=torch.Generator().manual_seed(9))
    return adapter


@pytest.mark.parametrize("inject", ["carry", "input", "both"])
@pytest.mark.parametrize("layers", [2, 3])
@pytest.mark.parametrize("rows", [1, 5])
def test_untrained_adapter_outputs_zeros_for_each_state(
    inject: Any, layers: int, rows: int
) -> None:
    deltas = to_latent(inject=inject, layers=layers)(drawn(rows, 24))
    assert tuple(deltas) == STATES[inject]
    for value in deltas.values():
        assert value.shape == (rows, 7, 8)
        assert not value.any()


def test_zero_initialised_last_layer_receives_gradient() -> None:
    """Zeros in both the last layer and the position table would block each other's gradient."""
    adapter = to_latent()
    sum(value.sum() for value in adapter(drawn(3, 24)).values()).backward()
    assert adapter.mlp.layers[-1].weight.grad.any()


def test_each_state_and_position_has_its_own_delta() -> None:
    adapter = randomized(to_latent(inject="both"))
    deltas = adapter(drawn(2, 24))
    assert not torch.equal(deltas["z_H"], deltas["z_L"]) and not torch.equal(
        deltas["z_H"], deltas["x"]
    )
    with torch.no_grad():
        adapter.positions[1, 3] = 0
    zeroed = adapter(drawn(2, 24))
    assert torch.equal(zeroed["z_H"], deltas["z_H"]) and torch.equal(zeroed["x"], deltas["x"])
    changed = (zeroed["z_L"] != deltas["z_L"]).any(-1)
    assert changed[:, 3].all() and changed.sum() == 2


def test_calibration_standardises_hidden_states() -> None:
    adapter = randomized(to_latent())
    sample = drawn(50, 24) * torch.linspace(0.1, 9, 24) + 1e3
    adapter.calibrate(sample)
    torch.testing.assert_close(adapter.mean, sample.mean(0))
    torch.testing.assert_close(adapter.std, sample.std(0))
    # A language model with shifted and scaled hidden states gives the same deltas.
    other = randomized(to_latent())
    other.calibrate((sample - 1e3) * 4)
    torch.testing.assert_close(
        adapter(sample)["z_H"], other((sample - 1e3) * 4)["z_H"], rtol=1e-2, atol=1e-3
    )


def test_constant_component_is_not_amplified() -> None:
    adapter = randomized(to_latent())
    sample = drawn(50, 24).double()
    sample[:, 5] = 3
    adapter.double().calibrate(sample)
    assert adapter.std[5] > 1e-4
    nudged = sample.clone()
    nudged[:, 5] += 1e-9
    torch.testing.assert_close(adapter(nudged)["z_H"], adapter(sample)["z_H"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_sample_without_variance_gives_finite_deltas(value: float) -> None:
    adapter = randomized(to_latent())
    adapter.calibrate(torch.full((4, 24), value))
    deltas = adapter(torch.full((2, 24), value))
    assert all(delta.isfinite().all() for delta in deltas.values())


@torch.no_grad()
def test_calibration_makes_latents_differ_between_rows() -> None:
    """About 99% of a hidden state is shared by all texts and would dominate the latents."""
    hidden = drawn(16, 24) * 0.05 + drawn(1, 24, seed=1) * 5
    adapter = randomized(to_latent())
    before = latent_variance(adapter(hidden)["z_H"])
    adapter.calibrate(hidden)
    assert float(before) < 0.1 < 0.7 < float(latent_variance(adapter(hidden)["z_H"]))


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("scale", [0.02, 3.0])
@pytest.mark.parametrize("size", [1e-2, 1.0, 1e3])
def test_soft_tokens_have_the_requested_scale(k: int, scale: float, size: float) -> None:
    adapter = LatentToTextAdapter(8, 24, scale, AdapterConfig(hidden=16, prefix_tokens=k), 0)
    tokens = adapter(drawn(3, 7, 8) * size, drawn(3, 7, 8, seed=1) * size)
    assert tokens.shape == (3, k, 24)
    torch.testing.assert_close(
        tokens.square().mean(-1).sqrt(), torch.full((3, k), scale), rtol=2e-2, atol=0
    )


@torch.no_grad()
def test_soft_tokens_have_the_scale_of_token_embeddings(case_of: Cases) -> None:
    case = case_of()
    backbone = case.model.reader.backbone
    table = backbone.model.get_input_embeddings().weight
    tokens = case.model.to_text(*case.model.trm.fresh_states(case.batch["inputs"]))
    assert tokens.shape == (3, 2, table.shape[1])
    ratio = tokens.square().mean().sqrt() / table.square().mean().sqrt()
    assert ratio.item() == pytest.approx(1, rel=1e-2)


def test_soft_tokens_depend_on_both_states_of_their_own_row() -> None:
    adapter = LatentToTextAdapter(8, 24, 1.0, AdapterConfig(hidden=16), 0)
    z_H, z_L = drawn(3, 7, 8), drawn(3, 7, 8, seed=1)
    tokens = adapter(z_H, z_L)
    for other in (adapter(z_H, z_L.roll(1, 0)), adapter(z_H.roll(1, 0), z_L)):
        assert (other - tokens).abs().amax((1, 2)).min() > 1e-3
    torch.testing.assert_close(adapter(z_H[[2, 0]], z_L[[2, 0]]), tokens[[2, 0]])
    assert (tokens[:, 0] - tokens[:, 1]).abs().max() > 1e-3, "all queries are equal"


def test_half_precision_states_are_pooled_in_float32() -> None:
    adapter = LatentToTextAdapter(8, 24, 1.0, AdapterConfig(hidden=16), 0)
    assert adapter(drawn(3, 7, 8).bfloat16(), drawn(3, 7, 8).bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("prefix", [0, 1, 3])
def test_adapters_cover_the_puzzle_prefix(case_of: Cases, prefix: int) -> None:
    case = case_of(perturbed=True, puzzle_emb_len=prefix, puzzle_emb_ndim=16 if prefix else 0)
    state, outputs, reading = case.model.attempt(case.initial_state())
    assert case.model.to_latent.positions.shape == (3, prefix + 16, 16)
    assert reading.hidden.shape == (3, 32)
    assert reading.delta.shape == (3, 3 * (prefix + 16), 16)
    assert state.z_H.shape == (3, prefix + 16, 16) and outputs.logits.shape == (3, 16, 12)


def test_seed_determines_weights_without_the_global_generator() -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    one, same, other = to_latent(seed=1), to_latent(seed=1), to_latent(seed=2)
    assert torch.equal(torch.get_rng_state(), state)
    weights = [adapter.mlp.layers[0].weight for adapter in (one, same, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_frozen_language_model_is_not_in_the_state_dict(case_of: Cases) -> None:
    frozen, learning = case_of(), case_of(llama={"frozen": False})
    assert {name.split(".")[0] for name in frozen.model.state_dict()} == {
        "trm",
        "to_latent",
        "to_text",
    }
    assert not any(p.requires_grad for p in frozen.model.reader.backbone.model.parameters())
    tuned = [p for name, p in learning.model.named_parameters() if name.startswith("llama.")]
    assert len(tuned) == 20 and all(p.requires_grad for p in tuned)
    for case in (frozen, learning):
        llm = case.model.train().reader.backbone.model
        assert case.model.to_text.training
        assert not any(module.training for module in llm.modules())


@pytest.mark.parametrize("wrong", [{"layers": 1}, {"prefix_tokens": 0}, {"hidden": 0}, {"lr": -1}])
def test_invalid_adapter_sizes_raise_value_error(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        AdapterConfig(**wrong)


@pytest.mark.parametrize("shape", SHAPES)
def test_identical_latents_have_no_variance(shape: tuple[int, int]) -> None:
    assert float(latent_variance(drawn(1, *shape).expand(6, *shape))) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("rows", [2, 8, 64])
def test_independent_latents_have_maximal_variance(rows: int) -> None:
    """The maximum for n rows is 1 - 1/n: their mean has 1/n of the power."""
    variance = float(latent_variance(drawn(rows, 40, 50)))
    assert variance == pytest.approx(1 - 1 / rows, abs=0.03)


def test_missing_zero_and_single_latents_have_no_variance() -> None:
    for latent in (None, torch.zeros(4, 3, 5), drawn(1, 3, 5)):
        assert float(latent_variance(latent)) == 0
