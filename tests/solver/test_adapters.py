"""The adapters: silent at first, in the right scale and shape; and the measure of a collapse."""

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


def loud(adapter: TextToLatentAdapter) -> TextToLatentAdapter:
    with torch.no_grad():
        adapter.mlp.layers[-1].weight.normal_(generator=torch.Generator().manual_seed(9))
    return adapter


@pytest.mark.parametrize("inject", ["carry", "input", "both"])
@pytest.mark.parametrize("layers", [2, 3])
@pytest.mark.parametrize("rows", [1, 5])
def test_an_untrained_adapter_says_nothing_to_each_state(
    inject: Any, layers: int, rows: int
) -> None:
    said = to_latent(inject=inject, layers=layers)(drawn(rows, 24))
    assert tuple(said) == STATES[inject]
    for value in said.values():
        assert value.shape == (rows, 7, 8)
        assert not value.any()


def test_silence_can_be_unlearned() -> None:
    """Zeros in the last layer, not in the table: of zeros in both neither would ever move."""
    adapter = to_latent()
    sum(value.sum() for value in adapter(drawn(3, 24)).values()).backward()
    assert adapter.mlp.layers[-1].weight.grad.any()


def test_every_state_and_position_has_its_own_word() -> None:
    adapter = loud(to_latent(inject="both"))
    said = adapter(drawn(2, 24))
    assert not torch.equal(said["z_H"], said["z_L"]) and not torch.equal(said["z_H"], said["x"])
    with torch.no_grad():
        adapter.positions[1, 3] = 0
    muted = adapter(drawn(2, 24))
    assert torch.equal(muted["z_H"], said["z_H"]) and torch.equal(muted["x"], said["x"])
    changed = (muted["z_L"] != said["z_L"]).any(-1)
    assert changed[:, 3].all() and changed.sum() == 2


def test_calibration_measures_from_the_mean_in_deviations() -> None:
    adapter = loud(to_latent())
    sample = drawn(50, 24) * torch.linspace(0.1, 9, 24) + 1e3
    adapter.calibrate(sample)
    torch.testing.assert_close(adapter.mean, sample.mean(0))
    torch.testing.assert_close(adapter.std, sample.std(0))
    # Shift and scale of the numbers are gone: the same news, told by another model.
    other = loud(to_latent())
    other.calibrate((sample - 1e3) * 4)
    torch.testing.assert_close(
        adapter(sample)["z_H"], other((sample - 1e3) * 4)["z_H"], rtol=1e-2, atol=1e-3
    )


def test_a_number_that_never_changes_is_not_blown_up() -> None:
    adapter = loud(to_latent())
    sample = drawn(50, 24).double()
    sample[:, 5] = 3
    adapter.double().calibrate(sample)
    assert adapter.std[5] > 1e-4
    nudged = sample.clone()
    nudged[:, 5] += 1e-9
    torch.testing.assert_close(adapter(nudged)["z_H"], adapter(sample)["z_H"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_sample_without_any_spread_gives_numbers(value: float) -> None:
    adapter = loud(to_latent())
    adapter.calibrate(torch.full((4, 24), value))
    assert all(said.isfinite().all() for said in adapter(torch.full((2, 24), value)).values())


@torch.no_grad()
def test_calibration_shows_news_that_the_mean_would_drown() -> None:
    """99% of a hidden state is the same whatever was read: without it all rows sound alike."""
    hidden = drawn(16, 24) * 0.05 + drawn(1, 24, seed=1) * 5
    adapter = loud(to_latent())
    before = latent_variance(adapter(hidden)["z_H"])
    adapter.calibrate(hidden)
    assert float(before) < 0.1 < 0.7 < float(latent_variance(adapter(hidden)["z_H"]))


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("scale", [0.02, 3.0])
@pytest.mark.parametrize("size", [1e-2, 1.0, 1e3])
def test_the_latent_has_the_scale_of_token_embeddings(k: int, scale: float, size: float) -> None:
    adapter = LatentToTextAdapter(8, 24, scale, AdapterConfig(hidden=16, prefix_tokens=k), 0)
    said = adapter(drawn(3, 7, 8) * size, drawn(3, 7, 8, seed=1) * size)
    assert said.shape == (3, k, 24)
    torch.testing.assert_close(
        said.square().mean(-1).sqrt(), torch.full((3, k), scale), rtol=2e-2, atol=0
    )


@torch.no_grad()
def test_the_scale_is_that_of_the_language_model(case_of: Cases) -> None:
    case = case_of()
    backbone = case.solver.reader.backbone
    table = backbone.model.get_input_embeddings().weight
    said = case.solver.to_text(*case.solver.trm.fresh_states(case.batch["inputs"]))
    assert said.shape == (3, 2, table.shape[1])
    ratio = said.square().mean().sqrt() / table.square().mean().sqrt()
    assert ratio.item() == pytest.approx(1, rel=1e-2)


def test_the_language_model_hears_of_both_states_and_of_each_row_its_own() -> None:
    adapter = LatentToTextAdapter(8, 24, 1.0, AdapterConfig(hidden=16), 0)
    z_H, z_L = drawn(3, 7, 8), drawn(3, 7, 8, seed=1)
    said = adapter(z_H, z_L)
    for other in (adapter(z_H, z_L.roll(1, 0)), adapter(z_H.roll(1, 0), z_L)):
        assert (other - said).abs().amax((1, 2)).min() > 1e-3
    torch.testing.assert_close(adapter(z_H[[2, 0]], z_L[[2, 0]]), said[[2, 0]])
    assert (said[:, 0] - said[:, 1]).abs().max() > 1e-3, "all queries ask the same"


def test_half_precision_states_are_pooled_in_float32() -> None:
    adapter = LatentToTextAdapter(8, 24, 1.0, AdapterConfig(hidden=16), 0)
    assert adapter(drawn(3, 7, 8).bfloat16(), drawn(3, 7, 8).bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("prefix", [0, 1, 3])
def test_adapters_know_the_puzzle_prefix(case_of: Cases, prefix: int) -> None:
    case = case_of(shaken=True, puzzle_emb_len=prefix, puzzle_emb_ndim=16 if prefix else 0)
    rows, outputs, reading = case.solver.attempt(case.begin())
    assert case.solver.to_latent.positions.shape == (3, prefix + 16, 16)
    assert reading.hidden.shape == (3, 32)
    assert reading.latent.shape == (3, 3 * (prefix + 16), 16)
    assert rows.z_H.shape == (3, prefix + 16, 16) and outputs.logits.shape == (3, 16, 12)


def test_a_seed_decides_the_weights_and_the_global_generator_is_left_alone() -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    one, same, other = to_latent(seed=1), to_latent(seed=1), to_latent(seed=2)
    assert torch.equal(torch.get_rng_state(), state)
    weights = [adapter.mlp.layers[0].weight for adapter in (one, same, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_a_frozen_language_model_is_no_part_of_the_hybrid(case_of: Cases) -> None:
    frozen, learning = case_of(), case_of(llama={"frozen": False})
    assert {name.split(".")[0] for name in frozen.solver.state_dict()} == {
        "trm",
        "to_latent",
        "to_text",
    }
    assert not any(p.requires_grad for p in frozen.solver.reader.backbone.model.parameters())
    tuned = [p for name, p in learning.solver.named_parameters() if name.startswith("llama.")]
    assert len(tuned) == 20 and all(p.requires_grad for p in tuned)
    for case in (frozen, learning):
        model = case.solver.train().reader.backbone.model
        assert case.solver.to_text.training
        assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("wrong", [{"layers": 1}, {"prefix_tokens": 0}, {"hidden": 0}, {"lr": -1}])
def test_sizes_that_make_no_adapter_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        AdapterConfig(**wrong)


@pytest.mark.parametrize("shape", SHAPES)
def test_identical_latents_have_no_variance(shape: tuple[int, int]) -> None:
    assert float(latent_variance(drawn(1, *shape).expand(6, *shape))) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("rows", [2, 8, 64])
def test_independent_latents_vary_as_much_as_they_can(rows: int) -> None:
    """Of n independent rows 1 - 1/n: their mean has an n-th of the power."""
    found = float(latent_variance(drawn(rows, 40, 50)))
    assert found == pytest.approx(1 - 1 / rows, abs=0.03)


def test_silence_and_single_rows_have_no_variance() -> None:
    for latent in (None, torch.zeros(4, 3, 5), drawn(1, 3, 5)):
        assert float(latent_variance(latent)) == 0
