"""A trained language model keeps float32 weights with any compute dtype."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hybrid.llm.backbone import Backbone
from hybrid.trm import AdamAtan2, ExponentialMovingAverage

Tiny = Callable[..., Backbone]
PROBLEMS = ([5, 6, 7, 8, 9], [20, 21])
TEXTS = ([50, 51, 52], [60, 61, 62, 63, 64])
TRAINABLE = {"dtype": "bfloat16", "frozen": False}


@pytest.fixture(params=["attempt", "problem"])
def prefix(request: pytest.FixtureRequest) -> Iterator[str]:
    yield request.param


def hidden(backbone: Backbone, **how: Any) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    latent = 0.1 * torch.randn(2, 3, backbone.hidden_size, generator=generator)
    return backbone.read(backbone.prefill(PROBLEMS), latent, TEXTS, **how)


def trained(backbone: Backbone) -> dict[str, nn.Parameter]:
    return dict(backbone.model.model.named_parameters())


def train(backbone: Backbone, steps: int, lr: float) -> tuple[AdamAtan2, ExponentialMovingAverage]:
    """Train as joint training does; return the optimizer and the EMA."""
    parameters = trained(backbone)
    optimizer, ema = (
        AdamAtan2(parameters, weight_decay=0),
        ExponentialMovingAverage(parameters, 0.9),
    )
    for _ in range(steps):
        backbone.model.zero_grad()
        out = hidden(backbone)
        (out * torch.arange(out.numel()).view_as(out).cos()).sum().backward()
        optimizer.step(lr)
        ema.update()
    return optimizer, ema


def test_small_steps_change_every_weight_with_a_gradient(tiny: Tiny, prefix: str) -> None:
    backbone = tiny(**TRAINABLE, prefix=prefix)
    before = {name: weight.detach().clone() for name, weight in trained(backbone).items()}
    optimizer, ema = train(backbone, 30, 1e-5)
    for name, weight in trained(backbone).items():
        assert weight.grad is not None and weight.grad.dtype == weight.dtype == torch.float32
        learned = optimizer.v[name] > 0  # excludes embeddings of unused tokens
        assert learned.any() and (name.startswith("embed") or learned.all()), name
        assert (weight != before[name])[learned].all(), name
        assert (ema.values[name] != before[name])[learned].float().mean() > 0.99, name


def test_bfloat16_weights_would_hardly_change(tiny: Tiny) -> None:
    """Show that the test above detects weights that are not kept in float32."""
    backbone = tiny(**TRAINABLE)
    backbone.model.bfloat16()
    backbone = Backbone(backbone.model, backbone.tokenizer, backbone.config, "none")
    before = {name: weight.detach().clone() for name, weight in trained(backbone).items()}
    train(backbone, 30, 1e-5)
    moved = sum(int((w != before[name]).sum()) for name, w in trained(backbone).items())
    assert moved / sum(w.numel() for w in trained(backbone).values()) < 0.3


@torch.no_grad()
def test_untrained_model_computes_the_same_as_a_bfloat16_model(tiny: Tiny, prefix: str) -> None:
    learns, frozen = tiny(**TRAINABLE, prefix=prefix), tiny(dtype="bfloat16", prefix=prefix)
    for weight, other in zip(trained(learns).values(), trained(frozen).values(), strict=True):
        assert weight.dtype == torch.float32 and other.dtype == torch.bfloat16
        weight.copy_(other)
    assert learns.dtype == torch.bfloat16
    for one, other in zip(
        learns.prefill(PROBLEMS).layers, frozen.prefill(PROBLEMS).layers, strict=True
    ):
        assert all(map(torch.equal, one, other))
    # The last norm of the float32 model rounds once less.
    assert torch.equal(hidden(learns).bfloat16(), hidden(frozen).bfloat16())
    latent = torch.zeros(2, 0, learns.hidden_size)
    generated = [one.generate(one.prefill(PROBLEMS), latent, TEXTS, 5) for one in (learns, frozen)]
    assert generated[0] == generated[1]


def test_evaluation_and_training_compute_the_same(tiny: Tiny, prefix: str) -> None:
    backbone = tiny(**TRAINABLE, prefix=prefix)
    train(backbone, 2, 1e-3)
    with torch.no_grad():
        evaluated = hidden(backbone)
    for recompute in (True, False):
        assert torch.equal(hidden(backbone, recompute=recompute), evaluated)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_other_dtypes_compute_in_the_dtype_of_the_weights(tiny: Tiny, dtype: str) -> None:
    learns, frozen = tiny(dtype=dtype, frozen=False), tiny(dtype=dtype)
    assert {weight.dtype for weight in trained(learns).values()} == {getattr(torch, dtype)}
    assert torch.equal(hidden(learns), hidden(frozen))
