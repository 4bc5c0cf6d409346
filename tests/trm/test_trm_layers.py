"""Precision and formulas of the TRM's layers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hybrid.trm.layers import attend, rms_norm, rotary_table, rotate

ROTARY = rotary_table(torch.arange(7), 8, 10_000.0)


@pytest.mark.parametrize(
    "layer", [lambda x: rms_norm(x, 1e-5), lambda x: rotate(x, ROTARY)], ids=["rms_norm", "rotate"]
)
def test_bfloat16_result_is_the_float32_result_rounded(layer: Callable[[Tensor], Tensor]) -> None:
    x = 3 * torch.randn(4, 2, 7, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert layer(x).dtype == torch.bfloat16
    assert torch.equal(layer(x), layer(x.float()).bfloat16())
    wide = layer(x.double())
    assert wide.dtype == torch.float64
    torch.testing.assert_close(layer(x.float()), wide.float())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_attention_agrees_with_float64_to_the_rounding_of_its_dtype(dtype: str) -> None:
    """The error of the CPU's bfloat16 path is at most three times that of torch's kernel."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 11, 8, generator=generator, dtype=torch.float64) for _ in "qkv")
    rounded = [part.to(getattr(torch, dtype)).requires_grad_() for part in (q, k, v)]
    exact = [part.detach().double().requires_grad_() for part in rounded]
    errors = []
    for attention in (attend, F.scaled_dot_product_attention):
        out = attention(*rounded)
        exact_out = F.scaled_dot_product_attention(*exact)
        actual = [out, *torch.autograd.grad(out.sum(), rounded)]
        expected = [exact_out, *torch.autograd.grad(exact_out.sum(), exact)]
        errors.append(
            max(float((a - b).detach().abs().max()) for a, b in zip(actual, expected, strict=True))
        )
    ours, torch_kernel = errors
    assert ours <= 3 * torch_kernel + 1e-12


def test_rms_norm_divides_by_the_root_mean_square() -> None:
    x = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
    torch.testing.assert_close(rms_norm(x, 0.5), x / 13**0.5)
    assert rms_norm(torch.zeros(1, 4), 1e-5).tolist() == [[0.0] * 4]


def test_rotary_scores_depend_only_on_distance() -> None:
    """The dot product of two rotated vectors is a function of their distance."""
    q, k = torch.randn(
        2, 1, 1, 1, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    rotated_q, rotated_k = (rotate(x.expand(1, 1, 7, 8), ROTARY)[0, 0] for x in (q, k))
    scores = rotated_q @ rotated_k.T
    for distance in range(-6, 7):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(scores.diagonal(), (q * k).sum().expand(7), atol=1e-5, rtol=1e-5)
    assert scores[0].std() > 0.1
