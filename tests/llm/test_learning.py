"""A language model that learns keeps float32 weights, whatever dtype it computes in."""

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
LEARNS = {"dtype": "bfloat16", "frozen": False}


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
    """The optimiser and the average of a run of joint training."""
    parameters = trained(backbone)
    optimizer, average = (
        AdamAtan2(parameters, weight_decay=0),
        ExponentialMovingAverage(parameters, 0.9),
    )
    for _ in range(steps):
        backbone.model.zero_grad()
        out = hidden(backbone)
        (out * torch.arange(out.numel()).view_as(out).cos()).sum().backward()
        optimizer.step(lr)
        average.update()
    return optimizer, average


def test_small_steps_move_every_weight_that_has_a_gradient(tiny: Tiny, prefix: str) -> None:
    backbone = tiny(**LEARNS, prefix=prefix)
    before = {name: weight.detach().clone() for name, weight in trained(backbone).items()}
    optimizer, average = train(backbone, 30, 1e-5)
    for name, weight in trained(backbone).items():
        assert weight.grad is not None and weight.grad.dtype == weight.dtype == torch.float32
        learned = optimizer.v[name] > 0  # not the embeddings of tokens that no text has
        assert learned.any() and (name.startswith("embed") or learned.all()), name
        assert (weight != before[name])[learned].all(), name
        assert (average.values[name] != before[name])[learned].float().mean() > 0.99, name


def test_bfloat16_weights_would_hardly_move(tiny: Tiny) -> None:
    """The fault that float32 weights are for, so that the test above is known to notice it."""
    backbone = tiny(**LEARNS)
    backbone.model.bfloat16()
    backbone = Backbone(backbone.model, backbone.tokenizer, backbone.config, "none")
    before = {name: weight.detach().clone() for name, weight in trained(backbone).items()}
    train(backbone, 30, 1e-5)
    moved = sum(int((w != before[name]).sum()) for name, w in trained(backbone).items())
    assert moved / sum(w.numel() for w in trained(backbone).values()) < 0.3


@torch.no_grad()
def test_before_it_learns_it_computes_what_a_bfloat16_model_computes(
    tiny: Tiny, prefix: str
) -> None:
    learns, frozen = tiny(**LEARNS, prefix=prefix), tiny(dtype="bfloat16", prefix=prefix)
    for weight, other in zip(trained(learns).values(), trained(frozen).values(), strict=True):
        assert weight.dtype == torch.float32 and other.dtype == torch.bfloat16
        weight.copy_(other)
    assert learns.dtype == torch.bfloat16
    for one, other in zip(
        learns.prefill(PROBLEMS).layers, frozen.prefill(PROBLEMS).layers, strict=True
    ):
        assert all(map(torch.equal, one, other))
    # Its last norm rounds once less.
    assert torch.equal(hidden(learns).bfloat16(), hidden(frozen).bfloat16())
    latent = torch.zeros(2, 0, learns.hidden_size)
    said = [one.generate(one.prefill(PROBLEMS), latent, TEXTS, 5) for one in (learns, frozen)]
    assert said[0] == said[1]


def test_an_evaluation_computes_what_training_computes(tiny: Tiny, prefix: str) -> None:
    backbone = tiny(**LEARNS, prefix=prefix)
    train(backbone, 2, 1e-3)
    with torch.no_grad():
        evaluated = hidden(backbone)
    for recompute in (True, False):
        assert torch.equal(hidden(backbone, recompute=recompute), evaluated)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_other_dtypes_compute_as_they_are_kept(tiny: Tiny, dtype: str) -> None:
    learns, frozen = tiny(dtype=dtype, frozen=False), tiny(dtype=dtype)
    assert {weight.dtype for weight in trained(learns).values()} == {getattr(torch, dtype)}
    assert torch.equal(hidden(learns), hidden(frozen))
